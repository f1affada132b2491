"""Which rank holds up the others: from stacks, heartbeats and step times. Pure.

In a hang all ranks but the culprit wait in a collective. In a slow run all wait for the slowest, so
only the forward passes, in which none waits (below ZeRO-3), tell it from the others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dray.doctor.cases import (
    COLLECTIVE_TIMEOUT,
    DEVICE_FILE,
    GROUP_FILE,
    LOOP_FILE,
    OWN_FILE,
    make_seconds,
    make_whole,
    parse_frames,
)

Frame = tuple[str, int, str]

SLOW_RATIO = 2.0
SLOW_STEPS, FEWEST_STEPS, SLOW_SHARE = 20, 8, 0.8
"""A straggler is slow in most of the last steps: one slow step is a hiccup."""

_THREAD = re.compile(
    r"^(?:Current thread|Thread) 0x[0-9a-f]+[^\n]*\(most recent call first\):$", re.M
)
_COLLECTIVE = re.compile(
    r"/torch/distributed/(?:distributed_c10d|c10d_logger)|/deepspeed/comm/"
    rf"|/ray/train/(?:v2/)?.*collective|/{re.escape(GROUP_FILE)}"
    rf"|/{re.escape(DEVICE_FILE)}"
)  # a GPU's queue stands still where its next collective waits
_FOREIGN = re.compile(r"/(?:site|dist)-packages/|/lib/python3|^<|/importlib/")


def make_loop_stack(dump: str) -> tuple[Frame, ...]:
    """The stack of the thread that trains, innermost first, from a faulthandler dump.

    Ray runs the loop in a thread of its own, known by dray's frames; else it is the dump's last
    thread, the main one. Of several dumps in a row the last one counts.
    """
    stacks = [frames for part in _THREAD.split(dump)[1:] if (frames := parse_frames(part))]
    training = [
        frames for frames in stacks if any(file.endswith(LOOP_FILE) for file, _, _ in frames)
    ]
    return (training or stacks or [()])[-1]


def innermost_own(stack: Sequence[Frame]) -> Frame | None:
    """The innermost frame of dray or of user code; else the innermost of all."""
    own = [frame for frame in stack if OWN_FILE.search(frame[0]) or not _FOREIGN.search(frame[0])]
    return next(iter([*own, *stack]), None)


def in_collective(stack: Sequence[Frame]) -> bool:
    """Whether a stack waits for other ranks."""
    return any(_COLLECTIVE.search(file) for file, _, _ in stack)


@dataclass(frozen=True)
class Stall:
    """Ranks that hold up the others, the sign that shows it, and where the first of them stands."""

    ranks: tuple[int, ...]
    sign: str
    frame: Frame | None = None
    phase: str = ""
    step: int | None = None


def find_stall(
    stacks: Mapping[int, str],
    beats: Mapping[int, Mapping[str, Any]],
    *,
    named: Sequence[int] = (),
    ended: Sequence[int] = (),
    num_ranks: int = 0,
) -> Stall | None:
    """The ranks that the others wait for. `named`: ranks that a collective or the watchdog missed;
    `ended`: ranks that were ended when the hang was found.

    Signs, by their weight: a rank was named; it left no stack, so it was stopped; it stands outside
    of the collective that the others wait in; its stack is unlike all others; it was ended; it is
    furthest behind; its heartbeat is the oldest.
    """
    found = {rank: make_loop_stack(text) for rank, text in stacks.items() if text.strip()}
    every = set(range(num_ranks)) | set(stacks) | set(beats)
    for ranks, sign in _signs(found, beats, every, named, ended):
        if ranks and (len(ranks) < len(every) or sign == NAMED):
            return _stall(sorted(ranks), sign, found, beats)
    return None


NAMED = "the others missed it"


def _signs(
    found: Mapping[int, tuple[Frame, ...]],
    beats: Mapping[int, Mapping[str, Any]],
    every: set[int],
    named: Sequence[int],
    ended: Sequence[int],
) -> list[tuple[set[int], str]]:
    waiting = {rank for rank, stack in found.items() if in_collective(stack)}
    own = {
        rank: (frame[0], frame[2])
        for rank, stack in found.items()
        if (frame := innermost_own(stack))
    }
    shared = Counter(own.values())
    odd = (
        {rank for rank, place in own.items() if shared[place] == 1}
        if max(shared.values(), default=0) > 1
        else set()
    )
    steps = {
        rank: step
        for rank, beat in beats.items()
        if (step := make_whole(beat.get("step"))) is not None
    }
    times = {
        rank: time
        for rank, beat in beats.items()
        if (time := make_seconds(beat.get("time"))) is not None
    }
    lowest, oldest = min(steps.values(), default=0), min(times.values(), default=0.0)
    return [
        (set(named), NAMED),
        (
            every - set(found) if found else set(),
            "it left no stack: it was stopped, or its machine is gone",
        ),
        (
            set(found) - waiting if waiting else set(),
            "it stands outside of the collective that the others wait in",
        ),
        (odd, "its stack is unlike the others'"),
        (set(ended), "it was ended when the hang was found"),
        ({rank for rank, step in steps.items() if step == lowest}, "it is the furthest behind"),
        ({rank for rank, time in times.items() if time == oldest}, "its heartbeat is the oldest"),
    ]


def _stall(
    ranks: Sequence[int],
    sign: str,
    found: Mapping[int, tuple[Frame, ...]],
    beats: Mapping[int, Mapping[str, Any]],
) -> Stall:
    beat = beats.get(ranks[0], {})
    return Stall(
        tuple(ranks),
        sign,
        innermost_own(found.get(ranks[0], ())),
        str(beat.get("phase") or ""),
        make_whole(beat.get("step")),
    )


def missing_ranks(text: str) -> tuple[int, ...]:
    """The ranks that a collective's timeout says never came."""
    match = COLLECTIVE_TIMEOUT.search(text)
    if match is None:
        return ()
    given = match["missing"] or match["missing_list"] or ""
    return tuple(int(number) for number in re.findall(r"\d+", given))


@dataclass(frozen=True)
class Straggler:
    """A rank whose forward passes take `ratio` times as long as the mean of the others'. It is none
    where rows do not name their `slowest_rank`."""

    rank: int | None
    ratio: float
    num_steps: int


def find_straggler(rows: Sequence[Mapping[str, Any]]) -> Straggler | None:
    """A rank that was slow in most of the last steps.

    A row's `forward_seconds_skew` s is (max − mean) / mean over N ranks; the mean of the others is
    then mean · (N − 1 − s) / (N − 1).
    """
    recent = [
        row
        for row in rows
        if row.get("forward_seconds_skew") is not None and row.get("num_ranks", 1) > 1
    ]
    recent = recent[-SLOW_STEPS:]
    slow = [(ratio, row) for row in recent if (ratio := _ratio(row)) > SLOW_RATIO]
    if len(recent) < FEWEST_STEPS or len(slow) < SLOW_SHARE * len(recent):
        return None
    ranks = Counter(row.get("slowest_rank") for _, row in slow)
    rank, times = ranks.most_common(1)[0]
    if times < SLOW_SHARE * len(slow):  # slow by turns: no rank of its own
        return None
    ratios = sorted(ratio for ratio, _ in slow)
    return Straggler(rank, ratios[len(ratios) // 2], len(slow))


def _ratio(row: Mapping[str, Any]) -> float:
    skew, others = float(row["forward_seconds_skew"]), int(row["num_ranks"]) - 1
    return (1 + skew) * others / max(1e-9, others - skew)


def all_wait_for_rows(beats: Mapping[int, Mapping[str, Any]], stacks: Mapping[int, str]) -> bool:
    """Whether every rank waits for its rows: then the reader stands still, not a rank."""
    phases = {str(beat.get("phase")) for beat in beats.values()}
    if phases:
        return phases == {"data"}
    found = [make_loop_stack(text) for text in stacks.values()]
    reading = re.compile(r"/ray/data/|/dray/feeding\.py$")
    return bool(found) and all(any(reading.search(file) for file, _, _ in stack) for stack in found)
