"""After a failure: by cause, by progress, never by count alone."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dray.doctor import classify
from dray.doctor.budget import MAX_NODE_LOSSES, Budget, SmallerBatch
from dray.errors import Cause, LossSpike
from dray.plan import local_shape, make_plan
from dray.rank.job import Job, begin_attempt, make_attempt
from dray.rank.pulse import Pulse
from dray.runs import CheckpointWriter, Driver, Run, create_run, make_fragment_key
from dray.runs.evidence import make_rank_failure
from dray.runs.records import Failure
from dray.spec import make_spec
from dray.train.recovery import _find_failed_attempt, _find_spike, _make_failure
from tiny import tiny_tree

BATCH: dict[str, Any] = {"micro_rows": 4, "rows_per_rank": 8}


def test_failures_without_progress_end_a_run_and_progress_starts_the_count_anew():
    budget = Budget(max_failures=2)
    assert [budget.decide(Cause.KILLED, committed_step=10, **BATCH).retry for _ in range(3)] == [
        True,
        True,
        False,
    ]
    budget = Budget(max_failures=2)
    assert all(
        budget.decide(Cause.KILLED, committed_step=step, **BATCH).retry
        for step in range(0, 1000, 10)
    )


def test_what_is_nobodys_fault_is_not_counted():
    budget = Budget(max_failures=0)
    assert all(budget.decide(Cause.PREEMPTION, committed_step=0, **BATCH).retry for _ in range(50))
    assert not budget.decide(Cause.CODE, committed_step=0, **BATCH).retry


def test_what_would_fail_again_is_not_tried_again():
    for kind in (Cause.NUMERICS, Cause.CONFIGURATION):
        decision = Budget(max_failures=5).decide(kind, committed_step=0, **BATCH)
        assert not decision.retry
        assert kind in decision.reason


def test_out_of_memory_halves_the_micro_batch_until_nothing_is_left():
    budget, micro, seen = Budget(max_failures=0), 24, []
    while (
        decision := budget.decide(
            Cause.HOST_MEMORY, committed_step=0, micro_rows=micro, rows_per_rank=24
        )
    ).retry:
        assert decision.micro_rows is not None
        micro = decision.micro_rows
        seen.append(micro)
    assert seen == [12, 6, 3, 1]
    assert "one row" in decision.reason


def test_a_smaller_micro_batch_divides_a_ranks_rows():
    decision = Budget(max_failures=0).decide(
        Cause.GPU_MEMORY, committed_step=0, micro_rows=15, rows_per_rank=15
    )
    assert decision.micro_rows == 5  # the greatest divisor of 15 that is at most half of it


def make_job(folder: Path) -> tuple[Run, Any, Driver]:
    """A run without a corpus, its job, and the hold on it."""
    spec = make_spec(tiny_tree(folder))
    plan = make_plan(spec, local_shape())
    run = create_run(folder, "failing", spec, plan.model_dump(mode="json"))
    driver = run.take_over()
    job = Job(spec, plan, "", None, run.storage, run.name, driver=driver.number)  # type: ignore[arg-type]
    return run, job, driver


def save(run: Run, step: int, attempt: int = 1) -> None:
    writer = CheckpointWriter(run, step, attempt)
    file = writer.write_rank(0, 1, {make_fragment_key("w", "param", 0): torch.ones(4)})
    writer.commit([file], {"shapes": {"w": [4]}})


def test_a_failure_is_that_of_the_newest_attempt_or_gets_one_of_its_own(tmp_path: Path):
    run, job, driver = make_job(tmp_path)
    assert _find_failed_attempt(run, job).number == 1  # none was recorded
    assert _find_failed_attempt(run, job).number == 1  # it runs by its record
    run.end_attempt(1, "failed", 0, "code")
    assert _find_failed_attempt(run, job).number == 2  # the newest had failed before
    assert begin_attempt(job, 2).number == 3
    run.release(driver)
    job = replace(job, driver=run.take_over().number)
    assert _find_failed_attempt(run, job).number == 4  # the newest is an earlier driver's
    assert [attempt.number for attempt in run.attempts()] == [1, 2, 3, 4]


def test_an_attempt_that_was_resized_is_not_relabelled(tmp_path: Path):
    run, job, _ = make_job(tmp_path)
    assert begin_attempt(job, 2).number == 1
    run.end_attempt(1, "resized", 3)
    assert _find_failed_attempt(run, job).number == 2
    assert [attempt.status for attempt in run.attempts()] == ["resized", ""]


def test_nodes_that_go_without_progress_end_a_run():
    budget = Budget(max_failures=0)
    decisions = [
        budget.decide(Cause.NODE_LOSS, committed_step=10, **BATCH)
        for _ in range(MAX_NODE_LOSSES + 1)
    ]
    assert [decision.retry for decision in decisions] == [True] * MAX_NODE_LOSSES + [False]
    assert "checkpoint.every_minutes" in decisions[-1].reason
    budget = Budget(max_failures=0)
    assert all(
        budget.decide(Cause.NODE_LOSS, committed_step=step, **BATCH).retry
        for step in range(0, 500, 10)
    )


def test_one_spike_of_memory_does_not_halve_a_run_for_ever(tmp_path: Path):
    run, job, _ = make_job(tmp_path)

    def run_out(committed: int) -> None:
        before = SmallerBatch.from_record(run.record())
        run.update(
            **SmallerBatch.after(
                before, before.micro_rows // 2 if before else 4, committed
            ).to_record()
        )

    run_out(0)
    assert begin_attempt(job, 2).micro_rows == 4
    run_out(0)  # and again, before anything was committed: the same shortage
    assert begin_attempt(job, 2).micro_rows == 2
    save(run, 10, attempt=run.attempts()[-1].number)
    assert begin_attempt(job, 2).micro_rows is None
    run_out(10)
    assert begin_attempt(job, 2).micro_rows == 1
    save(run, 20, attempt=run.attempts()[-1].number)
    assert begin_attempt(job, 2).micro_rows == 1, "the second time it was no accident"


def test_the_step_that_is_left_out_is_the_one_whose_loss_leapt():
    ranks = (
        make_rank_failure(0, RuntimeError("x"), step=9),
        make_rank_failure(1, LossSpike(8, "x"), step=8),
    )
    failure = Failure(1, 9, 0, "exception", ranks)
    assert _find_spike(failure) == 8


@pytest.mark.parametrize(("share", "cause"), [(0.99, Cause.HOST_MEMORY), (0.5, Cause.KILLED)])
def test_a_rank_that_was_killed_on_a_full_node_ran_out_of_memory(
    tmp_path: Path, local_ray: None, share: float, cause: Cause
):
    """The kernel kills without a word: the last heartbeat tells how full the node was."""
    import ray

    @ray.remote(num_cpus=0, max_restarts=0)
    class Rank:
        def die(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ray.exceptions.ActorDiedError) as died:
        ray.get(Rank.remote().die.remote())
    run, job, _ = make_job(tmp_path)
    attempt = make_attempt(job, begin_attempt(job, job.plan.num_ranks))
    here = ray.get_runtime_context().get_node_id()
    beat = replace(Pulse(0).beat(here, "10.0.0.7"), attempt=1, step=4, memory_share=share)
    failure = _make_failure(run, attempt, [], {0: (beat, 0.1)}, {0: died.value}, noticed=False)
    assert (failure.step, failure.detected_by) == (4, "worker_exit")
    assert classify(failure.to_json()) is cause
