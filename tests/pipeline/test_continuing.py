"""A run goes on learning from what people said, and is let through only where it has forgotten
nothing."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from dray.corpus.prepare import prepare
from dray.errors import SpecError
from dray.feedback import Dataset, Entry
from dray.ledger import verify_ledger
from dray.pipeline.continuing import Wanted, continue_run, next_name
from dray.pipeline.learnt import find_learnt
from dray.runs import Run
from dray.serve.pinning import pin
from dray.serve.promoting import promote
from dray.serve.served import Served
from dray.serve.versions import Record
from dray.spec import make_spec
from dray.train import train_locally
from small_writer import change_weights, save_small_writer
from tiny import tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")
OLD = {"good": "fine lovely warm", "bad": "dull broken cold"}
NEW = {"good": "sick fire dope", "bad": "meh sus cringe"}
"""Words that the old run has never seen."""


def rows(words: dict[str, str], num: int, seed: int) -> list[dict[str, str]]:
    drawn = random.Random(seed)
    found = []
    for number in range(num):
        label = drawn.choice(("good", "bad"))
        found.append({"text": f"{drawn.choice(words[label].split())} {number}", "label": label})
    return found


def write(path: Path, records: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return str(path)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run that knows the old words, served by the name mood."""
    home = tmp_path_factory.mktemp("going-on")
    tree = tiny_tree(home, task="sequence_classification", model={"architecture": "bert"})
    columns = {"text": "text", "label": "label"}
    tree["data"] |= {
        "train": [{"path": write(home / "old.jsonl", rows(OLD, 320, 0)), **columns}],
        "validation": {"path": write(home / "held.jsonl", rows(OLD, 80, 1)), **columns},
        "sequence_tokens": 16,
    }
    tree["validation"] = {"metric": "accuracy"}
    tree |= {"duration": {"steps": 60}, "resources": {"workers": 1}}
    spec, place = make_spec(tree), str(home / "runs")
    prepare(spec, place)
    run = train_locally(spec, storage=place, run_name="mood").run
    assert run.validations()[-1]["accuracy"] > 0.95
    Record(place, "mood").begin(pin(Served(name="mood", storage=place, run="mood")))
    return place


def said(storage: str, name: str, records: list[dict[str, str]], **more: Any) -> Dataset:
    """Feedback that corrects each of these."""
    dataset = Dataset(storage, name)
    for number, record in enumerate(records):
        told = {
            "id": f"{number:016x}-0",
            "at": float(number),
            "model": "mood",
            "version": 1,
            "route": "classify",
            "asked": {"text": record["text"]},
            "answered": "good",
            "label": record["label"],
        }
        assert dataset.add(Entry.model_validate(told | more))
    return dataset


def test_feedback_is_learnt_old_rows_are_kept_and_the_new_run_is_promoted(storage: str) -> None:
    dataset = said(storage, "slang", rows(NEW, 120, 2))
    wanted = Wanted(data=["feedback:slang"], promote="mood", overrides=["duration.steps=60"])
    done = continue_run(storage, "mood", wanted)
    assert (done.run, done.missed, done.promoted) == ("mood-2", "", "version 2 of mood")
    new = done.metrics["new"]["values"]
    assert new["before"]["accuracy"] + 0.05 < new["after"]["accuracy"]
    assert new["after"]["accuracy"] > 0.9
    old = done.metrics["old"]["values"]
    assert old["after"]["accuracy"] >= old["before"]["accuracy"] - 0.01
    assert done.metrics["new"]["test"]["metrics"]["accuracy"]["difference"] > 0
    assert Record(storage, "mood").read().stable == 2

    run = Run.open(storage, "mood-2")
    report = verify_ledger(run)
    assert report.ok
    assert set(report.epochs_by_source) == {"old.jsonl", f"slang-{_digest(dataset)}-train.jsonl"}
    learnt = find_learnt(run, dataset)
    counts = done.datasets["slang"]
    assert len(learnt) == counts["given"] == counts["learnt"] == 120 - counts["held"]
    assert all(learnt.values())
    assert all(1 <= step <= 60 for steps in learnt.values() for step in steps)
    # Half of every batch is old: 8 rows a step.
    assert sum(len(steps) for steps in learnt.values()) <= 4 * 60
    assert find_learnt(Run.open(storage, "mood"), dataset) == {}

    again = continue_run(storage, "mood", wanted, run_name="mood-2")  # goes on: nothing is left
    assert again.metrics == done.metrics
    other = said(storage, "other", rows(NEW, 20, 3))
    with pytest.raises(SpecError, match="does not start from mood-2"):
        continue_run(storage, "mood-2", Wanted(data=["feedback:other"]), run_name="mood-2")
    assert other.exists


def _digest(dataset: Dataset) -> str:
    (snapshot,) = dataset.snapshots()
    return snapshot.digest


def test_poisoned_feedback_does_not_pass_the_gate(storage: str) -> None:
    """Somebody says of the old words that they mean the opposite."""
    before = Record(storage, "mood").read().stable
    wrong = {"good": "bad", "bad": "good"}
    flipped = [
        {"text": f"{one['text']} again", "label": wrong[one["label"]]} for one in rows(OLD, 100, 4)
    ]
    said(storage, "poison", flipped)
    wanted = Wanted(
        data=["feedback:poison"], replay=0.1, promote="mood", overrides=["duration.steps=60"]
    )
    done = continue_run(storage, "mood", wanted, run_name="poisoned")
    assert "accuracy got worse by" in done.missed
    assert "old held-out rows" in done.missed
    assert done.promoted == ""
    assert Record(storage, "mood").read().stable == before


def test_what_cannot_be_is_refused_before_anything_is_written(storage: str) -> None:
    names = sorted(path.name for path in Path(storage).iterdir())
    for wanted, match in (
        (Wanted(data=[]), "has no data to learn from"),
        (Wanted(data=["feedback:nobody"]), "there is no such feedback"),
        (Wanted(data=["feedback:../x"]), "is no name"),
        (Wanted(data=["feedback:slang"], replay=1.0), "is no share of old rows"),
        (Wanted(data=["feedback:slang"], max_drop=["bleu=1"]), "'bleu' is no metric"),
        (Wanted(data=["feedback:slang"], promote="a/b"), "is no name"),
        (Wanted(data=["feedback:slang"], overrides=["bacth.rows=1"]), "bacth"),
    ):
        said_once = Dataset(storage, "slang")
        if not said_once.exists:
            said(storage, "slang", rows(NEW, 20, 2))
        with pytest.raises(SpecError, match=match):
            continue_run(storage, "mood", wanted, run_name="never")
    left = sorted(path.name for path in Path(storage).iterdir())
    assert left == names


def test_a_name_is_not_given_to_a_model_of_another_kind(storage: str, tmp_path: Path) -> None:
    chat, mood = Record(storage, "chat"), Served(storage=storage, run="mood")
    writers = [Served(folder=str(save_small_writer(tmp_path / name))) for name in ("one", "two")]
    change_weights(Path(str(writers[1].folder)))
    chat.begin(pin(writers[0]))
    refused = "'chat': .*one is a model that writes text, and mood@60 is a model of sequence_cl"
    with pytest.raises(SpecError, match=refused):
        promote(chat, mood)
    wanted = Wanted(data=["feedback:slang"], promote="chat")
    with pytest.raises(SpecError, match="and what mood becomes is a model of"):
        continue_run(storage, "mood", wanted, run_name="never")
    assert Run.find(storage, "never") is None
    assert promote(chat, writers[1]).stable == 2
    shutil.rmtree(str(writers[1].folder))
    assert promote(chat, mood).stable == 3  # what answered is gone: nobody can compare


def test_names_count_on(storage: str) -> None:
    taken = {path.name for path in Path(storage).iterdir()}
    assert next_name(storage, "other") == "other-2"
    assert next_name(storage, "other-7") == "other-8"
    assert next_name(storage, "mood") not in taken
