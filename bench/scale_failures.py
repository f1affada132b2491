"""Failures of a run, simulated: what is left of its time by how often it saves.

Ranks fail independently and at any time alike (exponential gaps). A save holds training up, then is
written beside it and counts once it is committed; a failure costs everything since the newest
commit, and the restart, in which ranks may fail as well.
"""

from __future__ import annotations

import random


def simulate_goodput(
    seconds: float,
    *,
    held_seconds: float,
    commit_seconds: float,
    restart_seconds: float,
    failure_seconds: float,
    num_failures: int = 2000,
    seed: int = 0,
) -> float:
    """Share of the time that went into work that counts, over so many failures, with a save after
    every `seconds` of work. `failure_seconds`: mean time between failures. The same seed gives
    every interval the same failures."""
    gaps = random.Random(seed)
    clock = counted = 0.0
    cycle = seconds + held_seconds
    for _ in range(num_failures):
        gap = gaps.expovariate(1 / failure_seconds)
        clock += gap
        # A failure in a restart begins it anew; all of this gap's time is lost then.
        at_work = gap - restart_seconds
        if at_work <= 0:
            continue
        # Save n begins at n · cycle − held, and counts once it is committed.
        committed = int((at_work - commit_seconds + held_seconds) // cycle)
        counted += max(0, committed) * seconds
    return counted / clock
