"""The table of docs/differential_privacy.md: what hiding each row costs on SST-2, in accuracy and
in time.

    python -m bench.private [--seeds 3] [--rounds 3]

MiniLM learns the 6,919 training sentences, all its weights or LoRA and a head alone, without
privacy and under an ε; the 872 of dev.tsv are measured after the last step. Two run at a time, on a
core each. Then come short runs, the arms in turn, for what a step costs. What is done already is
found. Reads ../shared/data and the package with MiniLM's weights; what of it is absent ends the
run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.report import ROOT, write_section
from bench.sentences import Right, Runs

RUNS = Runs("private")
PAGE = ROOT / "docs" / "differential_privacy.md"
SENTENCES, EPOCHS, ROWS = 6_919, 5, 512
STEPS = SENTENCES * EPOCHS // ROWS
PACE_STEPS, FIRST_STEPS = 6, 2
AT_ONCE = 2
LORA = {"adapters": {"name": "lora", "rank": 4}}


@dataclass(frozen=True)
class Arm:
    """What is learnt, how fast, and how well its rows are hidden."""

    words: str
    learning_rate: float
    epsilon: float | None = None
    sections: Mapping[str, Any] = field(default_factory=dict)

    def tree(self, name: str, seed: int, steps: int = STEPS) -> dict[str, Any]:
        tree = RUNS.tree(name, sentences=SENTENCES, steps=steps, rows=ROWS)
        tree |= {"seed": seed, "regularization": {"dropout": 0.0}, **self.sections}
        tree["optimizer"]["learning_rate"] = self.learning_rate
        if self.epsilon is not None:
            tree["privacy"] = {"max_grad_norm": 0.1, "epsilon": self.epsilon, "delta": 1e-5}
        return tree


ARMS: Mapping[str, Arm] = {
    "all": Arm("all weights", 1e-4),
    "all_8": Arm("all weights", 1e-3, 8),
    "lora": Arm("LoRA of rank 4 and the head", 2e-3, None, LORA),
    "lora_8": Arm("LoRA of rank 4 and the head", 5e-3, 8, LORA),
    "lora_2": Arm("LoRA of rank 4 and the head", 5e-3, 2, LORA),
}
BESIDE = {"all_8": "all", "lora_8": "lora", "lora_2": "lora"}
"""The same without privacy."""


@dataclass(frozen=True)
class Measured:
    """An arm by seed, and its seconds a step by turn."""

    accuracy: list[float]
    privacy: Mapping[str, Any] | None
    paces: list[float]


def answers(arm: str, seed: int) -> list[int]:
    """Train an arm: whether it is right, by held-out sentence."""

    def measure() -> list[int]:
        name = RUNS.train(ARMS[arm].tree(f"{arm}-{seed}", seed))
        found: Right = RUNS.right_answers(name)
        return [int(one) for one in found]

    return [*RUNS.kept(f"{arm}-{seed}", measure)]


def pace(arm: str, turn: int) -> float:
    """The seconds that a step of a short run takes, the median of all but the first ones."""

    def measure() -> float:
        tree = ARMS[arm].tree(f"pace-{arm}-{turn}", seed=0)
        del tree["data"]["validation"], tree["validation"]
        tree["duration"] = {"steps": PACE_STEPS}
        tree["schedule"] = {"name": "constant", "warmup_steps": 0}
        return RUNS.seconds_a_step(RUNS.train(tree), FIRST_STEPS)

    return float(RUNS.kept(f"pace-{arm}-{turn}", measure))


def lines(figures: Mapping[str, Measured]) -> list[str]:
    """The table."""
    found = [
        "| what is learnt | ε at δ = 1e-5 | noise | accuracy by seed | mean | time a step |",
        "|---|--:|--:|---|--:|--:|",
    ]
    for name, one in figures.items():
        arm, told = ARMS[name], one.privacy
        cells = [
            arm.words,
            "none" if told is None else f"{told['epsilon']:.3g}",
            "" if told is None else f"{told['noise_multiplier']:.2f}",
            " ".join(f"{accuracy:.1%}" for accuracy in one.accuracy),
            f"{statistics.mean(one.accuracy):.1%}",
            "1",
        ]
        if name in BESIDE:
            beside = figures[BESIDE[name]].paces
            ratios = [own / other for own, other in zip(one.paces, beside, strict=True)]
            cells[-1] = f"{statistics.median(ratios):.2f}"
        found.append(f"| {' | '.join(cells)} |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    arms = [(name, seed) for seed in range(given.seeds) for name in ARMS]
    turns = [(name, turn) for turn in range(given.rounds) for name in ARMS]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        right = dict(zip(arms, pool.map(lambda arm: answers(*arm), arms), strict=True))
        paces = dict(zip(turns, pool.map(lambda turn: pace(*turn), turns), strict=True))
    figures = {
        name: Measured(
            [float(np.mean(right[name, seed])) for seed in range(given.seeds)],
            RUNS.dray("show", f"{name}-0").get("privacy"),
            [paces[name, turn] for turn in range(given.rounds)],
        )
        for name in ARMS
    }
    write_section("private", "\n".join(lines(figures)), figures, PAGE)


if __name__ == "__main__":
    main()
