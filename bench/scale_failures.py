"""Failures of a run, simulated: what is left of its time by how often it saves. A section of
bench.scale, and a table of bench.scale_page.

Ranks fail independently and at any time alike (exponential gaps), as often as Llama 3's did. A save
holds training up, then is written beside it and counts once it is committed; a failure costs
everything since the newest commit, and the restart, in which ranks may fail as well.

What saves and restarts take is measured on CPUs where it says so, and assumed for the sizes that no
machine here has.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bench.report import Check
from dray.plan import FailureRate, SaveInterval, choose_interval, format_bytes, format_seconds
from dray.plan.speed import hold_seconds, write_seconds

MINUTES = (1, 5, 15, 30, 60, 240)
NUM_FAILURES = 4000
SHARED_STORAGE = 200e9
"""Bytes a second that a storage takes of all ranks together: assumed. A rank alone writes what
`plan.speed.WRITE_RATE` says, measured on a local disk."""


@dataclass(frozen=True)
class Case:
    """A run at a size. What is not here follows from the plan's rates."""

    num_ranks: int
    num_parameters: float
    """Of a checkpoint of 12 bytes each."""
    restart_seconds: float
    """Assumed: processes, NCCL, reading the checkpoint back, a compiled model from its cache. On
    two CPU ranks 8 to 10 s are measured (bench.recovery)."""

    @property
    def checkpoint_bytes(self) -> float:
        return 12 * self.num_parameters

    def costs(self) -> dict[str, float]:
        """Seconds, as `choose_interval` takes them."""
        share = self.checkpoint_bytes / self.num_ranks
        return {
            "held_seconds": hold_seconds(share, self.num_ranks, on_gpu=True),
            "commit_seconds": max(write_seconds(share), self.checkpoint_bytes / SHARED_STORAGE),
            "restart_seconds": self.restart_seconds,
            "failure_seconds": FailureRate().mean_seconds(self.num_ranks),
        }


CASES = (
    Case(8, 1.3e9, 60.0),
    Case(64, 7e9, 90.0),
    Case(512, 70e9, 180.0),
    Case(10_000, 405e9, 600.0),
)
LLAMA_3 = Case(16_384, 405e9, 600.0)
"""Of which more than 90 % effective training time are reported."""


def simulate_goodput(
    seconds: float,
    *,
    held_seconds: float,
    commit_seconds: float,
    restart_seconds: float,
    failure_seconds: float,
    num_failures: int = NUM_FAILURES,
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


def simulate(case: Case) -> tuple[SaveInterval, float, dict[int, float]]:
    """The interval that `checkpoint: auto` takes, its goodput, and that of other intervals, in
    minutes."""
    costs = case.costs()
    chosen = choose_interval(**costs)
    return (
        chosen,
        simulate_goodput(chosen.seconds, **costs),
        {minutes: simulate_goodput(60.0 * minutes, **costs) for minutes in MINUTES},
    )


def measure_failures(_: argparse.Namespace) -> Iterator[Check]:
    """The chosen interval beside others, at four sizes; and Llama 3's own run."""
    for case in CASES:
        chosen, goodput, others = simulate(case)
        best = max(others.values())
        yield Check(
            f"goodput of {case.num_ranks:,} ranks, a failure every "
            f"{format_seconds(chosen.failure_seconds)}: saves every "
            f"{', '.join(map(str, MINUTES))} minutes; auto",
            "auto within 0.2 points of the best",
            f"{', '.join(f'{share:.2%}' for share in others.values())}; "
            f"{goodput:.2%} ({format_seconds(chosen.seconds)})",
            goodput > best - 0.002,
        )
    chosen, goodput, _others = simulate(LLAMA_3)
    yield Check(
        "goodput of Llama 3's 16,384 GPUs, saves as auto takes them",
        "> 90 %, as reported",
        f"{goodput:.1%} ({format_seconds(chosen.seconds)})",
        goodput > 0.9,
    )


def make_table() -> tuple[str, list[Mapping[str, Any]]]:
    """Markdown, and the figures behind it."""
    minutes = [f"{minute} min" for minute in MINUTES]
    lines = [
        "| ranks | checkpoint | held up, committed, restarted after | a failure every | "
        f"{' | '.join(minutes)} | `auto` |",
        "|--:|--:|---|--:|" + "--:|" * (len(minutes) + 1),
    ]
    figures: list[Mapping[str, Any]] = []
    for case in (*CASES, LLAMA_3):
        chosen, goodput, others = simulate(case)
        shares = [f"{share:.2%}" for share in others.values()]
        lines.append(
            f"| {case.num_ranks:,} | {format_bytes(case.checkpoint_bytes)} | "
            f"{chosen.held_seconds:.2g} s, {chosen.commit_seconds:.2g} s, "
            f"{chosen.restart_seconds:.0f} s | {format_seconds(chosen.failure_seconds)} | "
            f"{' | '.join(shares)} | {goodput:.2%} at {format_seconds(chosen.seconds)} |"
        )
        figures.append(
            {**asdict(case), **chosen.model_dump(), "simulated": goodput, "others": others}
        )
    return "\n".join(lines), figures
