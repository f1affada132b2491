"""Which jobs are worth beginning anew: those that were ended from outside, and not again and again.

A run goes on from its newest checkpoint, and a driver that still lives elsewhere gives it up to the
newer one: so it costs nothing to begin a job that may be at work behind a broken network.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from dray.jobs.server import Job

SOON_SECONDS = 120.0
MOST_SOON = 3
"""A job that is lost so many times in a row, each within SOON_SECONDS, would be lost again."""
_KILLED = 128 + 9
_TERMINATED = 128 + 15


def lost_by(job: Job) -> str:
    """What ended a job from outside, in words; empty: it ended by its own words, or was stopped."""
    if job.status != "FAILED":
        return ""
    code = job.exit_code
    if code is None:
        return job.message.strip().partition("\n")[0][:200] or "nobody knows how it ended"
    if code < 0 or code in (_KILLED, _TERMINATED):
        number = -code if code < 0 else code - 128
        return f"its driver was ended by signal {number}"
    return ""


class Restarts:
    """Counts jobs that were lost soon after they began."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began, self._soon = clock, clock(), 0

    def lost(self) -> bool:
        """One was lost; whether another one may be begun."""
        now = self._clock()
        self._soon = self._soon + 1 if now - self._began < SOON_SECONDS else 0
        self._began = now
        return self._soon < MOST_SOON
