"""After a failure: by cause, by progress, never by count alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dray.job import Job, begin_attempt
from dray.plan import local_shape, make_plan
from dray.ray_worker import _find_failed_attempt
from dray.recovery import Budget
from dray.spec import make_spec
from dray.store import Run
from tiny import tiny_tree

BATCH: dict[str, Any] = {"micro_rows": 4, "rows_per_rank": 8}


def test_failures_without_progress_end_a_run_and_progress_starts_the_count_anew():
    budget = Budget(max_failures=2)
    assert [budget.decide("killed", committed_step=10, **BATCH).retry for _ in range(3)] == [True, True, False]
    budget = Budget(max_failures=2)
    assert all(budget.decide("killed", committed_step=step, **BATCH).retry for step in range(0, 1000, 10))


def test_what_is_nobodys_fault_is_not_counted():
    budget = Budget(max_failures=0)
    assert all(budget.decide("preemption", committed_step=0, **BATCH).retry for _ in range(50))
    assert not budget.decide("code", committed_step=0, **BATCH).retry


def test_what_would_fail_again_is_not_tried_again():
    for kind in ("numerics", "configuration"):
        decision = Budget(max_failures=5).decide(kind, committed_step=0, **BATCH)
        assert not decision.retry
        assert kind in decision.reason


def test_out_of_memory_halves_the_micro_batch_until_nothing_is_left():
    budget, micro, seen = Budget(max_failures=0), 24, []
    while (decision := budget.decide("host_memory", committed_step=0, micro_rows=micro, rows_per_rank=24)).retry:
        assert decision.micro_rows is not None
        micro = decision.micro_rows
        seen.append(micro)
    assert seen == [12, 6, 3, 1]
    assert "one row" in decision.reason


def test_a_smaller_micro_batch_divides_a_ranks_rows():
    decision = Budget(max_failures=0).decide("gpu_memory", committed_step=0, micro_rows=15, rows_per_rank=15)
    assert decision.micro_rows == 5  # the greatest divisor of 15 that is at most half of it


def test_a_failure_is_that_of_the_newest_attempt_or_gets_one_of_its_own(tmp_path: Path):
    spec = make_spec(tiny_tree(tmp_path))
    plan = make_plan(spec, local_shape())
    run = Run.create(tmp_path, "failing", spec, plan.model_dump(mode="json"))
    driver = run.take_over()
    job: Any = Job(spec, plan, "", None, run.storage, run.name, driver.number)  # type: ignore[arg-type]
    assert _find_failed_attempt(run, job)["attempt"] == 1  # none was recorded
    assert _find_failed_attempt(run, job)["attempt"] == 1  # it runs by its record
    run.end_attempt(1, "failed", 0, "code")
    assert _find_failed_attempt(run, job)["attempt"] == 2  # the newest had failed before
    assert begin_attempt(job, 2)["attempt"] == 3
    run.release(driver)
    job = replace(job, driver=run.take_over().number)
    assert _find_failed_attempt(run, job)["attempt"] == 4  # the newest is an earlier driver's
    assert [attempt["attempt"] for attempt in run.attempts()] == [1, 2, 3, 4]
