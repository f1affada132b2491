"""When rank 0's clock says that a checkpoint is due: after a time that the spec gives, or after the
one by which saves and failures together cost the least.

The other ranks are told at the next step's agreement and have no clock of their own, so all save at
the same step whatever was measured where.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from dray.plan import FIRST_SECONDS, FailureRate, Plan, SaveInterval, choose_interval
from dray.runs import Run
from dray.runs.uptime import RECENT, Uptime, make_uptime
from dray.spec import Checkpoint

TOLD_AGAIN = 2.0
"""An interval that has changed by such a factor since it was told is told again."""


class Cadence:
    """One attempt's clock of saves."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        planned: SaveInterval | None,
        uptime: Uptime,
        num_ranks: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`checkpoint` has minutes, or `auto`; `planned`: what is gone by until something has been
        measured; `uptime`: what the run's earlier attempts have seen."""
        self._minutes = checkpoint.every_minutes
        self._uptime, self._num_ranks, self._clock = uptime, num_ranks, clock
        self._planned = planned or choose_interval(
            held_seconds=0.0,
            commit_seconds=0.0,
            restart_seconds=0.0,
            failure_seconds=FailureRate().mean_seconds(num_ranks),
        )
        self._held, self._committed = list(uptime.held), list(uptime.committed)
        self._begun = clock()
        self._told = uptime.told
        self._is_measured = bool(uptime.told and uptime.held)
        """Whether what was told last had been measured."""
        self._chosen = self._choose()

    @property
    def is_auto(self) -> bool:
        return self._minutes == 0

    @property
    def seconds(self) -> float:
        """Between two saves."""
        return self._chosen.seconds if self.is_auto else 60 * (self._minutes or 0.0)

    def is_due(self, saved_at: float) -> bool:
        """Whether the save before, at this time of the clock, is long enough ago."""
        return self._clock() - saved_at > self.seconds

    def learn(self, held_seconds: float, committed_seconds: float) -> None:
        """Take in how long a save held training up, and how long it took until it was
        committed."""
        self._held = [*self._held, held_seconds][-RECENT:]
        self._committed = [*self._committed, committed_seconds][-RECENT:]
        self._chosen = self._choose()

    def news(self) -> dict[str, Any] | None:
        """What an event should tell of the interval: when it is first known, first measured, and
        when it has changed by much. None else, and where it is the spec's."""
        seconds, told, is_measured = self.seconds, self._told, bool(self._held)
        if not self.is_auto or (
            told is not None
            and is_measured == self._is_measured
            and max(seconds, told) < TOLD_AGAIN * min(seconds, told)
        ):
            return None
        self._told, self._is_measured, rate = seconds, is_measured, self._rate()
        return {
            **self._chosen.model_dump(),
            "measured": is_measured,
            "num_ranks": self._num_ranks,
            "failures": rate.failures,
            "rank_hours": rate.rank_hours,
        }

    def _rate(self) -> FailureRate:
        """With the hours of this attempt, in which nothing has failed yet."""
        hours = self._num_ranks * (self._clock() - self._begun) / 3600
        seen = self._uptime.rate
        return FailureRate(seen.failures, seen.rank_hours + hours)

    def _choose(self) -> SaveInterval:
        """By the median of the newest saves, since a storage may stall once."""
        planned, restarts = self._planned, self._uptime.restarts
        return choose_interval(
            held_seconds=median(self._held) if self._held else planned.held_seconds,
            commit_seconds=median(self._committed) if self._committed else planned.commit_seconds,
            restart_seconds=median(restarts) if restarts else planned.restart_seconds,
            failure_seconds=self._rate().mean_seconds(self._num_ranks),
            **({} if self._held else {"most_seconds": FIRST_SECONDS}),
        )


def build_cadence(
    run: Run, checkpoint: Checkpoint, plan: Plan, attempt: int, rank: int
) -> Cadence | None:
    """The clock of an attempt's saves; none on ranks other than 0, and where no minutes are
    given."""
    if rank or checkpoint.every_minutes is None:
        return None
    uptime = Uptime()
    if checkpoint.every_minutes == 0:
        uptime = make_uptime(run.attempts(), run.events(), attempt)
    return Cadence(checkpoint, plan.save_interval, uptime, plan.num_ranks)
