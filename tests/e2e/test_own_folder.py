"""A run needs nothing but its storage, and says in one line what it refuses before anything is
written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import dray
from dray.cli import main
from dray.corpus.prepare import prepare
from dray.errors import SpecError, StoreError
from dray.ledger import verify_ledger
from dray.plan import local_shape
from dray.release.evaluate import evaluate
from dray.release.export import export
from dray.release.generate import generate
from dray.runs import Run, list_runs, verify_checkpoint
from dray.spec import Spec, make_spec
from dray.train.driver import train, train_locally
from dray.train.start import look, open_run
from remarks import Remarks
from tiny import tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")


def write_data(folder: Path, word: str = "ships") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    records = [
        {"text": f"document {i} tells of {i * 7 % 13} {word} and {i * 5 % 11} storms"}
        for i in range(120)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def make(data: Path | str, **sections: Any) -> Spec:
    return make_spec(
        tiny_tree(
            Path(data),
            **{
                "data": {
                    "train": [f"{data}/*.jsonl"],
                    "validation": {"share": 0.2},
                    "sequence_tokens": 32,
                },
                "tokenizer": {"train": "byte_bpe", "vocab_size": 300},
                "model": {
                    "architecture": "llama",
                    "hidden_size": 32,
                    "num_layers": 1,
                    "num_heads": 2,
                },
                "duration": {"steps": 2},
                "resources": {"workers": 1},
                **sections,
            },
        )
    )


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """A folder of weights with its tokeniser."""
    folder = tmp_path_factory.mktemp("base")
    spec = make(write_data(folder / "data"))
    prepare(spec, str(folder / "runs"))
    train_locally(spec, storage=str(folder / "runs"), run_name="base")
    export(str(folder / "runs"), "base", str(folder / "model"))
    return folder / "model"


class Place:
    """A working directory with a folder of weights, raw data and the spec of a run that starts from
    both."""

    def __init__(self, root: Path, base: Path) -> None:
        self.root, self.storage = root, root / "runs"
        shutil.copytree(base, root / "base")
        write_data(root / "data")

    def spec(self, steps: int = 2, **sections: Any) -> Spec:
        tree = make("data").model_dump(mode="json", exclude={"model", "tokenizer"})
        tree |= {
            "model": {"path": "base"},
            "tokenizer": {"path": "base"},
            "duration": {"steps": steps},
        }
        return make_spec(tree | sections)

    def prepare(self) -> None:
        prepare(self.spec(), str(self.storage))

    def go(
        self, steps: int = 2, storage: Path | None = None, **sections: Any
    ) -> tuple[Run, list[str]]:
        seen = Remarks()
        ended = train_locally(
            self.spec(steps, **sections),
            storage=str(storage or self.storage),
            run_name="tuned",
            display=seen,
        )
        return ended.run, seen.lines


@pytest.fixture
def place(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    place = Place(tmp_path, base)
    place.prepare()
    return place


def test_a_run_goes_on_when_its_inputs_are_gone_and_its_storage_was_moved(
    place: Place, capsys: Any
) -> None:
    spec = place.spec(resources={"workers": 2}, zero={"stage": 3})
    begun = train(spec, storage=str(place.storage), run_name="tuned").run
    for record in ("run.json", "model.json", "attempts/0001.json"):
        text = Path(begun.path, record).read_text()
        assert str(place.storage) not in text, record
    measured = begun.validations()[-1]["loss"]
    for name in ("base", "data"):
        shutil.rmtree(place.root / name)
    moved = place.storage.rename(place.root / "elsewhere")
    assert evaluate(str(moved), "tuned")["loss"] == pytest.approx(measured, rel=1e-5)
    assert len(generate(str(moved), "tuned", ["document"], max_tokens=4)) == 1
    assert export(str(moved), "tuned", str(place.root / "out")) == 2
    seen = Remarks()
    spec = place.spec(steps=4, resources={"workers": 2}, zero={"stage": 3})
    run = train(spec, storage=str(moved), run_name="tuned", display=seen).run
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4]
    assert [attempt.start_step for attempt in run.attempts()] == [0, 2]
    assert "tuned keeps the rows it began with: its raw files are not found any more" in seen.lines
    assert verify_ledger(run).ok
    assert verify_checkpoint(run, run.checkpoints()[-1]).ok
    for command in (["show", "tuned"], ["doctor", "tuned"], ["verify", "tuned", "--ledger"]):
        assert main([*command, "--storage", str(moved)]) == 0
    assert str(moved / "corpora") in json.dumps(run.summary())
    fork = train(
        place.spec(steps=5, seed=3), storage=str(moved), run_name="tuned", fork="forked"
    ).run
    assert [row["step"] for row in fork.metrics()] == [5]
    again = moved.rename(place.root / "third")
    assert evaluate(str(again), "forked")["step"] == 5
    assert Path(again, "tuned", "pins", "forked.json").exists()


def test_its_own_folder_is_enough_to_export_and_generate(place: Place) -> None:
    run, _ = place.go()
    shutil.rmtree(place.storage / "corpora")
    assert len(generate(str(place.storage), "tuned", ["document"], max_tokens=4)) == 1
    assert export(str(place.storage), "tuned", str(place.root / "out")) == 2
    assert (place.root / "out" / "tokenizer.json").read_bytes() == (
        place.root / "base/tokenizer.json"
    ).read_bytes()
    assert verify_ledger(run).ok


def test_a_deleted_corpus_comes_back_from_the_same_files_and_from_no_others(place: Place) -> None:
    run, _ = place.go()
    shutil.rmtree(place.storage / "corpora")
    write_data(place.root / "data", "trains")
    with pytest.raises(
        StoreError, match=r"run 'tuned': its corpus is gone from .*/corpora/.*--run"
    ) as caught:
        place.go(steps=4)
    assert "\n" not in str(caught.value)
    write_data(place.root / "data")
    seen = Remarks()
    train(place.spec(4), storage=str(place.storage), run_name="tuned", display=seen)
    assert any("is prepared again from the same files" in line for line in seen.lines)
    assert verify_ledger(run).ok


@pytest.mark.parametrize("change", ["touched", "copied", "changed", "added", "moved"])
def test_raw_files_after_the_beginning(place: Place, change: str) -> None:
    place.go()
    data = place.root / "data"
    sections: dict[str, Any] = {}
    if change == "touched":
        os.utime(data / "train.jsonl", ns=(1, 1))
    elif change == "copied":
        shutil.copy(data / "train.jsonl", place.root / "copy")
        (place.root / "copy").replace(data / "train.jsonl")
    elif change == "changed":
        write_data(data, "sheep")
    elif change == "added":
        write_data(data / "more").joinpath("train.jsonl").rename(data / "other.jsonl")
    else:
        data.rename(place.root / "data-2")
        sections = {"data": make("data-2").model_dump(mode="json")["data"]}
    run, lines = place.go(steps=4, **sections)
    said = "tuned keeps the rows it began with: raw files were changed, added or removed since"
    assert (said in lines) == (change in ("changed", "added"))
    assert verify_ledger(run).ok
    assert len(list((place.storage / "corpora").iterdir())) == 1


def test_other_paths_that_hold_something_else_are_another_run(place: Place) -> None:
    place.go()
    write_data(place.root / "data-2", "trains")
    with pytest.raises(StoreError, match=r"differs in data\.train.*--fork"):
        place.go(steps=4, data=make("data-2").model_dump(mode="json")["data"])
    shutil.copytree(place.root / "base", place.root / "copy")
    place.go(steps=4, model={"path": "copy"})
    other = Path(shutil.copytree(place.root / "base", place.root / "other"))
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    with pytest.raises(StoreError, match=r"differs in model\.path"):
        place.go(steps=6, model={"path": "other"})


def test_the_base_is_read_until_the_first_checkpoint_and_not_after(place: Place) -> None:
    run, _ = open_run(
        look(place.spec(), str(place.storage), "tuned"),
        local_shape(),
        lambda spec: prepare(spec, str(place.storage)),
        print,
        with_ray=False,
    )  # and no step is done
    weights = place.root / "base/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\0\0\0\0")
    with pytest.raises(SpecError, match=r"base holds another model than when the run began.*--run"):
        place.go(steps=3)
    (place.root / "base").rename(place.root / "away")
    with pytest.raises(
        SpecError,
        match=r"base is gone; a run reads weights where it began: all until its first checkpoint",
    ):
        place.go(steps=3)
    assert run.attempts() == []
    (place.root / "away").rename(place.root / "base")
    weights.write_bytes(content)
    place.go(steps=3)
    # Another model of the same name is no business of a run that has a checkpoint.
    shutil.rmtree(place.root / "base")
    (place.root / "base").mkdir()
    run, _ = place.go(steps=4)
    assert run.metrics()[-1]["step"] == 4


def test_a_record_with_whole_paths_opens_where_they_are_and_where_they_were_moved(
    place: Place,
) -> None:
    """Earlier versions wrote absolute paths, and kept neither configuration nor tokeniser."""
    run, _ = place.go()
    shutil.rmtree(Path(run.path, "corpus"))
    Path(run.path, "model.json").unlink()
    identity = run.record()["identity"]
    identity["model"]["path"] = str(place.root / "base")
    run.update(corpus=str(place.storage / run.record()["corpus"]), identity=identity)
    Path(run.path, "spec.yaml").write_text(
        dray.spec.loading.dump_spec(
            place.spec(model={"path": str(place.root / "base")}, precision="fp32")
        )
    )
    assert evaluate(str(place.storage), "tuned")["step"] == 2
    moved = place.storage.rename(place.root / "elsewhere")
    assert evaluate(str(moved), "tuned")["step"] == 2
    run, _ = place.go(steps=4, storage=moved)
    assert run.metrics()[-1]["step"] == 4
    assert run.model() is not None
    shutil.rmtree(place.root / "base")
    assert evaluate(str(moved), "tuned")["step"] == 4


def test_a_storage_by_a_link_and_one_that_is_read_only(place: Place) -> None:
    run, _ = place.go()
    (place.root / "link").symlink_to(place.storage)
    place.go(steps=3, storage=place.root / "link")
    assert verify_ledger(Run.open(place.storage, "tuned")).ok
    assert "link" not in Path(run.path, "run.json").read_text()
    assert evaluate(str(place.root / "link"), "tuned")["step"] == 3


def test_two_runs_on_one_corpus_stay_apart(place: Place) -> None:
    place.go()
    train_locally(place.spec(seed=5), storage=str(place.storage), run_name="second")
    assert len(list((place.storage / "corpora").iterdir())) == 1
    shutil.rmtree(place.storage / "second")
    run, _ = place.go(steps=3)
    assert verify_ledger(run).ok


# ---- refused before anything is written --------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "../evil"], "not a name for a run"),
        (["--run", "corpora"], "taken by dray itself"),
        (["--run", ""], "not a name for a run"),
        (["--storage", ""], "--storage: is empty"),
        (["duration.steps=9999999999999"], "less than or equal to 1000000000000"),
        (["--fork", "../evil"], "not a name for a run"),
        (["--run", "none", "--fork", "new"], "not found in"),
        (["tokenizer={path: nowhere}", "model={path: nowhere}"], "nowhere"),
    ],
)
def test_what_needs_no_data_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: Any, arguments: list[str], message: str
) -> None:
    import yaml

    (tmp_path / "spec.yaml").write_text(
        yaml.safe_dump(make(write_data(tmp_path / "data")).model_dump(mode="json"))
    )
    before = files_below(tmp_path)
    code = main(
        ["train", str(tmp_path / "spec.yaml"), "--storage", str(tmp_path / "runs"), *arguments]
    )
    lines = capsys.readouterr().err.splitlines()
    assert (code, [line for line in lines if message in line]) == (2, lines[-1:])
    assert files_below(tmp_path) == before


def test_a_change_that_a_resume_refuses_costs_no_preparation(place: Place) -> None:
    place.go()
    before = files_below(place.storage)
    for sections, message in [
        (
            {"data": make("data").model_dump(mode="json")["data"] | {"sequence_tokens": 16}},
            r"differs in data\.sequence_tokens",
        ),
        ({"seed": 1}, "differs in seed"),
    ]:
        with pytest.raises(StoreError, match=message):
            train(place.spec(4, **sections), storage=str(place.storage), run_name="tuned")
    with pytest.raises(StoreError, match="is no fork of"):
        train(place.spec(4), storage=str(place.storage), run_name="other", fork="tuned")
    assert files_below(place.storage) == before
    assert [run.name for run in list_runs(place.storage)] == ["tuned"]


@pytest.mark.parametrize(
    ("schedule", "goes_on"),
    [
        ({"name": "constant"}, True),
        ({"name": "cosine"}, False),
        ({"name": "linear", "decay_steps": 2}, True),
        ({"name": "wsd", "decay_steps": 1}, False),
    ],
)
def test_a_finished_run_says_truly_what_would_go_on(
    place: Place, schedule: dict[str, Any], goes_on: bool
) -> None:
    place.go(schedule=schedule)
    _, lines = place.go(schedule=schedule)
    assert any("a longer duration would go on" in line for line in lines) == goes_on
    assert any("--fork NEW_NAME" in line for line in lines) != goes_on
    if goes_on:
        assert place.go(steps=3, schedule=schedule)[0].metrics()[-1]["step"] == 3
    else:
        with pytest.raises(StoreError, match=r"--fork NEW_NAME"):
            place.go(steps=3, schedule=schedule)
