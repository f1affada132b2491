"""One spec from raw data to a promoted version: what is there is not made again, what does not hold
ends it, and what cannot be is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dray
from dray.cli import main
from dray.errors import SpecError, StoreError
from dray.pipeline.release import Released, release
from dray.release.export.manifest import verify_folder
from dray.runs import Run
from dray.serve.versions import Record
from tiny import tiny_tree

ALL = ["prepare", "train", "evaluate", "compress", "export", "promote"]


def whole_tree(corpus: Path, folder: Path, **sections: Any) -> dict[str, Any]:
    """A spec with every section, which trains in seconds."""
    given: dict[str, Any] = {
        "validation": {"every_steps": 3, "max_rows": None},
        "checkpoint": {"every_steps": 3},
        "evaluate": {"gate": {"perplexity": 1e6}},
        "compress": {"methods": ["int8"], "max_drop": {"perplexity": "50%"}},
        "export": [{"folder": f"{folder}/{{run}}-{{step}}", "license": "mit"}],
        "serve": {"name": "tiny-served"},
    }
    return tiny_tree(corpus, **(given | sections))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("released")


@pytest.fixture(scope="module")
def tree(place: Path, tiny_corpus: Path) -> dict[str, Any]:
    return whole_tree(tiny_corpus, place / "out")


@pytest.fixture(scope="module")
def stopped(place: Path, tree: dict[str, Any], local_ray: None) -> Released:
    """A release that ends once it has trained."""
    return go(place, tree, until="train")


@pytest.fixture(scope="module")
def released(place: Path, tree: dict[str, Any], stopped: Released) -> Released:
    """The same one, which goes on."""
    return go(place, tree)


def go(place: Path, tree: dict[str, Any], until: str = "promote", **changes: Any) -> Released:
    spec = dray.make_spec(tree | changes)
    return release(spec, storage=str(place / "runs"), until=until)


def there(released: Released) -> dict[str, bool]:
    return {done.stage: done.was_there for done in released.stages}


def artifact(released: Released, stage: str) -> str:
    return next(done.artifact for done in released.stages if done.stage == stage)


def test_each_stage_goes_by_what_is_there(stopped: Released, released: Released) -> None:
    assert there(stopped) == {"prepare": False, "train": False}
    fresh = {"evaluate", "compress", "export", "promote"}
    assert there(released) == {stage: stage not in fresh for stage in ALL}


def test_a_second_release_makes_nothing(
    place: Path, tree: dict[str, Any], released: Released
) -> None:
    before = {str(path) for path in place.rglob("*") if path.is_file()}
    again = go(place, tree)
    assert there(again) == dict.fromkeys(ALL, True)
    after = {str(path) for path in place.rglob("*") if path.is_file()}
    assert {path for path in after - before if "/drivers/" not in path} == set()
    assert len(Record(str(place / "runs"), "tiny-served").history()) == 1


def test_what_was_made_is_of_the_checkpoint_that_was_chosen(
    place: Path, released: Released
) -> None:
    storage = str(place / "runs")
    trained, compressed = Run.open(storage, "tiny"), Run.open(storage, "tiny-int8")
    made = compressed.compressed()
    assert made is not None
    assert (made["run"], made["step"]) == ("tiny", released.step)
    validated = {info.step: info.metrics["loss"] for info in trained.checkpoints()}
    assert released.step == min(validated, key=lambda step: validated[step])
    folder = artifact(released, "export")
    assert folder == f"{place}/out/tiny-int8-{released.step}"
    assert verify_folder(folder).ok
    state = Record(storage, "tiny-served").read()
    assert state.versions[state.stable].run == "tiny-int8"
    spec = compressed.spec()  # which does not go through all that again
    assert (spec.compress, spec.export, spec.serve, spec.evaluate) == (None, (), None, None)


def test_the_card_tells_what_was_measured_for_the_release(
    place: Path, tree: dict[str, Any], released: Released
) -> None:
    alone = {"folder": f"{place}/out/trained", "of": "trained"}
    go(place, tree, until="export", export=[alone])
    (_, measured), *others = Run.open(str(place / "runs"), "tiny").evaluations(released.step or 0)
    assert not others
    card = Path(alone["folder"], "README.md").read_text("utf-8")
    assert f"On {measured['num_rows']:,} held-out rows, for its release:" in card
    assert f"| perplexity | {measured['perplexity']:.6g} |" in card


def test_a_gate_that_does_not_hold_ends_it(
    place: Path, tree: dict[str, Any], released: Released, tmp_path: Path
) -> None:
    missed = go(place, tree, evaluate={"gate": {"perplexity": 1.0}})
    assert [done.stage for done in missed.stages] == ["prepare", "train", "evaluate"]
    assert "perplexity" in missed.missed
    assert "at most 1" in missed.missed
    stricter = {"methods": ["int8"], "max_drop": {"perplexity": 0, "loss": 0}}
    missed = go(place, tree, compress=stricter)
    worse = (Run.open(str(place / "runs"), "tiny-int8").compression() or {})["metrics"]["loss"]
    assert worse["after"]["value"] > worse["before"]["value"]
    assert "loss" in missed.missed
    assert missed.stages[-1].stage == "compress"
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(tree | {"evaluate": {"gate": {"loss": 0.0}}}), "utf-8")
    words = ["release", str(path), "--storage", str(place / "runs"), "--until", "promote"]
    assert main(words) == 3


@pytest.mark.slow
def test_other_methods_make_another_run_and_another_version(
    place: Path, tree: dict[str, Any], released: Released
) -> None:
    storage = str(place / "runs")
    other = {"methods": ["magnitude:share=0.1"]}
    found = go(place, tree, compress=other)
    assert artifact(found, "compress") == "tiny-magnitude"
    more = {"methods": ["magnitude:share=0.2"]}
    found = go(place, tree, compress=more)
    assert artifact(found, "compress") == "tiny-magnitude-2"
    assert there(go(place, tree, compress=other, until="compress"))["compress"]
    record = Record(storage, "tiny-served")
    assert [len(record.read().versions), record.read().stable] == [3, 3]
    record.rollback()
    assert record.rollback().stable == 1
    with pytest.raises(StoreError, match=r"compress\.name = tiny-int8: is another run"):
        go(place, tree, compress=other | {"name": "tiny-int8"})


def test_an_export_that_is_there_is_looked_at(
    place: Path, tree: dict[str, Any], released: Released
) -> None:
    folder = Path(artifact(released, "export"))
    with pytest.raises(StoreError, match="holds another export: license mit instead of other"):
        go(place, tree, export=[{"folder": str(folder), "license": "other"}])
    config = folder / "config.json"
    kept = config.read_bytes()
    config.write_bytes(kept + b" ")
    with pytest.raises(StoreError, match="is damaged"):
        go(place, tree)
    config.write_bytes(kept)
    assert there(go(place, tree))["export"]


@pytest.mark.slow
def test_training_that_is_gone_on_with_is_released_anew(
    place: Path, tree: dict[str, Any], released: Released
) -> None:
    longer = go(place, tree, duration={"steps": 9}, evaluate={"step": "newest"})
    assert longer.step == 9
    assert there(longer) == {stage: stage == "prepare" for stage in ALL}
    state = Record(str(place / "runs"), "tiny-served").read()
    assert state.versions[state.stable].step == 9


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"compress": {"methods": ["int9"]}}, "compress.methods int9"),
        ({"compress": {"methods": ["int8", "magnitude"]}}, "compress.methods magnitude"),
        ({"compress": {"methods": ["layers:keep=99"]}}, "compress.methods layers"),
        (
            {
                "export": [{"folder": "out", "format": "gguf"}],
                "model": {"architecture": "gemma"},
            },
            "export.0.format gguf",
        ),
        ({"export": [{"folder": "out", "license": "@"}]}, "export.0.license"),
        ({"export": [{"folder": "out", "sign": "none.pem"}]}, "export.0.sign"),
        ({"export": [{"folder": "TAKEN"}]}, "export.0.folder = TAKEN"),
        ({"serve": {"host": "0.0.0.0"}}, "serve.host 0.0.0.0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tiny_corpus: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DRAY_SERVE_KEY", raising=False)
    (tmp_path / "TAKEN").mkdir()
    (tmp_path / "TAKEN" / "file").touch()
    spec = dray.make_spec(whole_tree(tiny_corpus, tmp_path / "out", **changes))
    with pytest.raises((SpecError, StoreError)) as caught:
        release(spec, storage=str(tmp_path / "runs"))
    assert caught.value.where == where
    assert not (tmp_path / "runs").exists()


def test_a_stage_that_the_spec_does_not_have_is_refused(tiny_corpus: Path, tmp_path: Path) -> None:
    spec = dray.make_spec(tiny_tree(tiny_corpus))
    assert spec.stages == ("prepare", "train")
    with pytest.raises(SpecError, match="is no stage of this spec; it has prepare, train"):
        release(spec, storage=str(tmp_path / "runs"), until="export")


def test_sections_of_a_release_are_places(tiny_corpus: Path, tmp_path: Path) -> None:
    bare, whole = tiny_tree(tiny_corpus), whole_tree(tiny_corpus, tmp_path)
    whole |= {"validation": bare["validation"]}
    assert dray.make_spec(bare).fingerprint() == dray.make_spec(whole).fingerprint()
    assert {"evaluate", "compress", "export", "serve"}.isdisjoint(dray.make_spec(bare).model_dump())


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"evaluate": {"gate": {"f1": 1}}}, "evaluate.gate.f1: causal_lm has loss"),
        ({"compress": {"methods": "int8", "max_drop": {"loss": -1}}}, "compress.max_drop.loss"),
        ({"compress": {"methods": "int8", "max_drop": {"loss": "5 %"}}}, "compress.max_drop.loss"),
        ({"export": [{"folder": "{name}"}]}, "it may have {run} and {step}"),
        ({"export": [{"folder": "a"}, {"folder": "a"}]}, "two are written to a"),
        ({"compress": None}, "serve.of = compressed: nothing is compressed"),
    ],
)
def test_sections_of_a_release_are_checked(
    tiny_corpus: Path, tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    tree = whole_tree(tiny_corpus, tmp_path, serve={"of": "compressed"}) | changes
    with pytest.raises(SpecError) as caught:
        dray.make_spec(tree)
    assert what in str(caught.value)
