"""Seconds from the kill of a worker to the first new step, beside the stock arm: `python -m
bench.recovery`.

Both arms train one small Llama with 2 workers on ../shared/data/corpus_en, checkpoint every 10
steps, and lose a random worker to SIGKILL after step 17. The stock arm is ../shared/stock/train.py
with --max-failures 100. Steps redone are those that were done before the kill and again after it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from bench.report import write_section
from bench.training import CORPUS, ROOT, STOCK

STEPS, EVERY, KILL_AFTER = 40, 10, 17
SPEC = f"""
name: bench
data: {{train: ["{CORPUS}/*.jsonl.gz"], sequence_tokens: 128}}
tokenizer: {{train: byte_bpe, vocab_size: 2048}}
model: {{architecture: llama, hidden_size: 128, num_layers: 2, num_heads: 2}}
batch: {{global_rows: 32, micro_rows: 16}}
schedule: {{name: constant}}
duration: {{steps: {STEPS}}}
checkpoint: {{every_steps: {EVERY}}}
resources: {{workers: 2}}
zero: {{stage: 1}}
"""
Steps = list[tuple[int, float]]
"""(step, time) in the order in which they were done."""


def rank_processes(pid: int) -> list[psutil.Process]:
    """The Ray Train workers among the descendants of a process."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def read_dray_steps(run: Path) -> Steps:
    """From a run's folder; a line that is being written is left out."""
    rows = [
        json.loads(line)
        for path in sorted((run / "metrics").glob("*.jsonl"))
        for line in path.read_text().splitlines()
        if line.endswith("}")
    ]
    return sorted(((row["step"], row["time"]) for row in rows), key=lambda item: item[1])


def read_stock_steps(log: Path) -> Steps:
    lines = log.read_text().splitlines() if log.exists() else []
    return [(row["step"], row["time"]) for row in map(json.loads, lines)]


def make_stock_flags(corpora: Path, log: Path, storage: Path, steps: int) -> list[str]:
    """The stock script's flags for the model of SPEC, with the tokeniser that dray made for it."""
    tokenizer = next(corpora.glob("*/tokenizer/tokenizer.json"))
    sizes = {
        "corpus": CORPUS,
        "tokenizer": tokenizer,
        "steps": steps,
        "zero": 1,
        "micro": 16,
        "seq": 128,
        "hidden": 128,
        "layers": 2,
        "vocab": 2048,
        "checkpoint-every": EVERY,
        "max-failures": 100,
        "log": log,
        "storage": storage,
    }
    return [str(part) for key, value in sizes.items() for part in (f"--{key}", value)]


def run_and_kill(
    command: list[str], read_steps: Callable[[], Steps], **more: str
) -> tuple[Steps, float]:
    """Start a command, kill a worker of it after KILL_AFTER, wait for its end. Its steps, and the
    time of the kill."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        while max((step for step, _ in read_steps()), default=0) < KILL_AFTER:
            if process.poll() is not None:
                raise SystemExit(
                    f"{' '.join(command)} ended with {process.returncode} before the kill"
                )
            time.sleep(0.05)
        ranks = rank_processes(process.pid)
        killed = time.time()
        random.choice(ranks).send_signal(signal.SIGKILL)
        if process.wait(timeout=600):
            raise SystemExit(f"{' '.join(command)} failed after the kill")
        return read_steps(), killed
    finally:
        if process.poll() is None:
            process.kill()


def measure(steps: Steps, killed: float) -> dict[str, float]:
    """Seconds to the first step and to the first new one after the kill, and steps redone."""
    reached = max(step for step, at in steps if at <= killed)
    after = [
        (step, at) for step, at in steps if at > killed + 2
    ]  # those that were under way at the kill do not count
    again = [step for step, _ in after if step <= reached]
    return {
        "seconds_to_first_step": after[0][1] - killed,
        "steps_redone": len(again),
        "seconds_to_first_new_step": next(at for step, at in after if step > reached) - killed,
    }


def dray_arm(folder: Path, number: int) -> dict[str, float]:
    name = f"r{number}"

    command = [
        f"{sys.prefix}/bin/dray",
        "train",
        str(folder / "spec.yaml"),
        "--storage",
        str(folder / "runs"),
        "--run",
        name,
    ]
    return measure(*run_and_kill(command, lambda: read_dray_steps(folder / "runs" / name)))


def stock_arm(folder: Path, number: int) -> dict[str, float]:
    log = folder / f"stock-{number}.jsonl"
    flags = make_stock_flags(folder / "runs" / "corpora", log, folder / "stock", STEPS)
    return measure(
        *run_and_kill(
            [sys.executable, str(STOCK), *flags], lambda: read_stock_steps(log), RAY_ADDRESS="local"
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    figures: dict[str, list[dict[str, Any]]] = {"dray": [], "stock": []}
    with tempfile.TemporaryDirectory(prefix="dray-recovery-") as name:
        folder = Path(name)
        (folder / "spec.yaml").write_text(SPEC)
        subprocess.run(
            [
                f"{sys.prefix}/bin/dray",
                "prepare",
                str(folder / "spec.yaml"),
                "--storage",
                str(folder / "runs"),
            ],
            check=True,
            capture_output=True,
        )
        for number in range(rounds):
            figures["dray"].append(dray_arm(folder, number))
            figures["stock"].append(stock_arm(folder, number))
            print({arm: values[-1] for arm, values in figures.items()}, file=sys.stderr, flush=True)
    keys = list(figures["dray"][0])
    middle = {
        arm: {key: statistics.median(value[key] for value in values) for key in keys}
        for arm, values in figures.items()
    }
    lines = [
        f"{rounds} rounds, medians.\n",
        "| arm | seconds to the first step | seconds to the first new step | steps redone |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {arm} | {row['seconds_to_first_step']:.1f} | {row['seconds_to_first_new_step']:.1f} | "
        f"{row['steps_redone']:.0f} |"
        for arm, row in middle.items()
    ]
    share = (
        middle["dray"]["seconds_to_first_new_step"] / middle["stock"]["seconds_to_first_new_step"]
    )
    write_section(
        "recovery", "\n".join([*lines, "", f"dray ÷ stock, first new step: {share:.2f}."]), figures
    )


if __name__ == "__main__":
    main()
