"""Each task learns what is in its rows, is taken up again exactly, evaluated and exported: real
engine, real checkpoints."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dray.corpus.prepare import prepare
from dray.errors import SpecError
from dray.release.evaluate import evaluate
from dray.release.export import export
from dray.release.predict import Counts, predict
from dray.runs import Run
from dray.spec import make_spec
from dray.train import train_locally
from tiny import assert_close, tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")
GOOD, BAD = ("fine", "lovely", "bright"), ("poor", "ugly", "dull")
PLAIN = ("the", "a", "this", "film", "book", "day", "is", "was")


def records(task: str, num: int = 240) -> list[dict[str, Any]]:
    """Texts of which some words decide what is wanted."""
    drawn = random.Random(0)
    found = []
    for _ in range(num):
        mood = drawn.choice((GOOD, BAD))
        words = [drawn.choice(PLAIN) for _ in range(6)]
        words[drawn.randrange(6)] = drawn.choice(mood)
        text = " ".join(words)
        names = ["good" if mood is GOOD else "bad", *(["film"] if "film" in words else [])]
        tags = [("B-MOOD" if word in GOOD + BAD else "O") for word in words]
        found.append(
            {
                "text": text,
                "other": "it is fine" if drawn.random() < 0.5 else "it is poor",
                "number": 1.5 if mood is GOOD else -0.5,
                "names": names,
                "tokens": words,
                "tags": tags,
            }
        )
        found[-1]["same"] = ("fine" in found[-1]["other"]) == (mood is GOOD)
    return found


SOURCES = {  # task: (task of the spec, columns, metric, least or most of it after training)
    "masked_lm": ({"name": "masked_lm", "share": 0.3}, {}, "loss", (0.0, 4.6)),
    "regression": ("regression", {"label": "number"}, "mse", (0.0, 0.6)),
    "many": (
        {"name": "sequence_classification", "labels": "many"},
        {"label": "names"},
        "f1",
        (0.8, 1.0),
    ),
    "token_classification": ("token_classification", {}, "f1", (0.8, 1.0)),
}


def make(folder: Path, name: str, steps: int) -> Any:
    task, columns, metric, _ = SOURCES[name]
    return make_spec(
        tiny_tree(
            folder,
            name=name,
            task=task,
            data={
                "train": {"path": f"{folder}/*.jsonl", **columns},
                "validation": {"share": 0.2},
                "sequence_tokens": 32,
                "cleaning": {"deduplicate": "none"},
            },
            tokenizer={"train": "byte_bpe", "vocab_size": 330},
            model={"architecture": "bert", "hidden_size": 64, "num_layers": 2, "num_heads": 4},
            batch={"global_rows": 16, "micro_rows": 8},
            optimizer={"learning_rate": 3e-3},
            duration={"steps": steps},
            validation={"every_steps": 20, "metric": metric, "max_rows": None},
            checkpoint={"every_steps": 20},
            resources={"workers": 1},
        )
    )


@pytest.mark.parametrize("name", SOURCES)
def test_a_task_is_learnt_taken_up_again_evaluated_and_exported(tmp_path: Path, name: str) -> None:
    folder, storage = tmp_path / "in", str(tmp_path / "runs")
    folder.mkdir()
    lines = [json.dumps(record) for record in records(name)]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prepare(make(folder, name, 60), storage)
    whole = train_locally(make(folder, name, 60), storage=storage, run_name="whole").run
    train_locally(make(folder, name, 20), storage=storage, run_name="parts")
    parts = train_locally(make(folder, name, 60), storage=storage, run_name="parts").run
    histories = [
        [(row["step"], row["rows_digest"], row["loss"]) for row in run.metrics()]
        for run in (whole, parts)
    ]
    assert histories[0] == histories[1]  # what is drawn for rows, too
    metric, (least, most) = SOURCES[name][2:]
    measured = Run.open(storage, "whole").validations()[-1]
    assert least <= measured[metric] <= most, measured
    report: dict[str, dict[str, float]] = {}
    found = evaluate(storage, "whole", report=report)
    if name == "token_classification":
        assert report["MOOD"]["f1"] == pytest.approx(found["f1"])
    if name == "masked_lm":
        exact = evaluate(storage, "whole", thorough=True)
        assert exact["num_targets"] > 2 * found["num_targets"]
        assert abs(exact["loss"] - found["loss"]) < 0.7
    else:
        with pytest.raises(SpecError, match=r"--thorough: .* is evaluated to the letter"):
            evaluate(storage, "whole", thorough=True)
    by_workers: dict[str, dict[str, float]] = {}
    apart = evaluate(storage, "whole", workers=2, report=by_workers)
    assert_close(apart, found)
    assert by_workers.keys() == report.keys()
    for key, value in measured.items():
        if key in found and isinstance(value, float):
            assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    if name != "masked_lm":
        check_predictions(storage, folder, name)
    export(storage, "whole", str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    if name == "regression":
        assert (config["problem_type"], list(config["id2label"])) == ("regression", ["0"])
    assert (tmp_path / "out" / "model.safetensors").exists()


def check_predictions(storage: str, folder: Path, name: str) -> None:
    """In the order of the records, of which one cannot be read, and mostly right."""
    text = (folder / "a.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    (folder / "some.jsonl").write_text("\n".join([*text[:20], "{", *text[20:]]), encoding="utf-8")
    counts = Counts()
    found = list(predict(storage, "whole", [str(folder / "some.jsonl")], counts=counts))
    assert (counts.num_predicted, counts.num_bad, counts.num_cut) == (40, 1, 0)
    (bad,) = [record for record in found if "error" in record]
    assert bad["error"].startswith("broken JSON")
    assert Path(bad["file"]).name == "some.jsonl"
    told = [record for record in found if "error" not in record]
    given = records(name)[:40]
    wanted = {"regression": "number", "many": "names", "token_classification": "tags"}[name]
    key = "tokens" if name == "token_classification" else "text"
    assert [record[key] for record in told] == [record[key] for record in given]
    right = [
        abs(one["prediction"] - other[wanted]) < 1
        if name == "regression"
        else sorted(one["prediction"]) == sorted(other[wanted])
        for one, other in zip(told, given, strict=True)
    ]
    assert sum(right) >= 30
    if name != "token_classification":  # whose long ones go on in further rows
        (folder / "long.jsonl").write_text(json.dumps({"text": "day " * 90}), encoding="utf-8")
        list(predict(storage, "whole", [str(folder / "long.jsonl")], counts=counts))
        assert (counts.num_predicted, counts.num_cut) == (41, 1)
