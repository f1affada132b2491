"""What every task owes: a run of it that is killed twice goes on, each time with another number of
workers under another ZeRO stage, with the same rows and the same losses."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dray.corpus.prepare import prepare
from dray.runs import Run
from dray.spec import Spec, task_names
from dray.train import train_locally
from resuming import assert_same_steps, killed_and_resumed
from task_cases import CASES, make

STEPS = 24
QUICK = ("policy", "embedding")
"""Those whose rows or losses hang on other rows or on the model itself. The others go the way that
these go."""


def goes_on_elsewhere(
    tmp_path: Path, name: str, sections: dict[str, Any], places: Sequence[tuple[int, int]]
) -> Run:
    """A run of a case that is killed twice has the same rows and losses as one that is not, each
    attempt in one of the places (workers, ZeRO stage)."""
    folder, storage = tmp_path / "in", str(tmp_path / "runs")
    folder.mkdir()
    drawn = random.Random(0)
    lines = [json.dumps(CASES[name].record(drawn)) for _ in range(160)]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    lasts = {"duration": {"steps": STEPS}, "checkpoint": {"every_steps": 5}, **sections}
    whole = make(name, folder, resources={"workers": 1}, zero={"stage": 0}, **lasts)
    prepare(whole, storage)
    straight = train_locally(whole, storage=storage, run_name="straight").run

    def elsewhere(**others: Any) -> Spec:
        return make(name, folder, **(lasts | others))

    killed = killed_and_resumed(elsewhere, storage, "killed", places=places)
    assert_same_steps(killed, straight)
    return killed


def test_every_task_that_dray_has_is_here() -> None:
    assert {name.split()[0] for name in CASES} == set(task_names())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES]
)
def test_killed_twice_it_goes_on_elsewhere_with_the_same_rows_and_losses(
    tmp_path: Path, local_ray: None, name: str
) -> None:
    killed = goes_on_elsewhere(tmp_path, name, {}, CASES[name].places)
    assert [attempt.num_ranks for attempt in killed.attempts()] == [2, 1, 2]


REGULARIZED = {
    "dropout": 0.1,
    "stochastic_depth": 0.2,
    "l1": 1e-5,
    "l2": 1e-3,
    "max_norm": 2.0,
    "gradient_noise": {"eta": 1e-4},
    "adversarial": {"name": "pgd", "epsilon": 0.1, "steps": 2},
    "ema": {"decay": 0.9},
    "swa": {"first_step": 10, "every_steps": 3},
}


@pytest.mark.slow
def test_so_does_one_whose_rules_vote_on_other_words_each_time(
    tmp_path: Path, local_ray: None
) -> None:
    (tmp_path / "words.csv").write_text("word,label\nred,rare\ncold,so\n", encoding="utf-8")
    (tmp_path / "thesaurus").write_text("red cold\ncold red\nold new\n", encoding="utf-8")
    rules = [
        {"name": "words", "lexicon": {"path": str(tmp_path / "words.csv")}},
        {"name": "aged", "label": "rare", "regex": r"\bold\b", "weight": 2.0},
    ]
    constraints = {"labels": ["rare", "so"], "rules": rules, "share": 0.5, "strength": 2.0}
    sections = {
        "task": {
            "name": "sequence_classification",
            "class_weights": "balanced",
            "constraints": constraints,
        },
        "augmentation": {
            "kinds": ["synonyms", "swap", "token_cutoff"],
            "thesaurus": str(tmp_path / "thesaurus"),
            "share": 0.6,
            "strength": 0.5,
        },
        "regularization": {"dropout": 0.1, "r_drop": 0.5, "label_smoothing": 0.1},
    }
    killed = goes_on_elsewhere(
        tmp_path, "sequence_classification", sections, ((2, 3), (1, 0), (2, 1))
    )
    broken = [row["rules_broken"] for row in killed.validations()]
    assert broken
    assert all(0 < value < 1 for value in broken)


def test_so_does_one_with_all_kinds_of_regularisation(tmp_path: Path, local_ray: None) -> None:
    sections = {
        "model": {"architecture": "bert", "hidden_size": 32, "num_layers": 2, "num_heads": 2},
        "regularization": REGULARIZED,
    }
    goes_on_elsewhere(tmp_path, "sequence_classification", sections, ((2, 3), (1, 0), (2, 1)))


CHANGES = ["synonyms", "insertion", "swap", "deletion", "keyboard", "ocr"]
HIDES = ["token_cutoff", "span_masking"]
AUGMENTED = {
    "sequence_classification": [*CHANGES, *HIDES],
    "token_classification": ["synonyms", "keyboard", "ocr", *HIDES],
    "regression": [*CHANGES, *HIDES],
    "embedding": CHANGES,
    "seq2seq": [*CHANGES, *HIDES],
    "seq2seq of a decoder": CHANGES,
    "causal_lm": HIDES,
    "instruction": HIDES,
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n == "sequence_classification" else pytest.mark.slow)
        for n in AUGMENTED
    ],
)
def test_so_does_one_whose_rows_are_read_in_other_words(
    tmp_path: Path, local_ray: None, name: str
) -> None:
    thesaurus = tmp_path / "thesaurus"
    thesaurus.write_text("red crimson\nold aged\nnew fresh\n", encoding="utf-8")
    augmentation: dict[str, Any] = {"kinds": AUGMENTED[name], "share": 0.6, "strength": 0.3}
    if "synonyms" in AUGMENTED[name]:
        augmentation["thesaurus"] = str(thesaurus)
    goes_on_elsewhere(tmp_path, name, {"augmentation": augmentation}, CASES[name].places)
