"""What a run's own records say of how long its ranks worked, how often they failed, and what saves
and restarts took: the history of all its attempts, so that a run that goes on keeps what it has
measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dray.errors import Cause, StoreError
from dray.plan import FailureRate, format_seconds
from dray.runs.records import AttemptRecord, finite

if TYPE_CHECKING:
    from dray.runs.run import Run

RECENT = 9
"""So many of the newest saves and restarts are kept."""
SAVED, RESTARTED, INTERVAL = "checkpoint", "restarted", "save_interval"
"""Kinds of events."""


@dataclass(frozen=True)
class Uptime:
    """What was seen by the end of some attempts. Times in seconds."""

    rate: FailureRate = field(default_factory=FailureRate)
    held: tuple[float, ...] = ()
    """For how long the newest saves held training up."""
    committed: tuple[float, ...] = ()
    """How long they took until they were committed."""
    restarts: tuple[float, ...] = ()
    """From the last step before a failure to the first one after it."""
    told: float | None = None
    """The interval that was told last."""


def make_uptime(
    attempts: Sequence[AttemptRecord], events: Sequence[Mapping[str, Any]], before: int
) -> Uptime:
    """What the attempts with numbers below `before` have seen, by the run's events.

    A failure is an end by which steps were lost: of a group whose machines were taken away after it
    had saved, nothing was, and one that failed before its first step had none to lose. An attempt
    without an end was killed with its driver.
    """
    heard: dict[int, str] = {}
    for event in events:
        number = int(event.get("attempt") or 0)
        heard[number] = max(heard.get(number, ""), str(event.get("time", "")))
    following = {attempt.number: after for attempt, after in pairwise(attempts)}
    hours, failures = 0.0, 0
    for attempt in (attempt for attempt in attempts if attempt.number < before):
        ended, after = attempt.ended or heard.get(attempt.number, ""), following.get(attempt.number)
        hours += attempt.num_ranks * _hours_between(attempt.started, ended)
        failures += _has_lost(attempt, after) if attempt.status else attempt.number in heard
    kept = [event for event in events if int(event.get("attempt") or 0) < before]
    saves = [event for event in kept if event["kind"] == SAVED]
    return Uptime(
        FailureRate(failures, hours),
        held=_newest(saves, "blocked_seconds"),
        committed=_newest(saves, "seconds"),
        restarts=_newest([event for event in kept if event["kind"] == RESTARTED], "seconds"),
        told=next(iter(_newest([e for e in kept if e["kind"] == INTERVAL], "seconds")[-1:]), None),
    )


def find_interval(run: Run) -> dict[str, Any] | None:
    """What a run last told of how often it saves; none where its spec says how often."""
    try:
        is_auto = run.spec().checkpoint.every_minutes == 0
    except StoreError:  # a page about a run needs no spec
        return None
    told = [event for event in run.events() if event["kind"] == INTERVAL] if is_auto else []
    return told[-1] if told else None


def describe_interval(told: Mapping[str, Any]) -> str:
    """An event's interval, and why it is that one, in a line."""
    ranks, failures = told["num_ranks"], told["failures"]
    held = f"{told['held_seconds']:.2g} s{'' if told['measured'] else ' by the plan'}"
    seen = f" and by {failures} in its own {told['rank_hours']:.3g} rank hours" if failures else ""
    fails = format_seconds(told["failure_seconds"])
    return (
        f"every {format_seconds(told['seconds'])} (auto: a save holds training up for {held}; a "
        f"group of {ranks} is expected to fail every {fails} by a published "
        f"rate{seen}; {told['goodput']:.2%} of the time counts then)"
    )


def _has_lost(attempt: AttemptRecord, after: AttemptRecord | None) -> bool:
    if attempt.status != "failed" or (attempt.end_step or 0) <= attempt.start_step:
        return False
    saved = after is not None and after.start_step >= (attempt.end_step or 0)
    return not (saved and attempt.reason == Cause.PREEMPTION)


def _newest(events: Sequence[Mapping[str, Any]], name: str) -> tuple[float, ...]:
    found = (finite(event.get(name)) for event in events)
    return tuple(value for value in found if value is not None)[-RECENT:]


def _hours_between(begun: str, ended: str) -> float:
    """Of two times as records have them; 0 where one is missing, or is none."""
    try:
        span = datetime.fromisoformat(ended) - datetime.fromisoformat(begun)
    except ValueError:
        return 0.0
    return max(0.0, span.total_seconds() / 3600)
