"""A run that starts from the weights of another run: what is taken, what is new, what is refused,
and what it needs of the other afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dray.cli import main
from dray.corpus.prepare import prepare
from dray.errors import SpecError, StoreError
from dray.release.evaluate import evaluate
from dray.release.trained import load_trained
from dray.runs import CheckpointReader, Run
from dray.spec import Spec, dump_spec, make_spec
from dray.train import train_locally
from remarks import Remarks
from tiny import tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")


def make(data: Path, name: str, task: Any, model: dict[str, Any], **sections: Any) -> Spec:
    tree = tiny_tree(
        data,
        name=name,
        task=task,
        data={
            "train": {"path": f"{data}/*.jsonl", **({} if task == "masked_lm" else LABELLED)},
            "sequence_tokens": 32,
        },
        batch={"global_rows": 8, "micro_rows": 8},
        duration={"steps": 4},
        checkpoint={"every_steps": 2, "keep_last": 1, "keep_best": 1},
        validation={"every_steps": 2},
        resources={"workers": 1},
    )
    tree["model"] = model
    if "run" in model:
        del tree["tokenizer"]
    return make_spec(tree | sections)


LABELLED = {"label": "label"}
BERT = {"architecture": "bert", "hidden_size": 64, "num_layers": 2, "num_heads": 4}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """A storage with a masked language model, `words`, and the data of a classifier beside it."""
    folder = tmp_path_factory.mktemp("from-run")
    data = folder / "data"
    data.mkdir()
    records = [
        {
            "text": f"story {i} of {i * 7 % 13} ships and {'fair' if i % 2 else 'foul'} weather",
            "label": "good" if i % 2 else "bad",
        }
        for i in range(120)
    ]
    (data / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    spec = make(data, "words", "masked_lm", BERT)
    prepare(spec, str(folder / "runs"))
    train_locally(spec, storage=str(folder / "runs"))
    return folder / "runs"


def data_of(storage: Path) -> Path:
    return storage.parent / "data"


def test_a_classifier_starts_from_a_language_model(storage: Path, tmp_path: Path) -> None:
    spec = make(
        data_of(storage),
        "moods",
        "sequence_classification",
        {"run": "words", "step": "best"},
        optimizer={"learning_rate": 1e-12},
    )
    assert spec.tokenizer.run == "words"
    own = tmp_path / "runs"  # the other run is deleted there later
    shutil.copytree(storage, own)
    prepare(spec, str(own))
    display = Remarks()
    run = train_locally(spec, storage=str(own), display=display).run
    (told,) = [line for line in display.lines if "tensors taken from run words, step" in line]
    assert "classifier.weight" in told.partition("new: ")[2]
    assert "cls.predictions" in told.partition("left: ")[2]
    event = next(event for event in run.events() if event["kind"] == "weights_taken")
    source = Run.open(str(own), "words")
    best = min(
        source.checkpoints(), key=lambda info: float(info.metrics["loss"])
    )  # by its own metric
    assert event["origin"] == f"run words, step {best.step}"
    taken = load_trained(str(own), "moods").model
    with CheckpointReader(source, best) as reader:
        for name, parameter in taken.bert.encoder.named_parameters():
            stored = reader.read(f"bert.encoder.{name}").reshape(parameter.shape)
            torch.testing.assert_close(parameter.data, stored, rtol=0, atol=1e-7)
    kept = (run.model() or {})["pretrained"]
    assert (kept["run"], kept["step"]) == ("words", best.step)
    assert len(kept["digest"]) == 64
    # Once it has a checkpoint it needs nothing of the other, and its storage may be moved.
    moved = tmp_path / "moved"
    shutil.move(own, moved)
    shutil.rmtree(moved / "words")
    longer = spec.model_copy(update={"duration": spec.duration.model_copy(update={"steps": 6})})
    again = train_locally(longer, storage=str(moved)).run
    assert again.metrics()[-1]["step"] == 6
    assert evaluate(str(moved), "moods")["num_rows"] > 0


def test_all_is_taken_by_the_same_task_and_differs_from_a_fork(storage: Path) -> None:
    """The weights are the other run's last; steps, optimiser and order begin anew."""
    spec = make(data_of(storage), "more-words", "masked_lm", {"run": "words"})
    prepare(spec, str(storage))
    display = Remarks()
    run = train_locally(spec, storage=str(storage), display=display).run
    (told,) = [line for line in display.lines if "tensors taken from run words, step 4" in line]
    assert "new:" not in told
    assert "left:" not in told
    first = run.metrics()[0]
    assert (first["step"], first["attempt"]) == (1, 1)
    assert first["loss"] < Run.open(str(storage), "words").metrics()[0]["loss"]


REFUSED = {
    "no such run": ({"run": "nobody"}, {}, "not found in"),
    "no such step": ({"run": "words", "step": 77}, {}, "no sound checkpoint 77"),
    "another tokeniser": (
        {"run": "words"},
        {"tokenizer": {"train": "byte_bpe", "vocab_size": 300}},
        "was trained with another tokeniser",
    ),
    "other sizes": ({"run": "words", "num_layers": 3}, {}, "run words has 2"),
    "too long rows": ({"run": "words", "max_positions": 64}, {}, "run words has 32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(storage: Path, case: str) -> None:
    model, sections, message = REFUSED[case]
    before = sorted(path.name for path in storage.iterdir())
    with pytest.raises((SpecError, StoreError), match=message):
        train_locally(
            make(data_of(storage), "refused", "masked_lm", model, **sections),
            storage=str(storage),
        )
    assert sorted(path.name for path in storage.iterdir()) == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"step": "best", **BERT}, "step best is one of a `run`"),
        ({"run": "words", "path": "x"}, "exactly one of `architecture`, `path` and `run`"),
        ({"run": "../evil"}, r"model\.run = '\.\./evil': up to 100 letters, digits"),
        ({"run": "words", "step": 0}, "greater than or equal to 1"),
    ],
)
def test_a_spec_names_one_origin(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make(tmp_path, "x", "masked_lm", model)


def test_a_damaged_origin_is_never_loaded(storage: Path, tmp_path: Path) -> None:
    own = tmp_path / "runs"
    shutil.copytree(storage, own)
    file = sorted((own / "words" / "checkpoints").glob("*4*/*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    spec = make(data_of(storage), "damaged", "masked_lm", {"run": "words"})
    with pytest.raises(StoreError, match="its checksum is another"):
        train_locally(spec, storage=str(own))
    assert not (own / "damaged").exists()


def test_a_plan_is_made_of_the_other_runs_sizes(
    storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        f"name: planned\ntask: masked_lm\nmodel: {{run: words}}\nduration: {{steps: 4}}\n"
        f"data: {{train: '{data_of(storage)}/*.jsonl', sequence_tokens: 32}}\n"
    )
    assert main(["plan", str(spec), "--storage", str(storage), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    source = load_trained(str(storage), "words").model
    assert planned["num_parameters"] == sum(p.numel() for p in source.parameters())


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"distil": {"run": "nosuch"}}, "distil.run = nosuch: no such run in"),
        ({"distil": {"run": "begun"}}, "distil.run = begun: is not complete; a teacher stays"),
        ({"augmentation": {"kinds": ["back_translation"], "back_translation": {
            "there": {"run": "words"}, "back": {"run": "words"}}}},
         "augmentation.back_translation.there.run = words: its task is masked_lm"),
    ],
)  # fmt: skip
def test_runs_that_cannot_help_are_refused_before_anything_begins(
    storage: Path, sections: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (storage / "begun").exists():
        spec = make(storage.parent / "data", "begun", "masked_lm", BERT)
        train_locally(spec, storage=str(storage), stop=lambda: True)
        assert Run.open(str(storage), "begun").status == "stopped"
    before = sorted(str(path) for path in storage.rglob("*"))
    spec = make(storage.parent / "data", "pupil", "sequence_classification", BERT, **sections)
    file = storage.parent / "pupil.yaml"
    file.write_text(dump_spec(spec))
    for command in ("plan", "train"):
        assert main([command, str(file), "--storage", str(storage)]) == 2
        assert said in capsys.readouterr().err
    assert sorted(str(path) for path in storage.rglob("*")) == before
