"""The table of docs/methods.md: what each method against overfitting gains on SST-2 beside the
plain run, over three seeds, with its interval and its cost in time.

    python -m bench.methods [--only fgm swap …] [--seeds 3] [--rounds 3]
    python -m bench.methods --together

MiniLM learns the first 800 of SST-2's training sentences, few enough that it overfits; the 872 of
dev.tsv are measured after the last step. Each seed trains the plain run and every method once, by
`dray train`, two at a time on a core each. Then come short runs, two at a time too and the methods
in turn, for what a step costs. What is done already is found. `--together`: a sweep of the plain
run's learning rate, and its best three as an ensemble and as a soup beside the best alone. Reads
../shared/data, the package with MiniLM's weights and Debian's mythes-en-us; what of it is absent
ends the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import yaml

from bench.report import ROOT, write_section
from bench.sentences import Right, Runs

RUNS = Runs("methods")
PAGE = ROOT / "docs" / "methods.md"
RULES = ROOT / "bench" / "sst2_rules.yaml"
THESAURUS = "/usr/share/mythes/th_en_US_v2.dat"
SENTENCES, EPOCHS, ROWS = 800, 5, 32
STEPS = SENTENCES * EPOCHS // ROWS
PACE_STEPS = 20
AT_ONCE = 2
DRAWS = 2000


@dataclass(frozen=True)
class Method:
    """A method, as overrides of the plain spec."""

    words: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    weights: str = "trained"


def regularized(words: str, **settings: Any) -> Method:
    return Method(words, {"regularization": {"dropout": 0.1, **settings}})


def augmented(words: str, *kinds: str, **settings: Any) -> Method:
    thesaurus = {"thesaurus": THESAURUS} if {"synonyms", "insertion"} & {*kinds} else {}
    return Method(words, {"augmentation": {"kinds": list(kinds), **thesaurus, **settings}})


def ruled(words: str, **settings: Any) -> Method:
    """The rules of docs/labelling.md in the loss."""
    kept = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    constraints = {"labels": kept["labels"], "rules": kept["rules"], **settings}
    return Method(words, {"task": {"name": "sequence_classification", "constraints": constraints}})


# MiniLM's embeddings and gradients are small: FGM with ε = 0.5 taught nothing, nor did noise of
# η = 1e-4 let anything be learnt (50.9 % after 125 steps).
PLAIN = "plain"
METHODS: Mapping[str, Method] = {
    PLAIN: Method("dropout 0.1, decoupled weight decay 0.01"),
    "no_dropout": Method("no dropout", {"regularization": {"dropout": 0.0}}),
    "more_dropout": Method("dropout 0.2", {"regularization": {"dropout": 0.2}}),
    "label_smoothing": regularized("label smoothing 0.1", label_smoothing=0.1),
    "l1": regularized("L1 penalty 1e-5", l1=1e-5),
    "l2": regularized("L2 penalty 1e-3", l2=1e-3),
    "max_norm": regularized("max-norm 2", max_norm=2.0),
    "gradient_noise": regularized("noise on gradients, η 1e-8", gradient_noise={"eta": 1e-8}),
    "stochastic_depth": regularized("stochastic depth 0.1", stochastic_depth=0.1),
    "ema": Method(
        "EMA of the weights, decay 0.95",
        {"regularization": {"dropout": 0.1, "ema": {"decay": 0.95}}},
        "ema",
    ),
    "swa": Method(
        "SWA of every fifth step of the last 40 %",
        {"regularization": {"dropout": 0.1, "swa": {"first_step": 75, "every_steps": 5}}},
        "swa",
    ),
    "r_drop": regularized("R-Drop, weight 1", r_drop=1.0),
    "fgm": regularized("FGM, ε 0.05", adversarial={"name": "fgm", "epsilon": 0.05}),
    "pgd": regularized(
        "PGD, ε 0.05, 3 steps",
        adversarial={"name": "pgd", "epsilon": 0.05, "step_size": 0.02, "steps": 3},
    ),
    "freelb": regularized(
        "FreeLB, ε 0.05, 3 steps",
        adversarial={"name": "freelb", "epsilon": 0.05, "step_size": 0.02, "steps": 3},
    ),
    "smart": regularized("SMART", adversarial={"name": "smart"}),
    "synonyms": augmented("synonyms of half the rows", "synonyms"),
    "eda": augmented("EDA of half the rows", "synonyms", "insertion", "swap", "deletion"),
    "keyboard": augmented("slips of the keyboard in half the rows", "keyboard"),
    "ocr": augmented("misread print in half the rows", "ocr"),
    "token_cutoff": augmented("token cutoff in half the rows", "token_cutoff"),
    "span_masking": augmented("span masking in half the rows", "span_masking"),
    "rules": ruled("eight rules in the loss, share 0.3", share=0.3),
}


def make_tree(method: str, name: str, seed: int) -> dict[str, Any]:
    plain = RUNS.tree(name, sentences=SENTENCES, steps=STEPS, rows=ROWS)
    return {**plain, "seed": seed, **METHODS[method].overrides}


def answers(method: str, seed: int) -> list[int]:
    """Train an arm: whether it is right, by held-out row."""

    def measure() -> list[int]:
        name = RUNS.train(make_tree(method, f"{method}-{seed}", seed))
        return RUNS.right_answers(name, METHODS[method].weights).astype(int).tolist()

    return RUNS.kept(f"{method}-{seed}", measure)


def pace(method: str, turn: int) -> float:
    """The seconds that a step of a short run takes, the median of all but the first ones."""

    def measure() -> float:
        tree = make_tree(method, f"pace-{method}-{turn}", seed=0)
        del tree["data"]["validation"], tree["validation"]
        tree["duration"] = {"steps": PACE_STEPS}
        tree["schedule"] = {"name": "constant", "warmup_steps": 0}
        averaged = tree["regularization"].get("swa")
        if averaged:
            averaged = {"first_step": 5, "every_steps": 5}
            tree["regularization"] = {**tree["regularization"], "swa": averaged}
        return RUNS.seconds_a_step(RUNS.train(tree))

    return RUNS.kept(f"pace-{method}-{turn}", measure)


def gain(own: Sequence[Right], plain: Sequence[Right]) -> tuple[float, float, float]:
    """The mean difference in accuracy, and its 95 % interval: seeds and rows are drawn again, those
    of both arms together."""
    differences = np.stack(own) - np.stack(plain)  # [seeds, rows]
    drawn = np.random.default_rng(0)
    seeds, rows = differences.shape
    found = [
        differences[drawn.integers(0, seeds, seeds)][:, drawn.integers(0, rows, rows)].mean()
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(found, [0.025, 0.975]).tolist()
    return float(differences.mean()), low, high


@dataclass(frozen=True)
class Measured:
    """One method's arms: by seed and row, whether it is right; by turn, the seconds a step."""

    right: Sequence[Right]
    paces: Sequence[float]


def lines(figures: Mapping[str, Measured]) -> list[str]:
    """The table."""
    found = [
        "| method | settings | accuracy by seed | gain | 95 % interval | time a step | verdict |",
        "|---|---|---|--:|---|--:|---|",
    ]
    plain = figures[PLAIN]
    for name, arms in figures.items():
        accuracies = " ".join(f"{one.mean():.1%}" for one in arms.right)
        cells = [f"`{name}`", METHODS[name].words, accuracies]
        if name == PLAIN:
            cells += ["", "", "1", ""]
        else:
            mean, low, high = gain(arms.right, plain.right)
            cost = statistics.median(
                own / beside for own, beside in zip(arms.paces, plain.paces, strict=True)
            )
            verdict = "helps" if low > 0 else "harms" if high < 0 else "not shown to help"
            cells += [f"{mean:+.2%}", f"{low:+.2%} to {high:+.2%}", f"{cost:.2f}", verdict]
        found.append(f"| {' | '.join(cells)} |")
    return found


def together(trials: int = 6, best: int = 3) -> None:
    """A sweep of the plain run, and what its best trials are together."""
    spec, space = RUNS.folder / "swept.yaml", RUNS.folder / "space.yaml"
    spec.write_text(json.dumps(make_tree(PLAIN, "swept", seed=0)), encoding="utf-8")
    tried = {
        "parameters": {"optimizer.learning_rate": {"loguniform": [2e-5, 2e-4]}},
        "search": {"name": "random", "seed": 0},
        "scheduler": {"name": "none"},
        "budget": {"trials": trials},
    }
    space.write_text(json.dumps(tried), encoding="utf-8")
    RUNS.dray("tune", str(spec), "--space", str(space), "--run", "swept")
    words = ["--sweep", "swept", "--best", str(best), "--ensemble"]
    name = f"swept-soup-{datetime.now():%H%M%S}"
    found = RUNS.dray("soup", *words, "--name", name)["ensemble"]
    lines = ["| model | accuracy | against the best alone | 95 % interval |", "|---|--:|--:|---|"]
    for one in found["models"]:
        cells = [one["name"], f"{one['metrics']['accuracy']:.2%}", "", ""]
        if (other := found["against_best"].get(one["name"])) is not None:
            apart = other["accuracy"]
            cells[2:] = [
                f"{apart['difference']:+.2%}", f"{apart['low']:+.2%} to {apart['high']:+.2%}"
            ]  # fmt: skip
        elif one["name"] == found["best"]:
            cells[2] = "the best alone"
        lines.append(f"| {' | '.join(cells)} |")
    write_section("together", "\n".join(lines), found, PAGE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--together", action="store_true")
    given = parser.parse_args()
    if given.together:
        together()
        return
    names = [name for name in METHODS if name == PLAIN or name in given.only]
    arms = [(name, seed) for seed in range(given.seeds) for name in names]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        right = dict(zip(arms, pool.map(lambda arm: answers(*arm), arms), strict=True))
        turns = [(name, turn) for turn in range(given.rounds) for name in names]
        paces = dict(zip(turns, pool.map(lambda turn: pace(*turn), turns), strict=True))
    figures = {
        name: Measured(
            [np.array(right[name, seed], np.float64) for seed in range(given.seeds)],
            [paces[name, turn] for turn in range(given.rounds)],
        )
        for name in names
    }
    write_section("methods", "\n".join(lines(figures)), figures, PAGE)


if __name__ == "__main__":
    main()
