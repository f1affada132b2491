"""What comes after training: evaluation, generation, export, reports, and the Python API without
Ray."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import dray
from dray.cli import main
from dray.corpus.prepare import prepare
from dray.errors import CorpusError, PlanError, SpecError, StoreError, UserError
from dray.release.evaluate import evaluate
from dray.release.export import export
from dray.release.generate import generate
from dray.runs import CheckpointReader, Run
from dray.spec import make_spec
from dray.train.driver import train, train_locally
from tiny import SUMMARY_KEYS, assert_close, tiny_tree


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def run(storage: str, tiny_corpus: Path, local_ray: None) -> Run:
    """A run of this process alone, on a corpus that Ray prepared."""
    tree = tiny_tree(
        tiny_corpus,
        duration={"steps": 30},
        validation={"max_rows": None, "every_steps": 10},
        regularization={"ema": {"decay": 0.8}},
    )
    spec = dray.make_spec(
        tree | {"checkpoint": {"every_steps": 10, "keep_last": 1, "keep_best": 1}}
    )
    prepare(spec, storage)
    return train_locally(spec, storage=storage, run_name="alone").run


def test_the_loop_runs_without_ray_and_gives_the_same_run(
    storage: str, tiny_corpus: Path, run: Run, local_ray: None
):
    spec = dray.make_spec(tiny_tree(tiny_corpus, duration={"steps": 4}, resources={"workers": 1}))
    on_ray = train(spec, storage=storage, run_name="on-ray").run.metrics()
    alone = run.metrics()[:4]
    assert [row["rows_digest"] for row in on_ray] == [row["rows_digest"] for row in alone]
    assert [row["loss"] for row in on_ray] == pytest.approx(
        [row["loss"] for row in alone], abs=1e-5
    )


def test_evaluate_measures_what_the_run_measured(storage: str, run: Run):
    last = run.validations()[-1]
    found = evaluate(storage, "alone")
    assert found["step"] == 30
    for key in ("loss", "perplexity", "accuracy", "bits_per_byte"):
        assert found[key] == pytest.approx(last[key], rel=1e-5)


def test_workers_measure_what_one_process_measures(storage: str, run: Run, tiny_corpus: Path):
    data = [f"{tiny_corpus}/part-0.jsonl"]
    alone = evaluate(storage, "alone", data=data, weights="ema")
    for workers in (1, 3):
        found = evaluate(storage, "alone", data=data, weights="ema", workers=workers)
        assert_close(found, alone)
    with pytest.raises(PlanError, match="--workers: is 0"):
        evaluate(storage, "alone", workers=0)


def test_what_a_worker_cannot_read_is_said_in_a_line(
    storage: str, run: Run, capsys: pytest.CaptureFixture[str]
):
    """The weights of the run were found here, and are damaged where they are read."""
    info = run.latest_checkpoint()
    path = Path(info.path, next(n for n in os.listdir(info.path) if n.endswith(".safetensors")))
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert main(["evaluate", "alone", "--storage", storage, "--workers", "2"]) == 2
    finally:
        path.write_bytes(content)
    told = capsys.readouterr().err.strip()
    assert "a damaged checkpoint is never loaded" in told
    assert "\n" not in told


def test_evaluate_takes_other_data(storage: str, run: Run, tiny_corpus: Path):
    found = evaluate(storage, "alone", data=[f"{tiny_corpus}/part-0.jsonl"])
    assert 0.5 < found["loss"] / run.validations()[-1]["loss"] < 1.5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("/nowhere.jsonl", "--data: /nowhere.jsonl does not exist"),
        ("{path: a.jsonl, txt: body}", "--data: unknown key txt of --data"),
        (
            "/data.train.0.jsonl",
            "--data: /data.train.0.jsonl does not exist",
        ),  # a path that reads like a key
    ],
)
def test_errors_of_other_data_name_what_was_typed(storage: str, run: Run, data: str, message: str):
    with pytest.raises(UserError, match="^" + re.escape(message)):
        evaluate(storage, "alone", data=[data])


def test_a_fork_of_another_shape_is_refused(storage: str, run: Run, tiny_corpus: Path):
    tree = tiny_tree(tiny_corpus)
    tree["model"] = {**tree["model"], "hidden_size": 2 * tree["model"]["hidden_size"]}
    with pytest.raises(
        SpecError, match=r"differs in model\.hidden_size; a fork goes on with the weights"
    ):
        train(make_spec(tree), storage=storage, run_name="alone", fork="wider")
    assert Run.find(storage, "wider") is None


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"seed": -5},
        {"seed": 10**23},
        {"top_p": math.nan},
        {"max_tokens": 0},
    ],
)
def test_generate_refuses_settings_out_of_range(storage: str, setting: dict[str, Any]):
    with pytest.raises(SpecError, match=f"{next(iter(setting))} "):
        generate(storage, "alone", ["import"], **setting)


def test_generate_continues_each_prompt(storage: str, run: Run):
    prompts = ["import os", "", "def f(" * 200]
    greedy = generate(storage, "alone", prompts, temperature=0, max_tokens=8)
    assert greedy == generate(storage, "alone", prompts, temperature=0, max_tokens=8)
    assert len(greedy) == 3
    assert all(isinstance(text, str) for text in greedy)
    said: list[str] = []
    generate(storage, "alone", prompts, temperature=0, max_tokens=40, say=said.append)
    assert len(said) == 1
    assert "prompt 3: " in said[0]
    assert "its last 32 are continued by at most 32" in said[0]
    sampled = {
        generate(storage, "alone", ["import"], max_tokens=16, seed=seed)[0] for seed in range(4)
    }
    assert len(sampled) > 1


def test_export_gives_the_same_logits(storage: str, run: Run, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dray.release.trained import load_trained

    folder = tmp_path / "model"
    assert export(storage, "alone", str(folder)) == 30
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)("def read(self):", return_tensors="pt").input_ids
    trained = load_trained(storage, "alone")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, trained.model(ids).logits)
    with pytest.raises(StoreError, match="lies in the folder of run 'alone'"):
        export(storage, "alone", f"{storage}/alone/checkpoints/out")
    with pytest.raises(StoreError, match="not empty"):
        export(storage, "alone", str(folder))


def test_the_average_is_evaluated_exported_and_continues_prompts(
    storage: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from safetensors.torch import load_file

    chosen = ["alone", "--storage", storage, "--weights", "ema"]
    assert main(["evaluate", *chosen, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == "ema"
    assert 0.0 < abs(found["loss"] - run.validations()[-1]["loss"]) < 1.0
    assert main(["export", *chosen, str(tmp_path / "model")]) == 0
    exported = load_file(tmp_path / "model" / "model.safetensors")
    with CheckpointReader(run, run.latest_checkpoint()) as reader:
        names = reader.names("ema")
        assert set(names) == set(exported)
        for name in names:
            assert torch.equal(exported[name].reshape(-1), reader.read(name, "ema"))
            assert not torch.equal(exported[name].reshape(-1), reader.read(name))
    assert main(["generate", *chosen, "--prompt", "import", "--max-tokens", "4"]) == 0


def test_a_fork_goes_on_with_its_origins_optimizer_alone(storage: str, run: Run, tiny_corpus: Path):
    tree = tiny_tree(tiny_corpus, optimizer={"name": "lion", "learning_rate": 1e-3})
    with pytest.raises(SpecError, match=r"optimiser was adamw, the spec's is lion.*model\.run"):
        train(make_spec(tree), storage=storage, run_name="alone", fork="roaring")
    assert Run.find(storage, "roaring") is None


def test_an_exported_folder_starts_another_task(
    storage: str, run: Run, tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # the workers' working directory is another
    folder = tmp_path / "base"
    export(storage, "alone", str(folder))
    lines = [f"words number {i} are {'good' if i % 2 else 'bad'}\t{i % 2}" for i in range(200)]
    (tmp_path / "labels.tsv").write_text("\n".join(lines))
    tree = tiny_tree(tmp_path, task="sequence_classification", duration={"steps": 60})
    tree["optimizer"] = {"learning_rate": 3e-3}
    tree["data"] = {
        "train": {"path": str(tmp_path / "labels.tsv"), "header": False, "text": "0", "label": "1"},
        "validation": {"share": 0.2},
        "sequence_tokens": 32,
    }
    tree |= {
        "model": {"path": "base"},
        "tokenizer": {"path": "base"},
        "validation": {"metric": "accuracy"},
    }
    ended = train(dray.make_spec(tree), storage=storage, run_name="classifier")
    assert ended.run.validations()[-1]["accuracy"] > 0.9
    found = evaluate(storage, "classifier", data=[str(tmp_path / "labels.tsv")])
    assert found["num_rows"] == 200
    assert found["accuracy"] > 0.9
    assert {"precision", "recall", "f1", "auc"} <= found.keys()
    # Any slice will do, read as the run's own file is; what it cannot tell is left open.
    (tmp_path / "bad.tsv").write_text("\n".join(lines[0::2]))
    found = evaluate(storage, "classifier", data=[str(tmp_path / "bad.tsv")])
    assert (found["num_rows"], found["auc"], found["recall"]) == (100, None, None)
    assert found["accuracy"] > 0.9
    (tmp_path / "one.tsv").write_text("words number 3 are good\t1.0")
    assert evaluate(storage, "classifier", data=[str(tmp_path / "one.tsv")])["num_rows"] == 1
    (tmp_path / "odd.tsv").write_text("words number 3 are good\tgood")
    with pytest.raises(
        CorpusError, match=r"does not know the label 'good' \(1\); it knows '0', '1'"
    ):
        evaluate(storage, "classifier", data=[str(tmp_path / "odd.tsv")])


def test_the_best_checkpoint_is_kept_and_found(storage: str, run: Run):
    best = min(run.validations(), key=lambda row: row["loss"])["step"]
    assert evaluate(storage, "alone", step="best")["step"] == best
    with pytest.raises(StoreError, match="steps with one"):
        evaluate(storage, "alone", step=7)


def test_show_runs_and_verify_print_pages_and_documents(storage: str, run: Run, capsys: Any):
    assert main(["show", "alone", "--storage", storage, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.keys() >= SUMMARY_KEYS
    assert {"step", "path", "verified", "bytes"} <= shown["checkpoints"][0].keys()
    assert shown["data"]["num_documents"] > 100  # from wherever it is asked for
    assert main(["verify", run.uri, "--json"]) == 0
    assert {"step", "ok", "files", "weights_sha256", "optimizer_sha256"} <= json.loads(
        capsys.readouterr().out
    ).keys()
    for command in (["show", "alone"], ["runs"], ["verify", "alone"]):
        assert main([*command, "--storage", storage]) == 0
        told = capsys.readouterr().out
        assert "alone" in told
        assert ("documents    " in told) == (command[0] == "show")
    table = run.metrics_table()
    assert {"step", "loss", "tokens_per_second", "rows_digest"} <= set(table.column_names)


def test_verify_fails_on_one_flipped_bit(storage: str, tiny_corpus: Path, run: Run, capsys: Any):
    spec = dray.make_spec(
        tiny_tree(tiny_corpus, duration={"steps": 1}, schedule={"warmup_steps": 0})
    )
    broken = train_locally(spec, storage=storage, run_name="broken").run
    file = next(Path(broken.latest_checkpoint().path).glob("rank-*"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(bytes(content))
    assert main(["verify", "broken", "--storage", storage]) == 3
    assert "DAMAGED" in capsys.readouterr().out


def test_an_interrupted_run_saves_its_state_and_goes_on(
    storage: str, tiny_corpus: Path, tmp_path: Path
):
    """A real `dray train`, a real resume, and a SIGTERM to its whole process group, as `timeout`
    and others send it: the driver still has its cluster to save with."""
    spec = tmp_path / "long.yaml"
    spec.write_text(
        yaml.safe_dump(tiny_tree(tiny_corpus, name="long", duration={"steps": 100_000}))
    )
    command = [sys.executable, "-m", "dray.cli", "train", str(spec), "--storage", storage]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_ADDRESS": ""},
        start_new_session=True,
    )
    assert process.stderr is not None
    deadline, lines = time.time() + 240, []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("step ") or time.time() > deadline:
            break
    os.killpg(process.pid, signal.SIGTERM)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 143, "".join(lines) + rest
    run = Run.open(storage, "long")
    assert run.status == "interrupted"
    saved = run.latest_checkpoint()
    assert saved is not None
    assert saved.step == run.metrics()[-1]["step"] >= 1
    assert f"state saved at step {saved.step}" in rest
