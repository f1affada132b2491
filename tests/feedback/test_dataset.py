"""Entries are kept once, told apart by what they say, and forgotten without a word of them left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dray.cli import main
from dray.errors import SpecError, StoreError
from dray.feedback import Dataset, Entry


def entry(number: int, **given: Any) -> Entry:
    told = {
        "id": f"{number:016x}-0",
        "at": 100.0 - number,
        "model": "mood",
        "route": "classify",
        "asked": {"text": f"text {number}"},
        "answered": "good",
        "rating": "up",
    }
    return Entry.model_validate(told | given)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(str(tmp_path), "said")


def test_an_entry_is_kept_once(dataset: Dataset) -> None:
    assert not dataset.exists
    assert dataset.add(entry(1))
    assert not dataset.add(entry(1, rating="down"))
    assert dataset.add(entry(2))
    assert dataset.exists
    assert [one.id[:16] for one in dataset.entries()] == [f"{2:016x}", f"{1:016x}"]  # by time
    assert dataset.entries()[1].rating == "up"


@pytest.mark.parametrize(
    ("given", "record"),
    [
        ({}, {"text": "text 1", "label": "good"}),
        ({"rating": "down"}, None),
        ({"rating": "down", "label": "bad"}, {"text": "text 1", "label": "bad"}),
        ({"rating": None, "label": "bad"}, {"text": "text 1", "label": "bad"}),
        (
            {"route": "chat", "asked": {"messages": [{"role": "user", "content": "hi"}]}},
            {
                "messages": [
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": "good"},
                ]
            },
        ),
        (
            {"route": "completions", "asked": {"prompt": "so "}, "text": "so", "rating": None},
            {"text": "so so"},
        ),
        ({"route": "completions", "asked": {"prompt": "so "}, "rating": "down"}, None),
    ],
)
def test_what_is_learnt_is_what_somebody_said_is_right(
    given: dict[str, Any], record: dict[str, Any] | None
) -> None:
    assert entry(1, **given).record() == record


def test_thumbs_of_texts_are_judgements() -> None:
    asked = {"messages": [{"role": "user", "content": "hi"}]}
    said = entry(1, route="chat", asked=asked, rating="down")
    wanted = {"prompt": asked["messages"], "completion": "good", "label": False}
    assert said.judgement() == wanted
    assert entry(1).judgement() is None
    assert entry(1, route="chat", asked=asked, rating=None, text="hello").judgement() is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rating": None}, "a rating, a label or a text"),
        ({"text": "x"}, "this is a prediction"),
        ({"route": "chat", "label": "x"}, "a text that was written"),
        ({"id": "../../x-0"}, "pattern"),
    ],
)
def test_an_entry_that_says_nothing_or_another_thing_is_refused(
    given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        entry(1, **given)


def test_a_snapshot_is_the_same_bytes_for_the_same_entries(tmp_path: Path) -> None:
    one, other = Dataset(str(tmp_path / "a"), "said"), Dataset(str(tmp_path / "b"), "said")
    for number in range(40):
        one.add(entry(number, label="bad" if number % 3 else None))
        other.add(entry(39 - number, label="bad" if (39 - number) % 3 else None))
    one.add(entry(50, rating="down"))
    first, second = one.snapshot(0.25), other.snapshot(0.25)
    assert first.digest == second.digest
    assert Path(first.train).read_bytes() == Path(second.train).read_bytes()
    assert (first.num_unusable, second.num_unusable) == (1, 0)
    assert len(first.train_ids) + len(first.held_ids) == 40
    assert 4 <= len(first.held_ids) <= 16
    lines = [json.loads(line) for line in Path(first.train).read_text().splitlines()]
    assert tuple(line["feedback"] for line in lines) == first.train_ids
    (kept,) = one.snapshots()
    assert (kept.train_ids, kept.held_ids) == (first.train_ids, first.held_ids)


def test_one_question_is_on_one_side_of_the_split(dataset: Dataset) -> None:
    for number in range(30):
        dataset.add(entry(number, asked={"text": f"text {number % 5}"}))
    found = dataset.snapshot(0.5)
    sides = [
        {json.loads(line)["text"] for line in Path(file).read_text().splitlines()}
        for file in (found.train, found.held)
    ]
    assert not sides[0] & sides[1]


def test_what_is_forgotten_leaves_no_word_behind(dataset: Dataset, tmp_path: Path) -> None:
    secret = "the number of my card"
    dataset.add(entry(1, asked={"text": secret}))
    for number in range(2, 9):
        dataset.add(entry(number))
    before = dataset.snapshot(0.0)
    assert dataset.forget([f"{1:016x}-0"], "asked for by mail") == [before.digest]
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(secret in path.read_text() for path in left)
    (told,) = dataset.forgotten()
    assert (told["id"], told["reason"]) == (f"{1:016x}-0", "asked for by mail")
    assert not dataset.add(entry(1, asked={"text": secret}))  # sent again
    assert len(dataset.snapshot(0.0).train_ids) == 7
    with pytest.raises(SpecError, match="has no entry"):
        dataset.forget([f"{1:016x}-0"], "again")


def test_where_nobody_said_what_is_right_there_is_nothing_to_learn(dataset: Dataset) -> None:
    dataset.add(entry(1, rating="down"))
    with pytest.raises(SpecError, match="1 entries, none of which says what is right"):
        dataset.snapshot(0.2)


def test_a_damaged_entry_is_named(dataset: Dataset, tmp_path: Path) -> None:
    dataset.add(entry(1))
    (path,) = tmp_path.rglob("entries/*.json")
    path.write_text("{")
    with pytest.raises(StoreError, match="is no entry of feedback"):
        dataset.entries()


@pytest.mark.parametrize("name", ["", "../x", "a/b", "x" * 101])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match="is no name"):
        Dataset(str(tmp_path), name)


def test_personal_data_is_taken_out_of_entries_and_of_what_was_made_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = Dataset(str(tmp_path), "said")
    dataset.add(entry(1, asked={"text": "write to ann.smith@example.org"}, comment="call 911"))
    dataset.add(entry(2))
    dataset.snapshot(0.0)
    words = ["feedback", "redact", "said", "--storage", str(tmp_path)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "1 entries were redacted" in said
    assert "1 snapshots deleted" in said
    kept = {one.id[:16]: one.asked["text"] for one in dataset.entries()}
    assert kept == {f"{1:016x}": "write to [EMAIL]", f"{2:016x}": "text 2"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any("ann.smith" in path.read_text() for path in files)
