"""What a run's records say of its failures and its saves."""

from __future__ import annotations

from typing import Any

import pytest

from dray.plan import FailureRate
from dray.runs.records import AttemptRecord
from dray.runs.uptime import Uptime, describe_interval, make_uptime


def attempt(number: int, begun: int, ended: int | None, **fields: Any) -> AttemptRecord:
    """One of 4 ranks, on a day whose hours are given."""
    times = {"started": f"2026-11-28T{begun:02}:00:00.000+00:00"}
    if ended is not None:
        times["ended"] = f"2026-11-28T{ended:02}:00:00.000+00:00"
    known = {"start_step": 10, "end_step": 20, "status": "failed"} if ended is not None else {}
    return AttemptRecord(number, **({"num_ranks": 4, "start_step": 10} | known | times | fields))


def event(kind: str, number: int, hour: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "attempt": number,
        "time": f"2026-11-28T{hour:02}:30:00.000+00:00",
        **fields,
    }


def test_failures_and_hours() -> None:
    attempts = [
        attempt(1, 0, 2, reason="killed"),
        attempt(2, 2, 3, status="resized", start_step=10),
        attempt(3, 3, 4, reason="code", end_step=10),  # it never got to a step
        attempt(4, 4, 5, reason="preemption", end_step=20),  # saved before it was taken away
        attempt(5, 5, 6, start_step=20, reason="preemption", end_step=30),  # not saved
        attempt(6, 6, None, start_step=20),  # killed with its driver: last heard of at 8:30
        attempt(7, 9, 12),
    ]
    events = [event("ready", 6, 6), event("checkpoint", 6, 8), event("ready", 7, 9)]
    found = make_uptime(attempts, events, before=7)
    assert found.rate == FailureRate(failures=3, rank_hours=4 * (2 + 1 + 1 + 1 + 1 + 2.5))
    assert make_uptime(attempts, [], before=1) == Uptime()


def test_an_attempt_that_nobody_heard_of_is_no_failure() -> None:
    found = make_uptime([attempt(1, 0, None), attempt(2, 1, None)], [], before=2)
    assert found.rate == FailureRate(0, 0.0)


def test_what_saves_and_restarts_took() -> None:
    events = [event("checkpoint", 1, blocked_seconds=float(n), seconds=10.0 + n) for n in range(12)]
    events += [
        event("checkpoint", 2, blocked_seconds=99.0, seconds=99.0),
        event("checkpoint_failed", 1, blocked_seconds=50.0, seconds=50.0),
        event("restarted", 1, seconds=7.0),
        event("save_interval", 1, seconds=300.0),
        event("save_interval", 1, seconds=200.0),
    ]
    found = make_uptime([], events, before=2)
    assert found.held == tuple(float(n) for n in range(3, 12))
    assert found.committed == tuple(10.0 + n for n in range(3, 12))
    assert (found.restarts, found.told) == ((7.0,), 200.0)


@pytest.mark.parametrize(("measured", "by"), [(True, "0.5 s;"), (False, "0.5 s by the plan;")])
def test_an_interval_in_words(measured: bool, by: str) -> None:
    told = {
        "seconds": 2400.0,
        "held_seconds": 0.5,
        "measured": measured,
        "num_ranks": 8,
        "failures": 1,
        "rank_hours": 1234.5,
        "failure_seconds": 7200.0,
        "goodput": 0.98765,
    }
    text = describe_interval(told)
    assert text.startswith("every 40 min (auto: a save holds training up for")
    assert by in text
    assert "fail every 2 h 0 min" in text
    assert "a published rate and by 1 in its own 1.23e+03 rank hours; 98.77%" in text
