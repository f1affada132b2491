"""Classes of rows of numbers: what is fitted to the training documents once goes wherever the model
goes."""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_breast_cancer

from dray.corpus.idx import parse_idx
from dray.corpus.manifest import load_run_manifest
from dray.corpus.prepare import Corpus, prepare
from dray.corpus.stream import read_rows
from dray.errors import CorpusError
from dray.release.evaluate import evaluate
from dray.release.export import export
from dray.release.exported import open_exported
from dray.release.predict import Counts, Predictor, predict
from dray.runs import Run
from dray.spec import Spec, make_spec
from dray.tasks.feature_classification import Transform
from dray.tasks.parts.transforms import apply_transforms
from dray.train import train_locally

pytestmark = pytest.mark.usefixtures("local_ray")
IMAGES = "mnist_test10k/t10k-images-idx3-ubyte.gz"
PCA = [{"name": "pca", "keep": 24, "whiten": True}]


def spec_of(task: dict[str, Any], data: Any, **sections: Any) -> Spec:
    tree: dict[str, Any] = {
        "name": "features",
        "task": {"name": "feature_classification", **task},
        "data": data,
        "model": {"architecture": "vit", "hidden_size": 32, "num_layers": 1, "num_heads": 2},
        "batch": {"global_rows": 32},
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"name": "constant"},
        "duration": {"steps": 60},
        "precision": "fp32",
        "validation": {"metric": "accuracy"},
        "resources": {"workers": 1},
        "zero": {"stage": 0},
        "engine": {"compile": False},
    }
    return make_spec(tree | sections)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def tumours(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """400 rows to train on and 169 others of a table of real measurements, and its columns."""
    found = load_breast_cancer()
    folder = tmp_path_factory.mktemp("tumours")
    names = [str(name).replace(" ", "_") for name in found.feature_names]
    rows = [
        [*numbers, str(found.target_names[kind])]
        for numbers, kind in zip(found.data.tolist(), found.target.tolist(), strict=True)
    ]
    random.Random(0).shuffle(rows)
    for name, part in (("train", rows[:400]), ("test", rows[400:])):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([[*names, "kind"], *part])
    return folder, names


@pytest.fixture(scope="module")
def run(tumours: tuple[Path, list[str]], storage: str) -> Run:
    folder, names = tumours
    data = {
        "train": {"path": str(folder / "train.csv"), "label": "kind"},
        "validation": {"path": str(folder / "test.csv"), "label": "kind"},
    }
    task = {"columns": names, "transforms": [{"name": "standardize"}, {"name": "pca", "keep": 10}]}
    spec = spec_of(task, data)
    prepare(spec, storage)
    return train_locally(spec, storage=storage, run_name="tumours").run


def test_a_table_is_learnt_and_what_was_fitted_is_told(run: Run, storage: str) -> None:
    assert run.validations()[-1]["accuracy"] > 0.88
    manifest = load_run_manifest(run)
    first, second = (one["said"] for one in manifest.fitted)
    assert first == "standardize: 30 numbers by 400 documents"
    assert second.startswith("pca: 10 of 30 numbers have 95.")


def test_rows_are_the_transformed_numbers_of_the_table(
    run: Run, storage: str, tumours: tuple[Path, list[str]]
) -> None:
    folder, _ = tumours
    manifest = load_run_manifest(run)
    with (folder / "train.csv").open() as file:
        table = list(csv.reader(file))[1:]
    values = np.array([row[:-1] for row in table], np.float64)
    transforms = [Transform(name="standardize"), Transform(name="pca", keep=10)]
    wanted = apply_transforms(transforms, manifest.fitted, values)
    read = read_rows(run.corpus, manifest, manifest.train, np.arange(400))
    found = np.array(read.column("values").to_pylist(), np.float32)
    order, own = np.lexsort(wanted.T), np.lexsort(found.T)
    np.testing.assert_allclose(found[own], wanted[order], rtol=1e-5, atol=1e-5)


def test_other_data_is_transformed_as_training_was(
    run: Run, storage: str, tumours: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """A tenth of the test rows have other means by far than the training rows."""
    folder, _ = tumours
    lines = (folder / "test.csv").read_text().splitlines(keepends=True)
    own = tmp_path / "few.csv"
    own.write_text("".join(lines[:18]))
    given = json.dumps({"path": str(own), "label": "kind"})
    values = evaluate(storage, "tumours", data=[given])
    guesses = list(predict(storage, "tumours", [given]))
    wanted = [line.strip().rpartition(",")[2] for line in lines[1:18]]
    right = [one["prediction"] == kind for one, kind in zip(guesses, wanted, strict=True)]
    assert values["accuracy"] == pytest.approx(sum(right) / 17)


def test_an_export_transforms_and_predicts_as_its_run(
    run: Run, storage: str, tumours: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, _ = tumours
    given = [str(folder / "test.csv")]
    export(storage, "tumours", str(tmp_path / "out"))
    ours = [one["scores"]["benign"] for one in predict(storage, "tumours", given)]
    folder_model = open_exported(str(tmp_path / "out"))
    assert folder_model is not None
    with (folder / "test.csv").open() as file:
        records = list(csv.DictReader(file))
    told = Predictor(folder_model).predict(records)
    theirs = [one.told["scores"]["benign"] for one in told]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_run_that_starts_from_another_takes_its_transforms(
    run: Run, storage: str, tumours: tuple[Path, list[str]]
) -> None:
    folder, names = tumours
    data = {"train": {"path": str(folder / "test.csv"), "label": "kind"}}
    transforms = [{"name": "standardize"}, {"name": "pca", "keep": 10}]
    task = {"columns": names, "transforms": transforms}
    start = {"model": {"run": "tumours"}, "validation": {}}
    made = prepare(spec_of(task, data, **start), storage)
    assert made.manifest.fitted == load_run_manifest(run).fitted
    alone = prepare(spec_of(task, data, validation={}), storage)
    assert alone.folder != made.folder
    assert alone.manifest.fitted != made.manifest.fitted
    others = {**task, "transforms": [{"name": "pca", "keep": 10}]}
    with pytest.raises(CorpusError, match=r"task\.transforms: 1 are asked for, and 2 were fitted"):
        prepare(spec_of(others, data, **start), storage)


def test_records_that_are_no_such_numbers_are_left_out_and_counted(
    storage: str, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [{"a": [n, n * n % 7], "b": n, "label": n % 2} for n in range(20)]
    rows += [
        {"a": [1, 2, 3], "b": 1, "label": 0},
        {"a": [1, "x"], "b": 1, "label": 0},
        {"a": [1, True], "b": 1, "label": 0},
        {"a": [1, "2.5"], "b": " 7 ", "label": 0},
        {"a": [1, None], "b": 4, "label": 1},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = {"train": {"path": str(path), "label": "label"}, "cleaning": {"deduplicate": "none"}}
    task = {"columns": ["a", "b"], "size": 3}
    made = prepare(spec_of(task, data, validation={}), storage)
    assert made.manifest.train.num_documents == 21
    assert made.manifest.dropped == {"not 3 numbers in it": 1, "what is no number in it": 3}
    assert any("3 what is no number in it" in line for line in made.describe())
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(map(json.dumps, rows[:3])), encoding="utf-8")
    data = {"train": {"path": str(few), "label": "label"}}
    spec = spec_of({**task, "transforms": [{"name": "pca", "keep": 3}]}, data, validation={})
    with pytest.raises(CorpusError, match=r"task\.transforms\.0\.keep = 3: pca has no more"):
        prepare(spec, storage)


@pytest.mark.slow
def test_digits_are_told_by_two_dozen_numbers_of_their_pixels(
    shared_data: Path, storage: str, tmp_path: Path
) -> None:
    path = str(shared_data / IMAGES)
    data = {
        "train": {"path": path, "format": "idx", "records": [0, 1200]},
        "validation": {"path": path, "format": "idx", "records": [8000, 8200]},
    }
    spec = spec_of({"of": "image", "transforms": PCA, "patch": 4}, data, duration={"steps": 200})
    made: Corpus = prepare(spec, storage)
    (fitted,) = made.manifest.fitted
    assert fitted["said"].startswith("pca: 24 of 784 numbers have 68.")
    assert fitted["transform"]["shape"] == [28, 28, 1]
    run = train_locally(spec, storage=storage, run_name="digits").run
    assert run.validations()[-1]["accuracy"] > 0.6
    counts = Counts()
    (tmp_path / "2.png").write_bytes(b"no image")
    images = parse_idx(gzip.decompress((shared_data / IMAGES).read_bytes()))
    Image.fromarray(images[8000]).save(tmp_path / "1.png")
    given = json.dumps({"path": str(tmp_path), "format": "files"})
    one, other = predict(storage, "digits", [given], counts=counts)
    assert one["prediction"] in map(str, range(10))
    assert other["error"] == "no image"
    assert (counts.num_predicted, counts.num_bad) == (1, 1)
