"""Exports in other forms than a folder: what other runtimes compute of them is what the run's model
does, their cards say what they are and how they are loaded, and what cannot be is refused before
anything is there."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dray.cli import main
from dray.corpus.prepare import prepare
from dray.errors import UserError
from dray.release.export import export
from dray.release.export.manifest import MANIFEST, verify_folder
from dray.release.exported import open_exported
from dray.release.predict import Predictor
from dray.release.trained import load_trained
from dray.spec import make_spec
from dray.train import train_locally
from task_cases import CASES
from task_cases import make as make_task_spec
from tiny import tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")
WORDS = "the play was a tale of two towns and their river in winter now".split()  # noqa: SIM905
SECRET = "hf_abcdefghijklmnopqrstuvwxyz012345"


def write_texts(folder: Path) -> None:
    drawn = random.Random(0)
    lines = [{"text": " ".join(drawn.choices(WORDS, k=drawn.randint(5, 40)))} for _ in range(160)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, lines[0]]) + "{torn\n"
    )


def train(root: Path, name: str, **sections: Any) -> str:
    """A language model of two steps, in a storage whose path nobody may learn; the storage."""
    storage, folder = str(root / "private-place"), root / "private-place-of-data" / "texts"
    if not folder.exists():
        write_texts(folder)
    kept = {"resources": {"workers": 1}, "zero": {"stage": 0}, "duration": {"steps": 2}}
    spec = make_spec(tiny_tree(folder, name=name, **{**kept, **sections}))
    prepare(spec, storage)
    train_locally(spec, storage=storage)
    return storage


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def storage(root: Path, local_ray: None) -> str:
    return train(root, "talk", data={"max_bad_share": 0.5})


def run_card(folder: Path) -> str:
    """Run what a card says of loading it, in its folder."""
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    out = io_of(code, folder)
    assert out.strip()
    return out


def io_of(code: str, folder: Path) -> str:
    import io

    out, before = io.StringIO(), os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), torch.no_grad():
            exec(compile(code, "card", "exec"), {})
    finally:
        os.chdir(before)
    return out.getvalue()


def manifest_of(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return tree


def test_a_folder_its_card_and_its_manifest(
    storage: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    folder = tmp_path / "model"
    words = ["export", "talk", str(folder), "--storage", storage, "--license", "apache-2.0"]
    assert main(words) == 0
    capsys.readouterr()
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "text-generation")
    for told in (
        "- Task: causal_lm",
        "- Architecture: llama (LlamaForCausalLM)",
        "Documents left out: 1 (",
        "unreadable: 1",
        "- Steps: 2 of 2",
        "| loss |",
        "held-out rows",
        "began with weights drawn from its seed",
        "texts/*.jsonl",
    ):
        assert told in card, told
    for path in folder.iterdir():
        for hidden in ("private-place", str(tmp_path), SECRET):
            assert hidden.encode() not in path.read_bytes(), path
    tree = manifest_of(folder)
    assert main(["verify", "talk", "--storage", storage, "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert tree["weights_sha256"] == checked["weights_sha256"]
    assert tree["weights_sha256"] in card
    assert main(["verify", "talk", "--storage", storage, "--ledger", "--json"]) == 0
    assert tree["ledger_digest"] == json.loads(capsys.readouterr().out)["digest"]
    assert {item["file"] for item in tree["files"]} >= {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert main(["verify", str(folder)]) == 0
    run_card(folder)
    assert verify_folder(str(folder)).ok
    assert main(words) == 2  # nothing is overwritten
    assert "nothing is overwritten" in capsys.readouterr().err


def test_an_onnx_graph(storage: str, tmp_path: Path) -> None:
    import onnxruntime

    folder, said = tmp_path / "model", list[str]()
    export(storage, "talk", str(folder), form="onnx", say=said.append)
    assert any("onnxruntime against torch" in line for line in said)
    (check,) = manifest_of(folder)["checks"]
    assert 0 <= check["largest_difference"] <= 1e-3
    assert len(check["shapes"]) >= 3
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    model = load_trained(storage, "talk").model
    most = model.config.vocab_size
    for rows, tokens in ((1, 1), (1, 2), (5, 33)):
        ids = torch.randint(0, most, (rows, tokens))
        mask = torch.ones_like(ids)
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            assert np.abs(found - model(ids).logits.numpy()).max() < 1e-3
    assert run_card(folder).startswith("(2, ")
    assert yaml.safe_load((folder / "README.md").read_text().split("---")[1])["license"] == (
        "unknown"
    )


@pytest.mark.parametrize("values", ["f32", "q8_0"])
def test_a_gguf_file(storage: str, tmp_path: Path, values: str) -> None:
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    export(storage, "talk", str(folder), form="gguf", values=values)
    exact, own = manifest_of(folder)["checks"]
    assert exact["largest_difference"] <= 1e-3
    assert own["largest_difference"] <= (1e-3 if values == "f32" else 0.5)
    run_card(folder)
    trained = load_trained(storage, "talk")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    text = "the river in winter\n\n  x = 12345 é"
    assert tokenizer(text).input_ids == trained.encode(text)
    reader = GGUFReader(folder / "model.gguf")
    assert reader.fields["general.architecture"].contents() == "llama"
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    odd = {"F16"} if values == "q8_0" else set()  # rows of no multiple of 32 numbers
    assert kinds == {values.upper()} | odd
    assert ("are held as f16" in (folder / "README.md").read_text()) == bool(odd)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mistral": {"options": {"sliding_window": None}},
    "qwen2": {},
    "qwen3": {"options": {"head_dim": 128}},
    "gpt2": {"max_positions": 1024},
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_that_is_written_is_read_back(
    root: Path, tmp_path: Path, architecture: str
) -> None:
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4}
    model = {"architecture": architecture, **sizes, **ARCHITECTURES[architecture]}
    storage = train(root, architecture, model=model, data={"max_bad_share": 0.5})
    for values in ("f32", "f16", "bf16", "q8_0"):
        folder = tmp_path / values
        export(storage, architecture, str(folder), form="gguf", values=values)
        exact, _ = manifest_of(folder)["checks"]
        assert exact["largest_difference"] <= 1e-3
        run_card(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_task_has_a_graph_that_onnxruntime_computes(tmp_path: Path, name: str) -> None:
    folder, storage = tmp_path / "in", str(tmp_path / "runs")
    folder.mkdir()
    drawn = random.Random(0)
    lines = [json.dumps(CASES[name].record(drawn)) for _ in range(160)]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    kept = {"resources": {"workers": 1}, "zero": {"stage": 0}, "duration": {"steps": 2}}
    spec = make_task_spec(name, folder, **kept)
    prepare(spec, storage)
    train_locally(spec, storage=storage)
    for form in ("onnx", "folder"):
        target = tmp_path / form
        export(storage, spec.name, str(target), form=form)
        assert verify_folder(str(target)).ok
        run_card(target)
    opened = open_exported(str(tmp_path / "folder"))
    assert opened is not None
    assert opened.task.name == spec.task.name
    if opened.task.predicts:
        Predictor(opened)
    (check,) = manifest_of(tmp_path / "onnx")["checks"]
    assert check["largest_difference"] <= 1e-3


def refused(match: str, folder: Path, *given: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match):
        export(*given, str(folder), **options)
    assert not folder.exists()
    assert not list(folder.parent.glob(f".{folder.name}*"))


def test_what_cannot_be_exported_is_refused_before_the_work(
    storage: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    folder = tmp_path / "model"
    refused("is none; it is folder", folder, storage, "talk", form="tflite")
    refused("is none; it is f32", folder, storage, "talk", form="gguf", values="q4_k")
    refused("does not go with", folder, storage, "talk", form="onnx", adapters_alone=True)
    refused("has none to write alone", folder, storage, "talk", adapters_alone=True)
    refused("no name of a licence", folder, storage, "talk", license="a\nb: c")
    refused("cannot be read", folder, storage, "talk", key_file=str(tmp_path / "none.pem"))
    refused("not found", folder, storage, "nobody")
    refused("no sound checkpoint 99", folder, storage, "talk", step=99)
    refused("lies in the folder of run", Path(storage, "talk", "out"), storage, "talk")
    (tmp_path / "file").write_text("")
    refused("cannot be written", tmp_path / "file" / "model", storage, "talk")
    with pytest.raises(SystemExit):
        main(["export", "talk", str(folder), "--storage", storage, "--format", "x"])
    assert "invalid choice" in capsys.readouterr().err
    config = json.loads(Path(storage, "talk", "model.json").read_text())
    config["config"]["model_type"] = "olmo"
    Path(storage, "talk", "model.json").rename(tmp_path / "kept.json")
    try:
        Path(storage, "talk", "model.json").write_text(json.dumps(config))
        refused("olmo cannot be written; files of llama", folder, storage, "talk", form="gguf")
    finally:
        (tmp_path / "kept.json").rename(Path(storage, "talk", "model.json"))


def test_a_graph_that_computes_something_else_is_not_kept(
    storage: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """The check is one: it finds weights that were changed on their way."""
    from dray.release.export import gguf

    plain = gguf._LAYOUTS["llama"]
    wrong = gguf._Layout(plain.name, plain.fixed, gguf._as_it_is)
    monkeypatch.setitem(gguf._LAYOUTS, "llama", wrong)
    refused("read back as something else", tmp_path / "m", storage, "talk", form="gguf")


def test_a_kill_in_the_middle_leaves_nothing_under_the_name(storage: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    words = [sys.executable, "-m", "dray.cli", "export", "talk", str(folder), "--storage", storage]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _wait_for(lambda: list(tmp_path.glob(".model.*")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not folder.exists()
    assert export(storage, "talk", str(folder)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def _wait_for(is_there: Callable[[], Any], process: subprocess.Popen[bytes]) -> None:
    while not is_there():
        assert process.poll() is None
        time.sleep(0.02)
