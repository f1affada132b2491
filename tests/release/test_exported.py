"""A folder that was exported predicts as its run does, and is served as it is."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import openai
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
from served_here import served_here
from task_cases import CASES, make


def exported(place: Path, name: str) -> tuple[str, str, list[dict[str, Any]]]:
    """The storage and the export of a run of a task, and its records."""
    texts, storage, folder = place / "texts", str(place / "runs"), str(place / "model")
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
    return storage, folder, records


@pytest.mark.parametrize("name", ["sequence_classification", "token_classification"])
def test_a_folder_predicts_as_its_run_does(tmp_path: Path, name: str, local_ray: None) -> None:
    storage, folder, records = exported(tmp_path, name)
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


def test_a_folder_answers_openais_client_with_vectors(tmp_path: Path, local_ray: None) -> None:
    storage, folder, records = exported(tmp_path, "embedding")
    texts = [record["text"] for record in records[:3]]
    expected = Predictor(load_trained(storage, "embedding")).predict(
        [{"text": text} for text in texts]
    )
    with (
        served_here([Served(folder=folder, name="vectors")]) as address,
        openai.OpenAI(base_url=f"{address.url}/v1", api_key="none", max_retries=0) as client,
    ):
        found = client.embeddings.create(model="vectors", input=texts)
    for one, other in zip(found.data, expected, strict=True):
        assert one.embedding == pytest.approx(other.told["prediction"], abs=1e-6)
    assert found.usage.prompt_tokens == sum(one.num_tokens for one in expected) > 0
