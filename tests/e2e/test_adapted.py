"""Runs that train a part of a model: what they keep, take up again, give out, and refuse."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dray.cli import main
from dray.corpus.prepare import prepare
from dray.errors import SpecError
from dray.ledger import verify_ledger
from dray.release.evaluate import evaluate
from dray.release.export import export
from dray.release.generate import generate
from dray.release.predict import predict
from dray.release.trained import Chosen, load_trained
from dray.runs import Run
from dray.spec import Spec, make_spec
from dray.train import train, train_locally
from dray.train.start import look
from tiny import tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "dropout": 0.1},
    "dora": {"rank": 4, "targets": ["q_proj", "down_proj"]},
    "rslora": {"rank": 4},
    "ia3": {},
    "prefix": {"num_tokens": 4},
    "prompt": {"num_tokens": 4},
    "bottleneck": {"width": 8},
    "qlora": {"name": "lora", "base": "nf4"},
}
MERGING = ("lora", "dora", "rslora", "ia3", "qlora")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, local_ray: None) -> Path:
    """A folder with `runs`, of which `base` is a language model, and `model`, which it was exported
    to."""
    place = tmp_path_factory.mktemp("adapted")
    spec = make_spec(
        tiny_tree(
            tiny_corpus,
            name="base",
            model={"max_positions": 128},
            resources={"workers": 1},
            duration={"steps": 12},
            validation={"max_rows": None},
        )
    )
    prepare(spec, str(place / "runs"))
    train_locally(spec, storage=str(place / "runs"))
    export(str(place / "runs"), "base", str(place / "model"))
    return place


def tree_of(corpus: Path, folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    tree = tiny_tree(
        corpus,
        name=name,
        resources={"workers": 1},
        duration={"steps": 6},
        validation={"max_rows": None},
        checkpoint={"every_steps": 3},
        **{"optimizer": {"learning_rate": 1e-2}, "zero": {"stage": 0}, **sections},
    )
    own = {"path": str(folder / "model")}
    return {**tree, "model": own, "tokenizer": own}


def spec_of(corpus: Path, folder: Path, kind: str, **sections: Any) -> Spec:
    adapters = {"name": kind, **KINDS[kind]}
    return make_spec(tree_of(corpus, folder, kind, adapters=adapters, **sections))


def go(spec: Spec, storage: Path, **options: Any) -> Run:
    prepare(spec, str(storage))
    return train_locally(spec, storage=str(storage), **options).run


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.arange(2, 42).reshape(2, 20)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits.float()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_trained_taken_up_again_and_given_out(
    folder: Path, tiny_corpus: Path, tmp_path: Path, kind: str
) -> None:
    storage, spec = folder / "runs", spec_of(tiny_corpus, folder, kind)
    run = go(spec, storage)
    half = spec.model_copy(update={"duration": spec.duration.model_copy(update={"steps": 3})})
    go(half, storage, run_name=f"{kind}-parts")
    parts = go(spec, storage, run_name=f"{kind}-parts")
    told = [[(r["rows_digest"], r["loss"]) for r in one.metrics()] for one in (run, parts)]
    assert told[0] == told[1]
    assert verify_ledger(parts).ok
    check_size(run)
    base, own = evaluate(str(storage), "base"), evaluate(str(storage), kind)
    assert own["loss"] == pytest.approx(run.validations()[-1]["loss"], rel=1e-5)
    before = parts.validations()[0] if kind == "prefix" else base  # which it makes worse at first
    assert own["loss"] < before["loss"]
    without = evaluate(str(storage), kind, chosen=Chosen(own=False))
    assert without.pop("adapters") == []
    assert without["loss"] == pytest.approx(base["loss"], rel=3e-2 if kind == "qlora" else 1e-6)
    check_given_out(storage, kind, folder / "model", tmp_path)


def check_size(run: Run) -> None:
    """The plan counts what is trained, and a checkpoint holds that and its two moments."""
    plan, model = run.plan(), load_trained(run.storage, run.name).model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan["num_trained_parameters"] == trained
    assert plan["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert plan["checkpoint_bytes"] == 12 * trained
    info = run.latest_checkpoint()
    assert info is not None
    assert 12 * trained <= info.num_bytes < 12 * trained + 30_000


def check_given_out(storage: Path, kind: str, base: Path, tmp_path: Path) -> None:
    """Merged, where that can be, and alone for peft: both answer as the run itself does."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    own = load_trained(str(storage), kind).model
    expected = logits_of(own)
    assert len(generate(str(storage), kind, ["import "], max_tokens=6, temperature=0)) == 1
    if kind in MERGING:
        export(str(storage), kind, str(tmp_path / "merged"))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits_of(merged), expected, rtol=0, atol=2e-5)
    else:
        with pytest.raises(SpecError, match="cannot be merged"):
            export(str(storage), kind, str(tmp_path / "merged"))
    if kind == "bottleneck":
        with pytest.raises(SpecError, match="peft has no such adapters"):
            export(str(storage), kind, str(tmp_path / "alone"), adapters_alone=True)
        return
    export(str(storage), kind, str(tmp_path / "alone"), adapters_alone=True)
    plain = AutoModelForCausalLM.from_pretrained(base)
    alone = PeftModel.from_pretrained(plain, tmp_path / "alone")
    found = logits_of(alone)[:, -20:]
    if kind != "qlora":  # whose base is packed there, and plain here
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert (tmp_path / "alone" / "tokenizer.json").exists()


def test_adapters_of_several_runs_add_up(folder: Path, tiny_corpus: Path) -> None:
    storage = str(folder / "runs")
    for kind in ("lora", "rslora", "prefix", "prompt", "qlora"):
        if Run.find(storage, kind) is None:
            go(spec_of(tiny_corpus, folder, kind), folder / "runs")
    plain, lora, rslora = (
        dict(load_trained(storage, "lora", chosen=Chosen(*chosen)).model.named_parameters())
        for chosen in ((False,), (False, ("lora", "lora")), (True, ("rslora",)))
    )
    name = "model.layers.1.mlp.up_proj.weight"
    own = load_trained(storage, "lora").model.get_submodule(name.removesuffix(".weight"))
    other = load_trained(storage, "rslora").model.get_submodule(name.removesuffix(".weight"))
    one, two = (module.get_delta_weight("default") for module in (own, other))
    torch.testing.assert_close(lora[name], plain[name] + 2 * one)
    torch.testing.assert_close(rslora[name], plain[name] + one + two)
    packed, again = (
        dict(load_trained(storage, own, chosen=Chosen(True, (other,))).model.named_parameters())
        for own, other in (("qlora", "lora"), ("lora", "qlora"))
    )
    torch.testing.assert_close(packed[name], again[name])  # the base is packed, and then changed
    with_prefix = evaluate(storage, "prefix", chosen=Chosen(True, ("lora",)))
    assert with_prefix["adapters"] == ["own", "lora"]
    assert with_prefix["loss"] != evaluate(storage, "lora")["loss"]
    with pytest.raises(SpecError, match="there may be one"):
        evaluate(storage, "prefix", chosen=Chosen(True, ("prompt",)))
    with pytest.raises(SpecError, match="has no adapters: it was trained whole"):
        evaluate(storage, "base", chosen=Chosen(True, ("lora",)))
    other_base = make_spec(
        {
            **tree_of(tiny_corpus, folder, "drawn", adapters={"rank": 2}),
            "model": {
                "architecture": "llama",
                "hidden_size": 64,
                "num_layers": 2,
                "num_heads": 4,
            },
        }
    )
    go(other_base, folder / "runs")
    with pytest.raises(SpecError, match="was trained on another model than lora"):
        evaluate(storage, "lora", chosen=Chosen(True, ("drawn",)))


@pytest.fixture(scope="module")
def moods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moods")
    lines = [
        json.dumps({"text": f"day {i} is {word} on ship {i % 7}", "label": label})
        for i in range(120)
        for word, label in ((("fine", "good"), ("foul", "bad"))[i % 2],)
    ]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def mood_tree(moods: Path, name: str, **sections: Any) -> dict[str, Any]:
    tree = tiny_tree(
        moods,
        name=name,
        task="sequence_classification",
        data={
            "train": {"path": f"{moods}/*.jsonl", "label": "label"},
            "validation": {"share": 0.2},
            "sequence_tokens": 32,
        },
        tokenizer={"train": "byte_bpe", "vocab_size": 330},
        batch={"global_rows": 16, "micro_rows": 16},
        optimizer={"learning_rate": 1e-2},
        duration={"steps": 60},
        validation={"max_rows": None},
        resources={"workers": 1},
    )
    tree["model"] = {
        **{"architecture": "bert", "hidden_size": 64, "num_layers": 2, "num_heads": 4},
        **{"max_positions": 64, "options": {"initializer_range": 0.1}},
    }
    return tree | sections


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("classifier-lora", {"adapters": {"rank": 8}}),
        ("classifier-prompt", {"adapters": {"name": "prompt", "num_tokens": 4}}),
        ("classifier-frozen", {"freezing": {"embeddings": True, "blocks": 1}}),
    ],
)
def test_a_new_head_is_trained_beside_them(
    moods: Path, tmp_path: Path, name: str, sections: dict[str, Any]
) -> None:
    tree = mood_tree(moods, name, **sections)
    run = go(make_spec(tree), tmp_path / "runs")
    storage = str(tmp_path / "runs")
    assert run.validations()[-1]["accuracy"] > 0.9
    model = load_trained(storage, name).model
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "classifier.weight" in trained
    assert "bert.embeddings.word_embeddings.weight" not in trained
    told = list(predict(storage, name, [f"{moods}/a.jsonl"]))
    assert [one["prediction"] for one in told[:2]] == ["good", "bad"]
    if name == "classifier-lora":
        from peft import PeftModel
        from transformers import AutoModelForSequenceClassification

        export(storage, name, str(tmp_path / "merged"))
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        expected = logits_of(load_trained(storage, name).model)
        torch.testing.assert_close(logits_of(merged), expected, rtol=0, atol=2e-5)
        export(storage, name, str(tmp_path / "alone"), adapters_alone=True)
        config = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
        assert config["modules_to_save"] == ["classifier", "pooler"]
        # Its base is drawn: the merged model with the update taken out again.
        base = load_trained(storage, name, chosen=Chosen(own=False)).model
        alone = PeftModel.from_pretrained(base, tmp_path / "alone")
        torch.testing.assert_close(logits_of(alone), expected, rtol=0, atol=2e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such target": (
        {"adapters": {"targets": ["qq_proj"]}},
        "adapters.targets: qq_proj: no matrix of LlamaForCausalLM is called so; a target is the "
        "end of a matrix' name; e.g. q_proj, k_proj",
    ),
    "rank 0": (
        {"adapters": {"rank": 0}},
        "adapters.rank = 0: input should be greater than or equal to 1",
    ),
    "another kind's key": (
        {"adapters": {"name": "prefix", "rank": 4}},
        "unknown key adapters.rank; known here: name, num_tokens",
    ),
    "QLoRA under ZeRO 3": (
        {"adapters": {"base": "nf4"}, "zero": {"stage": 3}},
        "zero.stage = 3: adapters.base = nf4 packs matrices, which ZeRO 3 cannot cut up",
    ),
    "no room for a prompt": (
        {"adapters": {"name": "prompt", "num_tokens": 100}},
        "data.sequence_tokens = 64: with adapters.num_tokens = 100 before it a row has 164 tokens",
    ),
    "more blocks than there are": (
        {"freezing": {"blocks": 5}},
        "freezing.blocks = 5: the model has 2",
    ),
    "both": ({"adapters": {}, "freezing": {"blocks": 1}}, "freezing beside adapters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_said_in_a_line_before_anything_is_written(
    folder: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    case: str,
) -> None:
    sections, message = REFUSED[case]
    check_refused(tree_of(tiny_corpus, folder, "refused", **sections), tmp_path, message, capsys)


def check_refused(
    tree: dict[str, Any], tmp_path: Path, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(tree))
    storage = tmp_path / "runs"
    assert main(["train", str(tmp_path / "spec.yaml"), "--storage", str(storage)]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told
    assert "\n" not in told
    assert not storage.exists()


def test_a_prefix_needs_keys_and_values(
    moods: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = mood_tree(moods, "refused", adapters={"name": "prefix"})
    message = "adapters.name = prefix: bert keeps no keys and values of earlier tokens"
    check_refused(tree, tmp_path, message, capsys)


def test_a_run_needs_its_base_and_says_so(
    folder: Path, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    shutil.copytree(folder / "model", own / "model")
    storage = str(tmp_path / "runs")
    go(spec_of(tiny_corpus, own, "ia3"), tmp_path / "runs")
    other = make_spec(
        {
            **tree_of(tiny_corpus, own, "further"),
            "model": {"run": "ia3"},
            "tokenizer": {"run": "ia3"},
        }
    )
    with pytest.raises(SpecError, match="its checkpoints hold only what it trained of its model"):
        train_locally(other, storage=storage)
    fork = make_spec(tree_of(tiny_corpus, own, "ia3", adapters={"rank": 2}))
    with pytest.raises(SpecError, match="its spec differs in adapters"):
        look(fork, storage, "ia3", "other-kind")
    shutil.rmtree(own / "model")
    capsys.readouterr()
    assert main(["evaluate", "ia3", "--storage", storage]) == 2
    told = capsys.readouterr().err.strip()
    assert f"{own}/model is gone" in told
    assert "\n" not in told


def test_a_base_that_is_a_run_is_kept_for_those_that_need_it(
    folder: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    storage = tmp_path / "runs"
    shutil.copytree(folder / "runs", storage)
    tree = tree_of(tiny_corpus, folder, "on-base", freezing={"blocks": 1})
    tree |= {"model": {"run": "base"}, "tokenizer": {"run": "base"}}
    spec = make_spec(tree)
    go(spec, storage)
    kept = Run.open(str(storage), "base").latest_checkpoint()
    longer = Run.open(str(storage), "base").spec().model_dump(mode="json")
    longer |= {"duration": {"steps": 16}, "checkpoint": {"every_steps": 1, "keep_last": 1}}
    train_locally(make_spec(longer), storage=str(storage))
    steps = [info.step for info in Run.open(str(storage), "base").checkpoints()]
    assert kept is not None
    assert steps == [kept.step, 16]
    again = make_spec({**tree, "duration": {"steps": 8}})
    assert go(again, storage).metrics()[-1]["step"] == 8


def test_the_command_line_chooses_adapters(
    folder: Path, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = str(folder / "runs")
    for kind in ("lora", "ia3"):
        if Run.find(storage, kind) is None:
            go(spec_of(tiny_corpus, folder, kind), folder / "runs")
    capsys.readouterr()
    losses = []
    for options in ([], ["--adapter", "ia3"], ["--no-adapters"]):
        assert main(["evaluate", "lora", "--storage", storage, "--json", *options]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert len(set(losses)) == 3
    words = ["generate", "lora", "--storage", storage, "--prompt", "def ", "--max-tokens", "4"]
    assert main([*words, "--no-adapters"]) == 0
    target = str(tmp_path / "alone")
    assert main(["export", "lora", target, "--storage", storage, "--adapters"]) == 0
    assert "for PeftModel.from_pretrained" in capsys.readouterr().out
    written = os.listdir(target)
    assert {"adapter_config.json", "adapter_model.safetensors", "dray-manifest.json"} <= {*written}
    assert "model.safetensors" not in written


@pytest.mark.slow
def test_killed_under_zero_3_on_two_workers_it_goes_on_anywhere(
    folder: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    """SIGKILL to all of a real `dray train`; taken up by one worker under ZeRO 1."""
    storage = str(folder / "runs")
    adapters = {"rank": 4, "dropout": 0.0}
    sections = {
        "adapters": adapters,
        "zero": {"stage": 3},
        "resources": {"workers": 2},
        "checkpoint": {"every_steps": 4, "keep_last": 2},
        "validation": {},
    }
    tree = tree_of(tiny_corpus, folder, "killed")
    tree |= {**sections, "duration": {"steps": 100_000}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(tree))
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "dray.cli", "train"),
            *(str(tmp_path / "spec.yaml"), "--storage", storage),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "RAY_ADDRESS": ""},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 240
        while not ((run := Run.find(storage, "killed")) and run.checkpoints()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert run is not None
    saved = run.checkpoints()[-1].step
    steps = {"duration": {"steps": saved + 6}}
    elsewhere = {"zero": {"stage": 1}, "resources": {"workers": 1}}
    again = train(make_spec(tree | steps | elsewhere), storage=storage).run
    whole = train(make_spec(tree | steps), storage=storage, run_name="whole").run
    ours, theirs = again.metrics(), whole.metrics()
    assert [row["rows_digest"] for row in ours] == [row["rows_digest"] for row in theirs]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], abs=1e-5)
    assert again.attempts()[-1].start_step == saved
    assert verify_ledger(again).ok
