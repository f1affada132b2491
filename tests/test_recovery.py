"""After a failure: by cause, by progress, never by count alone."""

from __future__ import annotations

from typing import Any

from dray.recovery import Budget

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
