"""Where a run goes on, and when it must ask first."""

from __future__ import annotations

import math

import pytest

from dray.errors import CheckpointsLost
from dray.runs import Run, choose_checkpoint, find_resume_checkpoint, fork_run
from dray.storage.filesystem import delete_folder
from sharded_model import PLAN, make_test_spec, save


def test_a_run_that_never_committed_begins(local_run: Run) -> None:
    assert find_resume_checkpoint(local_run) is None
    local_run.begin_attempt(2, 0)
    local_run.begin_attempt(2, 0)
    assert find_resume_checkpoint(local_run) is None


def test_a_run_does_not_begin_again_when_all_is_set_aside(run: Run) -> None:
    run.begin_attempt(2, 0)
    older, newer = save(run, 10), save(run, 20)
    run.set_aside(newer, "a bit flipped")
    assert find_resume_checkpoint(run) == older
    run.set_aside(older, "another one")
    with pytest.raises(
        CheckpointsLost,
        match=r"step 20: set aside: a bit flipped; step 10: "
        r".*--run",
    ):
        find_resume_checkpoint(run)


def test_a_run_whose_files_are_gone_had_committed_all_the_same(local_run: Run) -> None:
    local_run.begin_attempt(2, 0)
    info = save(local_run, 10)
    local_run.log_event("checkpoint", attempt=1, step=10)
    delete_folder(local_run.filesystem, info.path)
    with pytest.raises(CheckpointsLost, match="step 10: its files are gone"):
        find_resume_checkpoint(local_run)


def test_what_a_later_attempt_undid_is_no_loss(local_run: Run) -> None:
    """The second attempt began before the first one's commit came through."""
    local_run.begin_attempt(2, 0)
    save(local_run, 10)
    local_run.log_event("checkpoint", attempt=1, step=10)
    local_run.begin_attempt(2, 0)
    assert find_resume_checkpoint(local_run) is None


def test_a_fork_does_not_fall_back_to_its_origin(storage: str, run: Run) -> None:
    save(run, 10)
    fork = fork_run(storage, "speeches", "branch", make_test_spec(seed=1), PLAN)
    fork.begin_attempt(2, 10)
    assert find_resume_checkpoint(fork) == run.latest_checkpoint()
    fork.set_aside(save(fork, 20), "a bit flipped")
    with pytest.raises(CheckpointsLost, match="step 20"):
        find_resume_checkpoint(fork)


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_the_best_is_one_whose_metric_is_defined(local_run: Run, nothing: float | None) -> None:
    for step, loss in ((10, nothing), (20, 2.0), (30, 1.0), (40, nothing)):
        save(local_run, step, validation={"loss": loss})
    assert choose_checkpoint(local_run, "best").step == 30
