"""Real small runs judged by the command line: what it says is what scikit-learn says of the run's
own predictions, and what it cannot say is refused."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
from sklearn import metrics as sk

from dray.cli import main
from dray.corpus.prepare import prepare
from dray.release.predict import predict
from dray.spec import make_spec
from dray.train import train_locally
from tiny import tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")
WORDS = {"good": ("fine", "lovely", "bright"), "bad": ("poor", "ugly", "dull")}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two classifiers of the same rows, and a language model."""
    folder = tmp_path_factory.mktemp("judged")
    draw = random.Random(0)
    for part, num in (("train", 160), ("held", 60)):
        lines = []
        for _ in range(num):
            label = draw.choice(("good", "bad"))
            words = draw.choices(("a", "film", "it", "was"), k=draw.randint(3, 9))
            seen = label if draw.random() < 0.8 else "bad"
            words.append(draw.choice(WORDS[seen]))
            lines.append(json.dumps({"text": " ".join(words), "label": label}))
        (folder / f"{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    runs = str(folder / "runs")
    for name, task, seed in (("one", "sequence_classification", 0),
                             ("two", "sequence_classification", 1),
                             ("texts", "causal_lm", 0)):  # fmt: skip
        columns = {} if task == "causal_lm" else {"label": "label"}
        spec = make_spec(
            tiny_tree(
                folder,
                name=name,
                task=task,
                data={
                    "train": {"path": f"{folder}/train.jsonl", **columns},
                    "validation": {"path": f"{folder}/held.jsonl", **columns},
                    "sequence_tokens": 32,
                    "cleaning": {"deduplicate": "none"},
                },
                tokenizer={"train": "byte_bpe", "vocab_size": 330},
                batch={"global_rows": 16, "micro_rows": 16},
                duration={"steps": 15},
                resources={"workers": 1},
                validation={"every_steps": 15, "max_rows": None},
                seed=seed,
            )
        )
        prepare(spec, runs)
        train_locally(spec, storage=runs, run_name=name)
    return runs


def evaluated(storage: str, capsys: Any, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", words[0], "--storage", storage, "--json", *words[1:]]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_classifier_is_judged(storage: str, tmp_path: Path, capsys: Any) -> None:
    page = tmp_path / "page.html"
    asked = ("--intervals", "30", "--slices", "length", "--slices", "source", "--calibrate")
    found = evaluated(storage, capsys, "one", *asked, "--against", "two", "--html", str(page))
    plain = evaluated(storage, capsys, "one")
    assert {key: found[key] for key in plain} == plain
    assert found.keys() - plain.keys() == {"judgement", "against"}
    judged = found["judgement"]
    for name in ("accuracy", "precision", "recall", "f1", "auc"):
        assert judged["metrics"][name]["value"] == pytest.approx(plain[name]), name
        assert judged["metrics"][name]["low"] <= plain[name] <= judged["metrics"][name]["high"]
    held = f"{Path(storage).parent}/held.jsonl"
    told = list(predict(storage, "one", [held]))
    wanted = [json.loads(line)["label"] for line in Path(held).read_text().splitlines()]
    guesses = [one["prediction"] for one in told]
    labels = judged["confusion"]["labels"]
    matrix = sk.confusion_matrix(wanted, guesses, labels=labels).tolist()
    assert judged["confusion"]["counts"] == matrix
    assert judged["metrics"]["mcc"]["value"] == pytest.approx(sk.matthews_corrcoef(wanted, guesses))
    likely = [one["scores"][labels[1]] for one in told]
    brier = sk.brier_score_loss([label == labels[1] for label in wanted], likely)
    assert judged["metrics"]["brier"]["value"] == pytest.approx(brier, rel=1e-4)
    assert sum(one["num"] for one in judged["slices"]["length"].values()) == 60
    assert [one["num"] for one in judged["slices"]["source"].values()] == [60]
    assert judged["calibration"]["num_fitted"] == 30
    other = evaluated(storage, capsys, "two")
    compared = found["against"]["metrics"]["accuracy"]
    assert compared["difference"] == pytest.approx(other["accuracy"] - plain["accuracy"])
    right = found["against"]["right_answers"]
    difference = (right["only_second"] - right["only_first"]) / 60
    assert compared["difference"] == pytest.approx(difference)
    text = page.read_text(encoding="utf-8")
    titles = ("ROC", "Reliability", "Confusion matrix", "By length", "Against two", "Worst errors")
    assert all(title in text for title in titles)
    assert text.count("<svg") == 3
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)


def test_texts_are_told_only_where_they_are_asked_for(storage: str, capsys: Any) -> None:
    worst = evaluated(storage, capsys, "one", "--intervals", "20")["judgement"]["worst"]
    assert worst
    assert all("text" not in one for one in worst)
    told = evaluated(storage, capsys, "one", "--texts")["judgement"]["worst"]
    assert [one["row"] for one in told] == [one["row"] for one in worst]
    costs = [one["cost"] for one in told]
    assert costs == sorted(costs, reverse=True)
    held = (Path(storage).parent / "held.jsonl").read_text().splitlines()
    known = {(json.loads(line)["text"], json.loads(line)["label"]) for line in held}
    assert {(one["text"], one["wanted"]) for one in told} <= known


def test_a_language_model_is_judged_and_checked(storage: str, tmp_path: Path, capsys: Any) -> None:
    checks = tmp_path / "checks.jsonl"
    lines = [{"prompt": "it was", "expect": {"regex": r"(?s).+"}}, {"prompt": "a", "expect": "no"}]
    checks.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    page = tmp_path / "page.html"
    words = ("--checks", str(checks), "--max-tokens", "4", "--intervals", "20")
    found = evaluated(storage, capsys, "texts", *words, "--html", str(page))
    judged = found["judgement"]
    assert judged["metrics"]["loss"]["value"] == pytest.approx(found["loss"], rel=1e-4)
    assert judged["metrics"]["perplexity"]["value"] == pytest.approx(
        math.exp(found["loss"]), rel=1e-3
    )
    assert judged["metrics"]["accuracy"]["value"] == pytest.approx(found["accuracy"])
    assert (judged["unit"], judged["num"]) == ("row", found["num_rows"])
    assert any("no confusion matrix" in one for one in judged["missing"])
    assert (found["checks"]["num"], found["checks"]["passed"]) == (2, 1)
    assert "Checks: 1 of 2 passed" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("one", "--slices", "colour"), "--slices colour: a corpus does not keep that"),
        (("one", "--intervals", "3"), "--intervals: is 3"),
        (("one", "--against", "texts"), "--against texts: its rows are not those of the first run"),
        (("texts", "--calibrate"), "--calibrate: its answers have no probabilities"),
        (("texts", "--slices", "label"), "--slices label: its rows have no labels"),
        (("texts", "--program", "x.py"), "--program: is of --checks"),
        (("texts", "--checks", "none.jsonl"), "none.jsonl: cannot be read"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(
    storage: str, capsys: Any, words: tuple[str, ...], message: str
) -> None:
    capsys.readouterr()
    assert main(["evaluate", words[0], "--storage", storage, *words[1:]]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert not said.out
