"""What stands between the ranks and their driver: records and heartbeats one way, wishes the other.

An actor on the head node holds one (`posting.build_mailbox`). Nothing here grows with the number of
ranks but what the driver takes away: a beat costs the same in a group of ten thousand.
"""

from __future__ import annotations

import time

from dray.plan.speed import CALLS_A_SECOND
from dray.runs.records import Beat, RankFailure, Report

Beats = dict[int, tuple[Beat, float]]
"""Rank → its last heartbeat, and the seconds since it arrived."""
FEW_RANKS, LOOK_SECONDS = 64, 1.0
"""Beats of more ranks than that are given to the driver once in so many seconds: a hang takes far
longer to tell."""


def pace(seconds: float, num_ranks: int) -> float:
    """How often a rank of so many should speak, if `seconds` is what it would do in a small group:
    an actor takes some thousand calls a second, whoever sends them."""
    return max(seconds, num_ranks / CALLS_A_SECOND)


class Mailbox:
    """Takes what ranks send, and gives it to the driver when that asks."""

    def __init__(self) -> None:
        self._records: list[Report] = []
        self._beats: Beats = {}
        self._failures: list[RankFailure] = []
        self._stop, self._notice = False, False
        self._received = self._stored = self._judged = self._num_left = self._attempt = 0
        self._looked_at = -LOOK_SECONDS

    # ---- for the ranks --------------------------------------------------------------------------

    def put(self, records: list[Report]) -> tuple[bool, bool]:
        """Take a rank's records. Returns whether it should stop, and whether its group is to be
        dissolved."""
        self._records += records
        self._received += len(records)
        return self._stop, self._notice

    def unstored(self, since: int | None) -> tuple[int, bool]:
        """How many records have come (or `since`), and whether the driver has stored that many."""
        since = self._received if since is None else since
        return since, self._stored >= since

    def beat(self, beat: Beat) -> None:
        """Take a rank's heartbeat; one of a newer attempt ends what is known of the one before."""
        attempt = beat.attempt
        if attempt <= self._judged or attempt < self._attempt:
            return  # late, of a group that is over: it must not look like a hang
        if attempt > self._attempt:
            self._attempt = attempt
            self._beats.clear()
        self._beats[beat.rank] = beat, time.monotonic()

    def fail(self, failure: RankFailure) -> None:
        """Take a rank's last words."""
        self._failures.append(failure)
        self._num_left += 1

    def leave(self, rank: int) -> None:
        """A rank is done."""
        self._beats.pop(rank, None)
        self._num_left += 1

    # ---- for the driver and for Ray Train's controller ------------------------------------------

    def evidence(self) -> tuple[list[RankFailure], Beats]:
        """What failed ranks said since the last call, and the beats, which are forgotten."""
        failures, self._failures = self._failures, []
        beats = self._aged()
        if beats:
            self._judged = self._attempt
        self._beats.clear()
        self._notice, self._num_left = False, 0
        return failures, beats

    def give_notice(self) -> None:
        """Let all ranks save and leave."""
        self._notice = True

    def num_left(self) -> int:
        """How many ranks have left since the last `evidence`."""
        return self._num_left

    def take(self, stored: int) -> tuple[list[Report], Beats | None]:
        """The records since the last call, for the driver, who has stored so many of those before;
        and the beats, empty where no rank has said anything. Those of a large group do not come at
        every call: then None."""
        self._stored = stored
        records, self._records = self._records, []
        if len(self._beats) > FEW_RANKS and time.monotonic() - self._looked_at < LOOK_SECONDS:
            return records, None
        self._looked_at = time.monotonic()
        return records, self._aged()

    def request_stop(self) -> None:
        """A person wants the run to stop."""
        self._stop = True

    def _aged(self) -> Beats:
        now = time.monotonic()
        return {rank: (beat, now - at) for rank, (beat, at) in self._beats.items()}
