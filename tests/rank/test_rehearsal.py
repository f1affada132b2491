"""Rehearsals: thin copies of a model are timed by the engine in real processes, kept, and used by
the plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dray.cli import main
from dray.errors import PlanError
from dray.plan import local_shape, make_plan, parse_shape, with_measured_step
from dray.rank.rehearsal import RAY_SHARE, Rehearsal, _extend, find_rehearsal, rehearse
from dray.spec import make_spec

TREE = {
    "name": "x",
    "data": {"train": "x", "sequence_tokens": 32},
    "tokenizer": {"train": "byte_bpe", "vocab_size": 300},
    "model": {"architecture": "llama", "hidden_size": 32, "num_layers": 7, "num_heads": 2},
    "batch": {"global_rows": 16, "micro_rows": 4},
    "duration": {"steps": 100},
    "precision": "fp32",
    "resources": {"workers": 2},
    "zero": {"stage": 3},
    "engine": {"compile": False},
}


def test_a_model_is_the_straight_line_through_its_thin_copies() -> None:
    assert _extend([2.0, 4.0], 3) == 4.0
    assert _extend([2.0, 4.0], 11) == pytest.approx(12.0)
    assert _extend([2.0, 1.9], 11) == 2.0  # a block costs no less than nothing


def test_a_step_is_its_micro_batches_and_the_update() -> None:
    assert Rehearsal(2.0, 3.0).step_seconds(1) == pytest.approx(3.0 / RAY_SHARE)
    assert Rehearsal(2.0, 3.0).step_seconds(4) == pytest.approx(9.0 / RAY_SHARE)


def test_a_rehearsal_is_kept_for_its_sizes_and_goes_into_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = make_spec(TREE, "x")
    plan = make_plan(spec, local_shape())
    assert find_rehearsal(spec, plan) is None
    found = rehearse(spec, plan)
    assert 0 < found.micro_seconds < 60
    assert 0 < found.last_seconds < 60
    assert find_rehearsal(spec, plan) == found
    deeper = make_spec(TREE | {"model": {**TREE["model"], "num_layers": 9}}, "x")  # type: ignore[dict-item]
    wider = make_spec(TREE | {"model": {**TREE["model"], "hidden_size": 64}}, "x")  # type: ignore[dict-item]
    assert find_rehearsal(wider, make_plan(wider, local_shape())) is None
    assert (
        find_rehearsal(deeper, make_plan(deeper, local_shape())) is None
    )  # of another depth: another line

    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(TREE), encoding="utf-8")
    assert main(["plan", str(path), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["step_measured"]
    assert planned["step_seconds"] == pytest.approx(found.step_seconds(2))
    assert main(["plan", str(path)]) == 0
    assert "measured on this machine" in capsys.readouterr().out


def test_a_kept_rehearsal_that_is_damaged_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = make_spec(TREE, "x")
    plan = make_plan(spec, local_shape())
    from dray.rank.rehearsal import _place

    place = _place(spec, plan)
    place.parent.mkdir(parents=True)
    for text in ("", "[]", '{"micro_seconds": 1}', "\0"):
        place.write_text(text, encoding="utf-8")
        assert find_rehearsal(spec, plan) is None


def test_only_what_is_here_can_be_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spec = make_spec(TREE | {"resources": {"workers": 2, "gpus_per_worker": 1}}, "x")
    with pytest.raises(PlanError, match="run on GPUs"):
        rehearse(spec, make_plan(spec, parse_shape("1x2xH100")))
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(TREE), encoding="utf-8")
    assert main(["plan", str(path), "--measure", "--shape", "1xCPU(cpus=4,memory=64GB)"]) == 2
    assert "is not this machine" in capsys.readouterr().err


def test_a_measured_step_moves_the_estimate() -> None:
    plan = make_plan(make_spec(TREE, "x"), local_shape())
    slower = with_measured_step(plan, 60.0)
    assert slower.est_seconds is not None
    assert slower.est_seconds > 100 * 60
    assert slower.step_measured
