"""Places in installed packages: found without an import, in the model's and the tokeniser's key."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dray.corpus.prepare import with_tokenizer_folder
from dray.errors import StoreError
from dray.models.source import find_folder
from dray.plan import make_plan, parse_shape
from dray.storage.packages import in_package
from small_models import small_model, small_spec


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that ends whoever imports it, with a model in it."""
    folder = tmp_path / "site" / "some_model_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    small_model(small_spec("bert", "masked_lm")).save_pretrained(folder / "model")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


def test_a_model_in_a_package_is_found_planned_and_loaded(package: Path) -> None:
    place = "python:some_model_package/model"
    assert find_folder(place) == package / "model"
    model = {"model": {"path": place}}
    spec = small_spec(task="masked_lm", sections=model | {"tokenizer": {"path": place}})
    assert with_tokenizer_folder(spec, "").tokenizer.path == str(package / "model")
    plan = make_plan(spec, parse_shape("1xCPU(cpus=2,memory=8GB)"))
    loaded = small_model(spec)
    assert plan.num_parameters == sum(p.numel() for p in loaded.parameters())
    assert loaded.load_report.initialized == ()
    assert "some_model_package" not in sys.modules


@pytest.mark.parametrize("place", ["python:no_such_package/model", "python:/etc", "python:json.x"])
def test_no_such_package_is_one_line(place: str) -> None:
    with pytest.raises(StoreError, match=r"no package .* is installed"):
        in_package(place)


def test_other_places_are_left_alone(tmp_path: Path) -> None:
    assert in_package(str(tmp_path)) == str(tmp_path)
    assert in_package("s3://bucket/python:x") == "s3://bucket/python:x"
    assert Path(in_package("python:json")).name == Path(json.__file__).parent.name
