"""A folder that was exported predicts as its run does, and is served as it is."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from dray.corpus.prepare import prepare
from dray.errors import StoreError
from dray.release.export import export
from dray.release.exported import CORPUS, SPEC, open_exported
from dray.release.predict import Predictor
from dray.release.trained import load_trained
from dray.serve.loading import load_served
from dray.serve.served import Served
from dray.train import train_locally
from task_cases import CASES, make


@pytest.mark.parametrize("name", ["sequence_classification", "token_classification"])
def test_a_folder_predicts_as_its_run_does(tmp_path: Path, name: str, local_ray: None) -> None:
    texts, storage, folder = tmp_path / "texts", str(tmp_path / "runs"), str(tmp_path / "model")
    texts.mkdir()
    drawn = random.Random(0)
    records = [CASES[name].record(drawn) for _ in range(120)]
    lines = "\n".join(json.dumps(record) for record in records)
    (texts / "a.jsonl").write_text(lines, encoding="utf-8")
    kept = {"resources": {"workers": 1}, "zero": {"stage": 0}, "duration": {"steps": 4}}
    spec = make(name, texts, **kept)
    prepare(spec, storage)
    train_locally(spec, storage=storage)
    export(storage, name, folder)

    opened = open_exported(folder)
    assert opened is not None
    given = records[:20]
    theirs = Predictor(opened).predict(given)
    assert [one.told for one in theirs] == [
        one.told for one in Predictor(load_trained(storage, name)).predict(given)
    ]
    assert "prediction" in theirs[0].told
    served = load_served(Served(folder=folder))
    assert served.routes == load_served(Served(storage=storage, run=name)).routes
    assert served.predictor is not None
    assert served.predictor.predict_held_out(8, 1.0) == []  # it has no rows

    Path(folder, SPEC).write_text("task: nothing", encoding="utf-8")
    with pytest.raises(StoreError, match="does not say what was learnt"):
        open_exported(folder)
    Path(folder, SPEC).unlink()
    assert Path(folder, CORPUS).is_file()
    assert open_exported(folder) is None
