"""The table of docs/differential_privacy.md: what hiding each row costs in time and memory.

    python -m bench.private [--rounds 3]
    python -m bench.private --learn

MiniLM learns SST-2's training sentences for a few steps: all its weights, LoRA and a head, or its
head alone, each without privacy and with it. One run at a time, the arms in turn. `--learn`: two
passes over all sentences by the head alone, with and without, measured on the 872 of dev.tsv. What
is done already is found. Reads ../shared/data and the package with MiniLM's weights; what of it is
absent ends the run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from typing import Any

from bench.report import ROOT, write_section
from bench.sentences import Runs

RUNS = Runs("private")
PAGE = ROOT / "docs" / "differential_privacy.md"
SENTENCES, ROWS, STEPS, FIRST_STEPS = 6_919, 64, 5, 1
LEARNT: Mapping[str, Mapping[str, Any]] = {
    "all weights": {},
    "LoRA of rank 4, and the head": {"adapters": {"name": "lora", "rank": 4}},
    "the head": {"freezing": {"body": True}},
}
PRIVACY = {"privacy": {"epsilon": 8}}


def measure(learnt: str, is_private: bool, turn: int) -> dict[str, float]:
    """Seconds a step, the median of all but the first, and the greatest memory of the rank."""
    number = list(LEARNT).index(learnt)
    name = f"{'private' if is_private else 'plain'}-{number}-{turn}"

    def run() -> dict[str, float]:
        from dray.runs import Run

        tree = RUNS.tree(name, sentences=SENTENCES, steps=STEPS, rows=ROWS)
        del tree["data"]["validation"], tree["validation"]
        tree |= {"schedule": {"name": "constant", "warmup_steps": 0}, **LEARNT[learnt]}
        RUNS.train(tree | (PRIVACY if is_private else {}))
        rows = Run.open(RUNS.storage, name).metrics()
        return {
            "seconds": RUNS.seconds_a_step(name, FIRST_STEPS),
            "bytes": max(row["memory_bytes_max"] for row in rows),
        }

    return dict(RUNS.kept(name, run))


def learn(is_private: bool) -> float:
    """The share of sentences that the head tells right after two passes in batches of 512."""
    name = f"{'private' if is_private else 'plain'}-learnt"

    def run() -> float:
        tree = RUNS.tree(name, sentences=SENTENCES, steps=26, rows=512)
        tree["optimizer"]["learning_rate"] = 1e-2
        RUNS.train(tree | LEARNT["the head"] | (PRIVACY if is_private else {}))
        return float(RUNS.right_answers(name).mean())

    return float(RUNS.kept(name, run))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--learn", action="store_true")
    given = parser.parse_args()
    if given.learn:
        plain, private = (learn(is_private) for is_private in (False, True))
        line = f"The head of MiniLM told {plain:.1%} right without privacy, {private:.1%} with it."
        write_section("private learning", line, {"plain": plain, "private": private}, PAGE)
        return
    figures = {
        (turn, learnt): [measure(learnt, is_private, turn) for is_private in (False, True)]
        for turn in range(given.rounds)
        for learnt in LEARNT
    }
    lines = [
        "| what is learnt | a step, beside the same without privacy | memory without | with |",
        "|---|--:|--:|--:|",
    ]
    for learnt in LEARNT:
        turns = [figures[turn, learnt] for turn in range(given.rounds)]
        ratio = statistics.median(own["seconds"] / plain["seconds"] for plain, own in turns)
        memory = [statistics.median(one[arm]["bytes"] for one in turns) / 1e6 for arm in (0, 1)]
        lines.append(f"| {learnt} | {ratio:.1f} | {memory[0]:,.0f} MB | {memory[1]:,.0f} MB |")
    kept = {f"{learnt}, round {turn}": found for (turn, learnt), found in figures.items()}
    write_section("private", "\n".join(lines), kept, PAGE)


if __name__ == "__main__":
    main()
