"""Tells a run that hangs from one that is slow, by the ranks' heartbeats; pure, so that a test need
not wait.

A rank's heart beats in a thread of its own. A rank without beats is stopped, dead or holds the
interpreter's lock; ranks that all beat but have stood in one phase for many times a step's duration
wait for each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dray.runs.records import Beat
from dray.spec import Watchdog as Settings

PATIENT_PHASES = frozenset({"start", "build", "restore", "save", "data"})
"""Phases whose length has nothing to do with a step's: imports, compilation, storage."""


AFTER_PATIENCE_SECONDS = 300.0


def agreement_seconds(settings: Settings) -> float:
    """How long ranks may wait for an agreement: longer than anything here is waited for, so that
    what ends a hang is the watchdog, who names the rank at fault, and not a timeout in the ranks
    that wait for it."""
    return settings.patient_seconds + AFTER_PATIENCE_SECONDS


@dataclass(frozen=True)
class Hang:
    """Ranks that hold up the others, and what shows it."""

    ranks: tuple[int, ...]
    reason: str


def find_hang(
    beats: Mapping[int, tuple[Beat, float]], step_seconds: float | None, settings: Settings
) -> Hang | None:
    """The hang that the beats show, if they show one.

    `beats`: rank → its last beat and the seconds since it arrived. `step_seconds`: a usual step's,
    once it is known.
    """
    silent = tuple(
        rank
        for rank, (beat, age) in sorted(beats.items())
        if age > (settings.long_silence_seconds if beat.long else settings.silent_seconds)
    )
    if silent:
        beat, age = beats[silent[0]]
        return Hang(
            silent,
            f"no sign of life from rank {silent[0]} for {age:.0f} s; its last was in {beat.phase} "
            f"of step {beat.step}",
        )
    standing = {rank: beat.seconds + age for rank, (beat, age) in beats.items()}
    if not standing or any(
        seconds < _limit(beats[rank][0], step_seconds, settings)
        for rank, seconds in standing.items()
    ):
        return None
    behind = _furthest_behind([beat for beat, _ in beats.values()])
    beat = beats[behind[0]][0]
    return Hang(
        behind,
        f"no rank has moved for {min(standing.values()):.0f} s; rank {behind[0]} is the furthest "
        f"behind, in {beat.phase} of step {beat.step}",
    )


def _limit(beat: Beat, step_seconds: float | None, settings: Settings) -> float:
    if beat.phase in PATIENT_PHASES or beat.long or step_seconds is None:
        return settings.patient_seconds
    return max(settings.stuck_seconds, settings.stuck_steps * step_seconds)


def _furthest_behind(beats: Sequence[Beat]) -> tuple[int, ...]:
    """Ranks that the others wait for: at the lowest step, and there those that stand outside of
    what is common."""
    lowest = min(beat.step for beat in beats)
    late = [beat for beat in beats if beat.step == lowest]
    phases = [beat.phase for beat in late]
    rarest = min(phases, key=lambda phase: (phases.count(phase), phases.index(phase)))
    return tuple(sorted(beat.rank for beat in late if beat.phase == rarest))
