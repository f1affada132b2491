"""Rules that vote, what they say together, and the file of labelled records."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dray.cli import main
from dray.corpus.labelling.labelled import label_records
from dray.corpus.labelling.model import fit, majority
from dray.corpus.labelling.rules import Rules, make_voters, read_rules
from dray.errors import DrayError, StoreError
from dray.spec import Source
from dray.tasks.parts.rules import ABSTAINS

RULES = {
    "labels": ["bad", "good"],
    "rules": [
        {"name": "praise", "label": "good", "words": ["fine", "Lovely"]},
        {"name": "scorn", "label": "bad", "regex": r"\b(ugly|dull)\b"},
        {"name": "stars", "label": "good", "column": "stars", "at_least": 4},
    ],
}
RECORDS = [
    {"text": "a lovely film", "stars": 5, "truth": "good"},
    {"text": "Ugly and dull", "stars": 1, "truth": "bad"},
    {"text": "fine but dull", "stars": 2, "truth": "bad"},
    {"text": "it was a film", "stars": None, "truth": "good"},
    {"text": "lovelyness", "stars": "4.5", "truth": "good"},
]


def votes_of(rules: dict[str, Any], program: str | None = None) -> list[list[int]]:
    voters = make_voters(Rules.model_validate(rules), program, Counter())
    return [[vote(record) for vote in voters] for record in RECORDS]


def test_rules_vote_for_their_label_or_keep_out() -> None:
    assert votes_of(RULES) == [[1, -1, 1], [-1, 0, -1], [1, 0, -1], [-1, -1, -1], [-1, -1, 1]]


def test_lexicons_and_programs_say_the_label(tmp_path: Path) -> None:
    (tmp_path / "words.csv").write_text("word,label\nlovely,good\nfine,good\ndull,bad\nugly,bad\n")
    (tmp_path / "own.py").write_text(
        "def told(record):\n    return 'bad' if record['stars'] in (1, 2) else None\n"
    )
    rules = {
        "labels": ["bad", "good"],
        "rules": [
            {"name": "words", "lexicon": {"path": str(tmp_path / "words.csv")}},
            {"name": "own", "program": "told"},
        ],
    }
    found = votes_of(rules, str(tmp_path / "own.py"))
    assert found == [[1, -1], [0, 0], [-1, 0], [-1, -1], [-1, -1]]  # fine but dull: as many


def made_votes(num: int, accuracies: list[float], coverage: float, seed: int) -> Any:
    drawn = np.random.default_rng(seed)
    truth = (drawn.random(num) < 0.6).astype(np.int8)
    votes = np.full((num, len(accuracies)), ABSTAINS, np.int8)
    for place, accuracy in enumerate(accuracies):
        there = drawn.random(num) < coverage
        right = drawn.random(num) < accuracy
        votes[there, place] = np.where(right, truth, 1 - truth)[there]
    return truth, votes


def test_the_model_finds_out_how_often_each_rule_is_right() -> None:
    accuracies = [0.95, 0.8, 0.75, 0.6, 0.55]
    truth, votes = made_votes(6000, accuracies, 0.7, 0)
    model = fit(votes, np.array([0.4, 0.6]))
    assert np.allclose(model.accuracies, accuracies, atol=0.04)
    spoken = (votes != ABSTAINS).any(axis=1)
    own = (model.shares(votes).argmax(axis=1) == truth)[spoken].mean()
    most = (majority(votes, 2).argmax(axis=1) == truth)[spoken].mean()
    assert own > most + 0.03
    shares = model.shares(votes)[:, 1]
    sure = (shares > 0.85) & (shares < 0.95) & spoken
    assert truth[sure].mean() == pytest.approx(0.9, abs=0.04)  # a share is a probability


def test_rules_of_one_label_each_that_seldom_meet_do_not_make_one_label_of_all() -> None:
    drawn = np.random.default_rng(0)
    truth = (drawn.random(4000) < 0.5).astype(np.int8)
    votes = np.full((4000, 6), ABSTAINS, np.int8)
    for place in range(6):
        label = place % 2
        often = np.where(truth == label, 0.08, 0.02)
        votes[drawn.random(4000) < often, place] = label
    model = fit(votes, np.array([0.5, 0.5]))
    spoken = (votes != ABSTAINS).any(axis=1)
    found = model.shares(votes).argmax(axis=1)[spoken]
    assert 0.4 < found.mean() < 0.6
    assert (found == truth[spoken]).mean() > 0.75
    assert ((model.accuracies > 0.6) & (model.accuracies < 0.9)).all()


def test_shares_are_those_of_bayes() -> None:
    _, votes = made_votes(400, [0.9, 0.7], 1.0, 1)
    model = fit(votes, np.array([0.4, 0.6]))
    one, two = model.accuracies
    prior = model.prior
    against = prior[0] * one * (1 - two) / (prior[0] * one * (1 - two) + prior[1] * (1 - one) * two)
    found = model.shares(np.array([[0, 1]], np.int8))
    assert found[0, 0] == pytest.approx(against)
    silent = model.shares(np.array([[ABSTAINS, ABSTAINS]], np.int8))
    assert np.allclose(silent[0], prior)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "rules.yaml").write_text(json.dumps(RULES), encoding="utf-8")
    lines = [*map(json.dumps, RECORDS), "{broken"]
    (tmp_path / "raw.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def test_a_file_has_the_records_that_rules_speak_of(files: Path, capsys: Any) -> None:
    out = files / "labelled.jsonl"
    words = ("label", str(files / "rules.yaml"), "--data", str(files / "raw.jsonl"))
    assert main([*words, "--out", str(out), "--gold", "truth", "--by", "majority", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["text"], line["label"]) for line in lines] == [
        ("a lovely film", "good"), ("Ugly and dull", "bad"), ("lovelyness", "good"),
    ]  # fmt: skip
    assert all(line["label_share"] == 1 for line in lines)
    assert lines[0]["stars"] == 5
    counts = ("num_records", "num_labelled", "num_silent", "num_unsure", "num_bad")
    assert [told[name] for name in counts] == [5, 3, 1, 1, 1]
    assert told["labels"] == {"bad": 1, "good": 2}
    assert told["rules"]["praise"] == {
        "coverage": 0.4, "overlap": 0.4, "conflict": 0.2, "gold_accuracy": 0.5,
        "accuracy": told["rules"]["praise"]["accuracy"],
    }  # fmt: skip
    assert told["gold"] == {"accuracy": 1.0, "majority_accuracy": 1.0}
    assert main([*words, "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*words, "--out", str(files / "b.jsonl"), "--least", "0.6"]) == 0
    said = capsys.readouterr().out
    assert "1 have none, since no rule speaks of them" in said
    assert "praise" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["one"]}, "labels"),
        ({"rules": []}, "rules"),
        ({"balance": {"good": 1}}, "balance is of each label once"),
        ({"rules": [{"name": "a", "label": "good"}]}, "exactly one of"),
        ({"rules": [{"name": "a", "label": "nice", "regex": "x"}]}, "nice is none of the labels"),
        ({"rules": [{"name": "a", "regex": "x"}]}, "`label` is needed"),
        ({"rules": [{"name": "a", "label": "good", "program": "f"}]}, "says the label itself"),
        ({"rules": [{"name": "a", "label": "good", "at_least": 3}]}, "`column` is needed"),
        ({"rules": [{"name": "a", "label": "good", "regex": "("}]}, "the pattern is none"),
        ({"rules": [{"name": "a", "program": "f"}]}, "give --program"),
        ({"rules": [{"name": "a", "lexicon": {"path": "nowhere.csv"}}]}, "nowhere.csv"),
        ({"text": "body"}, "no column body"),
        ({"rules": [{"name": "a", "label": "good", "regexp": "x"}]}, "regex"),
    ],
)
def test_what_are_no_rules_is_refused_and_nothing_is_written(
    files: Path, change: dict[str, Any], message: str
) -> None:
    (files / "rules.yaml").write_text(json.dumps(RULES | change), encoding="utf-8")
    with pytest.raises(DrayError, match=message):
        label_records(
            read_rules(str(files / "rules.yaml")),
            [Source(path=str(files / "raw.jsonl"))],
            str(files / "out.jsonl"),
        )
    assert not list(files.glob("out*"))


def test_a_pattern_that_takes_for_ever_keeps_out_and_is_told(tmp_path: Path) -> None:
    rules = {
        "labels": ["bad", "good"],
        "rules": [{"name": "slow", "label": "good", "regex": r"^(a|aa)+$b?c"}],
    }
    (tmp_path / "raw.jsonl").write_text(json.dumps({"text": "a" * 200}), encoding="utf-8")
    said: list[str] = []
    told = label_records(
        Rules.model_validate(rules), [Source(path=str(tmp_path / "raw.jsonl"))],
        str(tmp_path / "out.jsonl"), say=said.append,
    )  # fmt: skip
    assert told["num_silent"] == 1
    assert said == ["rule slow took too long over 1 records, and kept out"]


def test_rules_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"none\.yaml"):
        read_rules(str(tmp_path / "none.yaml"))
