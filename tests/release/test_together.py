"""Models together: votes, means and regressions are what numpy and scikit-learn say of what each
model gives alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, mean_squared_error

from dray.cli import main
from dray.corpus.prepare import prepare
from dray.errors import PlanError
from dray.release.predict import predict
from dray.release.together import combine, fit_stack
from dray.spec import make_spec
from dray.tasks.parts.scores import Classes, LabelSets, Numbers
from dray.tasks.parts.tag_scores import Entities
from dray.train import train_locally
from tiny import tiny_tree

LABELS = ("a", "b", "c")
WORDS = {"good": ("fine", "lovely", "bright"), "bad": ("poor", "ugly", "dull")}


def classes(probabilities: Any, ranks: tuple[int, ...] | None = None) -> Classes:
    likely = np.array(probabilities, np.float64)
    return Classes(np.zeros(len(likely), np.int64), likely.argmax(axis=1), likely, LABELS, ranks)


def test_a_mean_of_probabilities_and_a_vote_each() -> None:
    one = classes([[0.9, 0.1, 0.0], [0.1, 0.5, 0.4], [0.4, 0.3, 0.3]])
    two = classes([[0.2, 0.8, 0.0], [0.1, 0.1, 0.8], [0.0, 0.1, 0.9]])
    three = classes([[0.45, 0.55, 0.0], [0.1, 0.6, 0.3], [0.3, 0.4, 0.3]])
    soft: Any = combine([one, two, three], "soft")
    assert soft.guesses.tolist() == [0, 2, 2]
    assert np.allclose(soft.probabilities[0], [1.55 / 3, 1.45 / 3, 0])
    hard: Any = combine([one, two, three], "hard")
    assert hard.guesses.tolist() == [1, 1, 2]  # of a vote each, the likeliest
    assert np.allclose(hard.probabilities[0], [1 / 3, 2 / 3, 0])


def test_classes_in_an_order_are_decided_by_their_middle() -> None:
    one = classes([[0.4, 0.25, 0.35]], ranks=(0, 1, 2))
    found: Any = combine([one, one], "soft")
    assert found.guesses.tolist() == [1]
    turned: Any = combine([classes([[0.4, 0.25, 0.35]], ranks=(0, 2, 1))] * 2, "soft")
    assert turned.guesses.tolist() == [2]


def test_labels_numbers_and_tags() -> None:
    truth = np.zeros((2, 3), np.int64)
    one = LabelSets(truth, np.array([[0.9, 0.2, 0.6], [0.1, 0.1, 0.1]]), LABELS)
    two = LabelSets(truth, np.array([[0.4, 0.2, 0.3], [0.1, 0.8, 0.1]]), LABELS)
    soft: Any = combine([one, two], "soft")
    assert (soft.probabilities > 0.5).tolist() == [[True, False, False], [False, False, False]]
    hard: Any = combine([one, two], "hard")  # one vote of two: the mean decides
    assert (hard.probabilities > 0.5).tolist() == [[True, False, False], [False, False, False]]
    numbers: Any = combine(
        [Numbers(np.zeros(2), np.array([1.0, 5.0])), Numbers(np.zeros(2), np.array([3.0, 6.0]))],
        "soft",
    )
    assert numbers.found.tolist() == [2.0, 5.5]
    wanted = (("O", "B-X"),)
    tags: Any = combine(
        [Entities(wanted, (found,), True) for found in (("O", "O"), ("B-X", "B-X"), ("O", "B-X"))],
        "hard",
    )
    assert tags.found == (("O", "B-X"),)


@pytest.mark.parametrize(
    ("scores", "how", "message"),
    [
        (Numbers(np.zeros(1), np.zeros(1)), "hard", "numbers have no votes"),
        (Entities((("O",),), (("O",),), True), "soft", "tags have no probabilities"),
    ],
)
def test_what_cannot_be_combined_is_refused(scores: Any, how: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        combine([scores, scores], how)


def test_stacking_finds_the_model_that_knows() -> None:
    drawn = np.random.default_rng(0)

    def members(num: int) -> list[Classes]:
        wanted = drawn.integers(0, 3, num)
        knows = np.full((num, 3), 0.1)
        knows[np.arange(num), wanted] = 0.8
        guesses = drawn.dirichlet(np.ones(3), num)
        return [
            Classes(wanted, likely.argmax(axis=1), likely, LABELS) for likely in (guesses, knows)
        ]

    stack = fit_stack(members(300))
    assert stack.num_fitted == 300
    others = members(200)
    found: Any = combine(others, "stacking", stack)
    assert accuracy_score(found.wanted, found.guesses) > 0.98
    assert np.allclose(found.probabilities.sum(axis=1), 1)
    wanted = drawn.normal(size=400)
    runs = [Numbers(wanted, wanted * 2 + 1), Numbers(wanted, drawn.normal(size=400))]
    numbers: Any = combine(runs, "stacking", fit_stack(runs))
    assert mean_squared_error(wanted, numbers.found) < 1e-3
    with pytest.raises(PlanError, match="one class"):
        fit_stack([classes([[0.9, 0.1, 0.0]]), classes([[0.9, 0.1, 0.0]])])


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> str:
    folder = tmp_path_factory.mktemp("together")
    drawn = random.Random(0)
    for part, num in (("train", 160), ("held", 60), ("test", 80)):
        lines = []
        for _ in range(num):
            label = drawn.choice(("good", "bad"))
            words = drawn.choices(("a", "film", "it", "was"), k=drawn.randint(3, 9))
            words.append(drawn.choice(WORDS[label if drawn.random() < 0.85 else "bad"]))
            lines.append(json.dumps({"text": " ".join(words), "label": label}))
        (folder / f"{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name, seed in (("one", 0), ("two", 1), ("three", 2)):
        spec = make_spec(
            tiny_tree(
                folder,
                name=name,
                task="sequence_classification",
                data={
                    "train": {"path": f"{folder}/train.jsonl", "label": "label"},
                    "validation": {"path": f"{folder}/held.jsonl", "label": "label"},
                    "sequence_tokens": 32,
                    "cleaning": {"deduplicate": "none"},
                },
                tokenizer={"train": "byte_bpe", "vocab_size": 330},
                batch={"global_rows": 16, "micro_rows": 16},
                schedule={"name": "cosine", "cycle_steps": 6},
                duration={"steps": 12},
                checkpoint={"every_steps": 6, "keep_last": 3},
                resources={"workers": 1},
                validation={"every_steps": 12, "max_rows": None, "metric": "accuracy"},
                seed=seed,
            )
        )
        prepare(spec, str(folder / "runs"))
        train_locally(spec, storage=str(folder / "runs"), run_name=name)
    return str(folder / "runs")


def alone(storage: str, name: str, test: str, step: int | None = None) -> list[dict[str, Any]]:
    return list(predict(storage, name, [test], step=step))


def test_runs_are_evaluated_and_predict_together(storage: str, capsys: Any) -> None:
    test = f"{Path(storage).parent}/test.jsonl"
    wanted = [json.loads(line)["label"] for line in Path(test).read_text().splitlines()]
    words = ("one", "two", "three", "--storage", storage, "--data", test)
    likely = np.mean(
        [[one["scores"]["good"] for one in alone(storage, name, test)] for name in words[:3]],
        axis=0,
    )
    expected = ["good" if share > 0.5 else "bad" for share in likely]
    capsys.readouterr()
    assert main(["predict", *words]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["prediction"] for one in lines] == expected
    assert np.allclose([one["scores"]["good"] for one in lines], likely, atol=1e-6)
    assert all(len(one["models"]) == 3 for one in lines)
    source = f"{{path: {test}, label: label}}"
    words = (*words[:-1], source)
    assert main(["evaluate", *words, "--json", "--intervals", "50"]) == 0
    found = json.loads(capsys.readouterr().out)
    together = found["models"][3]
    assert together["name"] == "together (soft)"
    assert together["metrics"]["accuracy"] == pytest.approx(accuracy_score(wanted, expected))
    values = {one["name"]: one["metrics"]["accuracy"] for one in found["models"][:3]}
    assert values[found["best"]] == max(values.values())
    against = found["against_best"]["together (soft)"]["accuracy"]
    assert against["difference"] == pytest.approx(
        together["metrics"]["accuracy"] - max(values.values())
    )
    assert main(["evaluate", *words, "--combine", "stacking", "--intervals", "20"]) == 0
    said = capsys.readouterr().out
    assert "fitted on 60 held-out" in said
    assert "together (stacking) against" in said


def test_snapshots_of_one_run_are_models_of_their_own(storage: str, capsys: Any) -> None:
    test = f"{Path(storage).parent}/test.jsonl"
    capsys.readouterr()
    assert main(["predict", "one@6", "one@12", "--storage", storage, "--data", test]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    snapshots = [alone(storage, "one", test, step) for step in (6, 12)]
    likely = np.mean([[one["scores"]["good"] for one in own] for own in snapshots], axis=0)
    assert np.allclose([one["scores"]["good"] for one in lines], likely, atol=1e-6)


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("evaluate", ("one", "--combine", "soft"), "--combine: is of several models"),
        ("evaluate", ("one", "two", "--calibrate"), "--calibrate: is of one model"),
        ("evaluate", ("one", "two", "--combine", "stacking"), "give --data"),
        ("evaluate", ("one", "two", "--metric", "bleu"), "bleu is not told of rows"),
        ("evaluate", (), "RUN: is not given"),
        ("predict", ("one", "none", "--data", "x"), "none"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(
    storage: str, capsys: Any, command: str, words: tuple[str, ...], message: str
) -> None:
    capsys.readouterr()
    assert main([command, *words, "--storage", storage]) == 2
    assert message in capsys.readouterr().err
