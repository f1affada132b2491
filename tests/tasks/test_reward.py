"""Rewards of answers: learnt from pairs, taken up again exactly, told of single answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dray.corpus.prepare import prepare
from dray.release.evaluate import evaluate
from dray.release.export import export
from dray.release.predict import Counts, predict
from dray.runs import Run
from dray.spec import Spec
from dray.train import train_locally
from pairs import KIND, RUDE, make_spec_of, pairs, write

pytestmark = pytest.mark.usefixtures("local_ray")


def make(folder: Path, steps: int = 20, **sections: Any) -> Spec:
    validation = {"every_steps": 20, "metric": "accuracy", "max_rows": None}
    return make_spec_of(folder, "reward", steps, **{"validation": validation, **sections})


def test_it_learns_which_answer_is_better_and_scores_single_ones(tmp_path: Path) -> None:
    folder, storage = write(tmp_path / "in", pairs()), str(tmp_path / "runs")
    prepare(make(folder), storage)
    train_locally(make(folder), storage=storage, run_name="scores")
    after = Run.open(storage, "scores").validations()[-1]
    assert after["accuracy"] > 0.95, after
    assert after["margin"] > 0.5, after
    found = evaluate(storage, "scores")
    assert found["accuracy"] == pytest.approx(after["accuracy"])
    assert found["loss"] == pytest.approx(after["loss"], rel=1e-5)
    asked = [
        {"prompt": "please open the door 3 .", "chosen": f" {answer} ."} for answer in KIND + RUDE
    ]
    asked.append({"prompt": "please open the door 3 .", "chosen": ""})
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    *told, empty = predict(storage, "scores", [str(tmp_path / "asked.jsonl")], counts=Counts())
    assert [record["chosen"] for record in told] == [record["chosen"] for record in asked[:-1]]
    scores = [record["prediction"] for record in told]
    assert min(scores[: len(KIND)]) > max(scores[len(KIND) :])
    assert empty["error"] == "empty answer"
    export(storage, "scores", str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert list(config["id2label"]) == ["0"]
