"""Sweeps: what a trial costs beside its training, what a driver of many trials takes, and what
searches find for what they spend: `python -m bench.sweeps [overhead] [many] [searches] [width]`.

overhead: seconds from a trial's last step to the next one's first, one trial at a time, beside
stock Ray Tune with a TorchTrainer a trial (bench/stock_tune.py), the arms in turn.
many: 200 trials that do next to nothing: the driver's memory, results a second, results lost.
searches: the loss reached against the compute spent, on ../shared/data/corpus_en: a grid of 48
points, and searches with about a tenth of its compute.
width: the losses of some rates at width 128 and at 512, with width transfer and without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from bench.report import write_section
from bench.training import CORPUS
from dray.runs import Run
from dray.sweep.events import Reported
from dray.sweep.record import Sweep
from dray.sweep.summary import load_study, summarize

ROUNDS, TRIALS, STEPS = 2, 5, 10
MANY = 200
TREE: dict[str, Any] = {
    "name": "bench",
    "data": {
        "train": [f"{CORPUS}/*.jsonl.gz"],
        "validation": {"share": 0.02},
        "sequence_tokens": 128,
    },
    "tokenizer": {"train": "byte_bpe", "vocab_size": 2048, "sample_bytes": 2_000_000},
    "model": {"architecture": "llama", "hidden_size": 64, "num_layers": 2, "num_heads": 2},
    "batch": {"global_rows": 8},
    "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1},
    "schedule": {"name": "cosine", "warmup_steps": 2},
    "duration": {"steps": STEPS},
    "precision": "fp32",
    "validation": {"max_rows": 16},
    "checkpoint": {"keep_last": 1},
    "engine": {"compile": False},
}


def run_sweep(folder: Path, name: str, tree: dict[str, Any], space: dict[str, Any]) -> Sweep:
    """A sweep in a process of its own, as a person starts it."""
    spec, file = folder / f"{name}.yaml", folder / f"{name}-space.yaml"
    spec.write_text(json.dumps(tree))
    file.write_text(json.dumps(space))
    words = ["tune", str(spec), "--space", str(file), "--storage", str(folder / "runs")]
    subprocess.run(
        [sys.executable, "-m", "dray.cli", *words, "--run", name, "--json"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return Sweep.open(str(folder / "runs"), name)


# ---- what a trial costs beside its training ----------------------------------------------------


def measure_overhead(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for workers in (1, 2):
        gaps: dict[str, list[float]] = {"dray": [], "stock Tune": []}
        for turn in range(ROUNDS):
            name = f"overhead-{workers}-{turn}"
            tree = {**TREE, "resources": {"workers": workers}}
            rates = [1e-3 * (1 + number) for number in range(TRIALS)]
            space = {
                "parameters": {"optimizer.learning_rate": {"grid": rates}},
                "search": "grid",
                "scheduler": "none",
                "concurrency": 1,
            }
            sweep = run_sweep(folder, name, tree, space)
            trials = summarize(sweep)["trials"]
            times = [_step_times(sweep.storage, trial["name"]) for trial in trials]
            gaps["dray"] += _gaps(times)
            log = folder / f"{name}.stock"
            subprocess.run(
                [
                    *(sys.executable, "-m", "bench.stock_tune"),
                    *(str(TRIALS), str(workers), str(STEPS), str(log)),
                ],
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "RAY_TRAIN_V2_ENABLED": "1"},
            )
            gaps["stock Tune"] += _gaps(_stock_times(log))
        for arm, found in gaps.items():
            rows.append(
                {
                    "workers": workers,
                    "arm": arm,
                    "median": statistics.median(found),
                    "most": max(found),
                    "trials": len(found),
                }
            )
    return rows


def _step_times(storage: str, name: str) -> list[float]:
    return [float(row["time"]) for row in Run.open(storage, name).metrics()]


def _stock_times(log: Path) -> list[list[float]]:
    found: dict[int, list[float]] = {}
    for line in log.read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["trial"], []).append(row["time"])
    return [found[trial] for trial in sorted(found)]


def _gaps(times: Sequence[Sequence[float]]) -> list[float]:
    """From the last step of one trial to the first one of the next."""
    ordered = sorted(times, key=lambda steps: steps[0])
    return [ordered[at][0] - ordered[at - 1][-1] for at in range(1, len(ordered))]


# ---- many trials -------------------------------------------------------------------------------


def measure_many(folder: Path) -> dict[str, Any]:
    """200 trials of a model that is as small as can be, validated at every step."""
    tree = {
        **TREE,
        "model": {"architecture": "llama", "hidden_size": 8, "num_layers": 1, "num_heads": 1},
        "data": {**TREE["data"], "sequence_tokens": 16},
        "tokenizer": {"train": "byte_bpe", "vocab_size": 258, "sample_bytes": 100_000},
        "batch": {"global_rows": 1},
        "duration": {"steps": 60},
        "validation": {"every_steps": 1, "max_rows": 1},
    }
    space = {
        "parameters": {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}},
        "search": "random",
        "scheduler": "none",
        "budget": {"trials": MANY},
    }
    spec, file = folder / "many.yaml", folder / "many-space.yaml"
    spec.write_text(json.dumps(tree))
    file.write_text(json.dumps(space))
    storage = str(folder / "runs")
    words = ["tune", str(spec), "--space", str(file), "--storage", storage, "--run", "many"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dray.cli", *words, "--json"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    samples: list[tuple[int, float]] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(2.0):
            sweep = Sweep.find(storage, "many")
            try:
                memory = psutil.Process(process.pid).memory_info().rss / 1e6
            except psutil.NoSuchProcess:
                return
            if sweep is not None:
                ended = sum(event.kind == "ended" for _, event in sweep.events())
                samples.append((ended, memory))

    watching = threading.Thread(target=sample, daemon=True)
    watching.start()
    assert process.wait() == 0
    over.set()
    sweep = Sweep.open(storage, "many")
    events = sweep.events()
    reports = [event for _, event in events if isinstance(event, Reported)]
    first = min(time for time, event in events if isinstance(event, Reported))
    last = max(time for time, _ in events)
    seconds = _seconds(last) - _seconds(first)
    early = [memory for ended, memory in samples if 20 <= ended <= 50]
    late = [memory for ended, memory in samples if ended >= 170]
    return {
        "trials": len(summarize(sweep)["trials"]),
        "results": len(reports),
        "lost": MANY * 60 - len(reports),
        "per_second": len(reports) / seconds,
        "seconds_a_trial": seconds / MANY,
        "memory_early_mb": statistics.median(early),
        "memory_late_mb": statistics.median(late),
    }


def _seconds(time_text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(time_text).timestamp()


# ---- searches ----------------------------------------------------------------------------------

SEARCHED: dict[str, Any] = {
    **TREE,
    "model": {"architecture": "llama", "hidden_size": 96, "num_layers": 2, "num_heads": 3},
    "duration": {"tokens": 128 * 8 * 180},
    "validation": {"max_rows": 128},
    "schedule": {"name": "cosine", "warmup_steps": 10},
}
RATES = [3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
ROWS, DECAYS = [4, 8, 16, 32], [0.01, 0.1]


def make_arms() -> dict[str, dict[str, Any]]:
    """Searches by name: the grid first."""
    free = {
        "optimizer.learning_rate": {"loguniform": [RATES[0], RATES[-1]]},
        "batch.global_rows": {"choice": ROWS},
        "optimizer.weight_decay": {"choice": DECAYS},
    }
    grid = {
        "optimizer.learning_rate": {"grid": RATES},
        "batch.global_rows": {"grid": ROWS},
        "optimizer.weight_decay": {"grid": DECAYS},
    }
    lawful = {
        **free,
        "optimizer.learning_rate": {"loguniform": [0.25, 4.0], "around": "law"},
        "batch.global_rows": {"choice": [1, 2, 4], "around": "law"},
    }
    asha = {"name": "asha", "reduction_factor": 3, "grace_steps": 20}
    cheap = {"trials": 9}
    return {
        "grid of 48": {"parameters": grid, "search": "grid", "scheduler": "none"},
        "random": {
            "parameters": free,
            "search": "random",
            "scheduler": "none",
            "budget": {"trials": 5},
        },
        "random with ASHA": {
            "parameters": free,
            "search": "random",
            "scheduler": asha,
            "budget": cheap,
        },
        "TPE with ASHA": {
            "parameters": free,
            "search": {"name": "tpe", "startup_trials": 5},
            "scheduler": asha,
            "budget": cheap,
        },
        "TPE with ASHA around the Step Law": {
            "parameters": lawful,
            "search": {"name": "tpe", "startup_trials": 5},
            "scheduler": asha,
            "budget": cheap,
        },
    }


def measure_searches(folder: Path, seeds: int) -> list[dict[str, Any]]:
    rows, grid = list[dict[str, Any]](), {}
    for arm, space in make_arms().items():
        for seed in range(1 if arm.startswith("grid") else seeds):
            search = space["search"]
            search = {"name": search} if isinstance(search, str) else search
            name = f"{arm.replace(' ', '-').lower()}-{seed}"
            chosen = {**space, "search": {**search, "seed": seed}}
            begun = time.monotonic()
            sweep = run_sweep(folder, name, SEARCHED, chosen)
            study = load_study(sweep)
            best = study.best()
            assert best is not None
            spent = sum(trial.tokens for trial in study.trials.values())
            found = {
                "arm": arm,
                "seed": seed,
                "loss": best.value,
                "tokens": spent,
                "trials": len(study.trials),
                "seconds": time.monotonic() - begun,
                "parameters": dict(best.trial.parameters),
            }
            grid = grid or found
            found["above_grid"] = best.value / grid["loss"] - 1
            found["share"] = spent / grid["tokens"]
            rows.append(found)
            print(found, file=sys.stderr, flush=True)
    return rows


# ---- widths ------------------------------------------------------------------------------------

WIDTHS, WIDTH_RATES, WIDTH_SEEDS = (128, 512), [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], 2


def measure_width(folder: Path) -> list[dict[str, Any]]:
    """The mean loss of each rate at two widths, with width transfer from the narrower and without.
    Short tokens, of which little models learn more in little time."""
    rows = []
    for transfer in (True, False):
        for width in WIDTHS:
            if width == WIDTHS[0] and not transfer:
                continue  # the base is what it is
            optimizer: dict[str, Any] = {"learning_rate": 1e-3, "weight_decay": 0.1}
            if transfer:
                optimizer["width_transfer"] = {"base_hidden_size": WIDTHS[0]}
            model = {
                "architecture": "llama",
                "hidden_size": width,
                "num_layers": 1,
                "num_heads": width // 64,
                "tie_embeddings": False,
            }
            tree = {
                **SEARCHED,
                "model": model,
                "optimizer": optimizer,
                "tokenizer": {**TREE["tokenizer"], "vocab_size": 512},
                "duration": {"steps": 200},
                "batch": {"global_rows": 8},
            }
            space = {
                "parameters": {"optimizer.learning_rate": {"grid": WIDTH_RATES}},
                "search": "grid",
                "scheduler": "none",
                "repeats": WIDTH_SEEDS,
            }
            name = f"width-{width}-{'with' if transfer else 'without'}"
            found: dict[float, list[float | None]] = {}
            for trial in summarize(run_sweep(folder, name, tree, space))["trials"]:
                rate = trial["parameters"]["optimizer.learning_rate"]
                found.setdefault(rate, []).append(trial["metrics"].get("loss"))
            for rate, seen in found.items():
                losses = [loss for loss in seen if loss is not None]
                loss = statistics.fmean(losses) if len(losses) == WIDTH_SEEDS else None
                rows.append(
                    {
                        "width": width,
                        "transfer": transfer,
                        "rate": rate,
                        "loss": loss,
                        "losses": seen,
                    }
                )
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _width_table(rows: Sequence[dict[str, Any]]) -> str:
    arms = [(128, True), (512, True), (512, False)]
    lines = [
        "| learning rate | width 128, the base | width 512, transferred | width 512, as it is |",
        "|--:|--:|--:|--:|",
    ]
    losses = {(row["width"], row["transfer"], row["rate"]): row["loss"] for row in rows}
    for rate in WIDTH_RATES:
        cells = [losses[(*arm, rate)] for arm in arms]
        shown = ["diverged" if loss is None else f"{loss:.4f}" for loss in cells]
        lines.append(f"| {rate:g} | {' | '.join(shown)} |")
    found = {
        arm: {rate: loss for rate in WIDTH_RATES if (loss := losses[(*arm, rate)]) is not None}
        for arm in arms
    }
    chosen = min(found[arms[0]], key=lambda rate: found[arms[0]][rate])
    lines.append("")
    for arm, words in ((arms[1], "transferred"), (arms[2], "as it is")):
        best = min(found[arm].values())
        above = found[arm].get(chosen, float("inf")) / best - 1
        lines.append(
            f"The best rate of the base ({chosen:g}) at width 512, {words}: {above:+.2%} above the "
            "best loss there."
        )
    return "\n".join(lines)


# ---- tables ------------------------------------------------------------------------------------


def _overhead_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| workers | arm | seconds from a trial's last step to the next one's first | most |",
        "|--:|---|--:|--:|",
    ]
    lines += [
        f"| {row['workers']} | {row['arm']} | {row['median']:.1f} | {row['most']:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def _many_table(found: dict[str, Any]) -> str:
    return (
        f"{found['trials']} trials of 60 steps, each validated: {found['results']:,} results, "
        f"{found['lost']} lost, {found['per_second']:.0f} a second, "
        f"{found['seconds_a_trial']:.2f} s a trial. The driver's memory: "
        f"{found['memory_early_mb']:.0f} MB at 20 to 50 trials, "
        f"{found['memory_late_mb']:.0f} MB from 170 on."
    )


def _search_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| search | trials | compute, of the grid's | loss reached | above the grid's best |",
        "|---|--:|--:|--:|--:|",
    ]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for arm in arms:
        found = [row for row in rows if row["arm"] == arm]
        above = [row["above_grid"] for row in found]
        spread = f" ({min(above):+.2%} to {max(above):+.2%})" if len(found) > 1 else ""
        share = statistics.median(row["share"] for row in found)
        loss = statistics.median(row["loss"] for row in found)
        lines.append(
            f"| {arm} | {found[0]['trials']} | {share:.0%} | {loss:.4f} | "
            f"{statistics.median(above):+.2%}{spread} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["overhead", "many", "searches", "width"])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-sweeps-") as place:
        folder = Path(place)
        if "overhead" in arguments.parts:
            rows = measure_overhead(folder)
            write_section("sweep-overhead", _overhead_table(rows), rows)
        if "many" in arguments.parts:
            many = measure_many(folder)
            write_section("sweep-many", _many_table(many), many)
        if "searches" in arguments.parts:
            found = measure_searches(folder, arguments.seeds)
            write_section("sweep-searches", _search_table(found), found)
        if "width" in arguments.parts:
            widths = measure_width(folder)
            write_section("width", _width_table(widths), widths)


if __name__ == "__main__":
    main()
