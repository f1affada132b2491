"""Which checkpoints are kept: never too few, never the wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from sharded_model import PLAN, make_test_spec, save

from dray.store import Run, apply_retention, verify_checkpoint
from dray.store.filesystem import list_folders


def steps_of(run: Run) -> list[int]:
    return [info.step for info in run.checkpoints()]


def test_keep_last(run: Run) -> None:
    for step in (10, 20, 30):
        save(run, step)
    deleted = apply_retention(run, keep_last=2)
    assert [path.rpartition("/")[2] for path in deleted] == ["step-00000010-a0001"]
    assert steps_of(run) == [20, 30]
    assert all(verify_checkpoint(run, info).ok for info in run.checkpoints())
    assert apply_retention(run, keep_last=2) == []
    assert list_folders(run.filesystem, f"{run.path}/checkpoints") == ["step-00000020-a0001", "step-00000030-a0001"]


@pytest.mark.parametrize(("metric", "values", "kept"), [
    ("loss", {10: 1.0, 20: 3.0, 30: 2.0, 40: 4.0}, [10, 30, 40]),
    ("accuracy", {10: 0.1, 20: 0.9, 30: 0.2, 40: 0.3}, [20, 40]),
    ("loss", {10: float("nan"), 20: 3.0, 30: 2.0, 40: 4.0}, [20, 30, 40]),
    ("loss", {40: 4.0}, [40]),
    ("perplexity", {10: 1.0, 20: 3.0}, [10, 20, 40]),
])
def test_keep_best(local_run: Run, metric: str, values: dict[int, float], kept: list[int]) -> None:
    for step in (10, 20, 30, 40):
        save(local_run, step, **({"validation": {metric: values[step]}} if step in values else {}))
    apply_retention(local_run, keep_last=1, keep_best=2, metric=metric)
    assert steps_of(local_run) == kept


def test_best_by_the_validation_rows(local_run: Run) -> None:
    attempt = local_run.begin_attempt(1, 0)
    for step, loss in ((10, 3), (20, 1), (30, 2)):
        # What a checkpoint carries may stem from an earlier validation; the row of its own step counts.
        save(local_run, step, validation={"loss": 9.0}, validation_step=10)
        local_run.log_metrics([{"kind": "validation", "step": step, "attempt": attempt, "loss": loss}])
    apply_retention(local_run, keep_last=1, keep_best=1)
    assert steps_of(local_run) == [20, 30]


def test_validation_of_another_step_does_not_count(local_run: Run) -> None:
    save(local_run, 10, validation={"loss": 1.0}, validation_step=10)
    save(local_run, 20, validation={"loss": 1.0}, validation_step=10)
    assert [info.metrics for info in local_run.checkpoints()] == [{"loss": 1.0}, {}]


def test_unsound_ones_go_only_when_a_newer_sound_one_is_there(local_run: Run) -> None:
    save(local_run, 10)
    for step in (20, 40):
        Path(save(local_run, step).path, "COMMITTED").unlink()
    apply_retention(local_run, keep_last=1)
    assert [info.step for info in local_run.checkpoints(verified_only=False)] == [10, 20, 40]
    save(local_run, 30)
    apply_retention(local_run, keep_last=1)
    assert [info.step for info in local_run.checkpoints(verified_only=False)] == [30, 40], "40 may be in the writing"


def test_nothing_sound_nothing_deleted(local_run: Run) -> None:
    Path(save(local_run, 10).path, "manifest.json").unlink()
    assert apply_retention(local_run, keep_last=1) == []
    with pytest.raises(ValueError, match="keep_last 0"):
        apply_retention(local_run, keep_last=0)


def test_what_a_fork_started_from_is_kept(storage: str, run: Run) -> None:
    save(run, 10)
    fork = Run.fork(storage, "speeches", "branch", make_test_spec(seed=1), PLAN)
    for step in (20, 30):
        save(run, step)
        apply_retention(run, keep_last=1)
    assert steps_of(run) == [10, 30]
    found = fork.latest_checkpoint()
    assert found is not None
    assert verify_checkpoint(fork, found).ok
