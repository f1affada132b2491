"""Classes of images: learnt from files of several kinds, evaluated, predicted and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from dray.corpus.idx import parse_idx
from dray.corpus.prepare import prepare
from dray.errors import SpecError
from dray.release.evaluate import evaluate
from dray.release.export import export
from dray.release.predict import Counts, predict
from dray.runs import Run
from dray.spec import load_spec, make_spec
from dray.train import train, train_locally
from tiny import assert_close

pytestmark = pytest.mark.usefixtures("local_ray")
IMAGES = "mnist_test10k/t10k-images-idx3-ubyte.gz"
TASK = {
    "name": "image_classification",
    "size": 28,
    "channels": 1,
    "mean": 0.13,
    "deviation": 0.31,
}
MODEL = {
    "architecture": "resnet",
    "options": {
        "layer_type": "basic",
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
    },
}


def tree_of(data: Any, **sections: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "name": "images",
        "task": TASK,
        "data": data,
        "model": MODEL,
        "batch": {"global_rows": 32},
        "optimizer": {"learning_rate": 5e-3},
        "schedule": {"name": "constant"},
        "duration": {"steps": 12},
        "precision": "fp32",
        "validation": {"metric": "accuracy", "max_rows": None},
        "checkpoint": {"every_steps": 5},
        "resources": {"workers": 1},
        "zero": {"stage": 0},
        "engine": {"compile": False},
    }
    return tree | sections


@pytest.fixture(scope="module")
def digits(shared_data: Path) -> dict[str, Any]:
    """Some of MNIST's, by number."""
    path = str(shared_data / IMAGES)
    return {
        "train": {"path": path, "format": "idx", "records": [0, 1600]},
        "validation": {"path": path, "format": "idx", "records": [8000, 8200]},
    }


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def run(digits: dict[str, Any], storage: str) -> Run:
    """A run that has learnt something of varied digits."""
    task = {**TASK, "rotate": 10, "shift": 0.08}
    tree = tree_of(digits, task=task, duration={"steps": 120})
    spec = make_spec(tree)
    prepare(spec, storage)
    return train_locally(spec, storage=storage, run_name="digits").run


def test_digits_are_learnt_and_measured(run: Run, storage: str) -> None:
    measured = run.validations()[-1]
    assert measured["accuracy"] > 0.7
    assert measured["accuracy"] < measured["top5"]
    report: dict[str, dict[str, float]] = {}
    found = evaluate(storage, "digits", report=report)
    for key, value in measured.items():
        if key in found and isinstance(value, float):
            assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    assert sorted(report) == [str(digit) for digit in range(10)]
    assert sum(row["num"] for row in report.values()) == 200
    taken = {
        name: {f"as {other}": report[name][f"as {other}"] for other in report} for name in report
    }
    assert all(sum(row.values()) == report[name]["num"] for name, row in taken.items())
    right = sum(row[f"as {name}"] for name, row in taken.items())
    assert right / 200 == pytest.approx(found["accuracy"])
    assert_close(evaluate(storage, "digits", workers=2), found)
    with pytest.raises(SpecError, match=r"--thorough: .* is evaluated to the letter"):
        evaluate(storage, "digits", thorough=True)


def test_images_of_files_are_told_beside_their_names(
    run: Run, storage: str, shared_data: Path, tmp_path: Path
) -> None:
    import gzip

    images = parse_idx(gzip.decompress((shared_data / IMAGES).read_bytes()))
    for number in range(8000, 8020):
        Image.fromarray(images[number]).save(tmp_path / f"{number}.png")
    (tmp_path / "8005.png").write_bytes(b"no image")
    counts = Counts()
    told = list(predict(storage, "digits", [f"{{path: {tmp_path}, format: files}}"], counts=counts))
    assert [Path(record["file"]).stem for record in told] == [str(n) for n in range(8000, 8020)]
    assert told[5]["error"] == "no image"
    assert (counts.num_predicted, counts.num_bad) == (19, 1)
    assert all("image" not in record for record in told)
    best = {record["prediction"] for record in told if "prediction" in record}
    assert best <= {str(digit) for digit in range(10)}
    scores = told[0]["scores"]
    assert sum(scores.values()) == pytest.approx(1, abs=1e-5)
    assert told[0]["prediction"] == max(scores, key=scores.__getitem__)


def test_an_export_gives_the_same_by_transformers_alone(
    run: Run, storage: str, digits: dict[str, Any], shared_data: Path, tmp_path: Path
) -> None:
    import gzip

    export(storage, "digits", str(tmp_path / "out"))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    images = parse_idx(gzip.decompress((shared_data / IMAGES).read_bytes()))[8000:8010]
    given = processor(
        list(images[..., None]), return_tensors="pt", input_data_format="channels_last"
    )
    with torch.no_grad():
        theirs = model(given["pixel_values"]).logits.softmax(dim=1)
    data = {**digits["validation"], "records": [8000, 8010]}
    ours = list(predict(storage, "digits", [str(data)]))
    assert model.config.id2label == {digit: str(digit) for digit in range(10)}
    for row, record in zip(theirs.tolist(), ours, strict=True):
        assert row == pytest.approx(list(record["scores"].values()), abs=1e-4)


def test_folders_are_classes(tmp_path: Path) -> None:
    """Colour pictures of several sizes, one of which is none."""
    rng = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(40):
            pixels = rng.integers(0, 120, (*rng.integers(8, 40, 2), 3)).astype(np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(tmp_path / "in" / name / f"{number}.jpg")
    (tmp_path / "in" / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    data = {
        "train": {"path": str(tmp_path / "in"), "format": "files"},
        "validation": {"share": 0.25},
    }
    task = {"name": "image_classification", "size": 16, "flip": "both", "zoom": 0.2, "shear": 10}
    spec = make_spec(tree_of(data, task=task, duration={"steps": 30}, batch={"global_rows": 16}))
    corpus = prepare(spec, str(tmp_path))
    assert corpus.manifest.labels == ("blue", "red")
    assert corpus.manifest.dropped == {"no image": 1} or "broken image" in corpus.manifest.dropped
    run = train_locally(spec, storage=str(tmp_path)).run
    assert run.validations()[-1]["accuracy"] > 0.9


@pytest.mark.slow
def test_the_recipe_beats_a_linear_model(shared_data: Path, tmp_path: Path) -> None:
    """On the same 8,000 and 2,000 digits."""
    import gzip

    from sklearn.linear_model import LogisticRegression

    folder = shared_data / "mnist_test10k"
    images, labels = (
        parse_idx(gzip.decompress((folder / f"t10k-{name}-ubyte.gz").read_bytes()))
        for name in ("images-idx3", "labels-idx1")
    )
    pixels = images.reshape(len(images), -1) / 255
    linear = LogisticRegression(C=0.03, max_iter=300).fit(pixels[:8000], labels[:8000])
    baseline = linear.score(pixels[8000:], labels[8000:])
    path = str(shared_data / IMAGES)
    spec = load_spec("mnist", [f"data.train.path={path}", f"data.validation.path={path}"])
    run = train(spec, storage=str(tmp_path)).run
    best = max(values["accuracy"] for values in run.validations())
    assert best >= 0.985
    assert baseline < 0.95
