"""Runs the cases of the GPU benchmark one after the other, each in a process of its own, and prints
the table.

A budget of minutes fits it into calls that end after some: a case that could not end in time is
left out, and said.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu.one import SHAPES

CASE_SECONDS = 280
"""A compiled case of the largest shape: a cold compilation and thirty steps."""
GIB = 1024**3


def main() -> int:
    options = _parse()
    cases = list(itertools.product(options.shapes, options.stages, options.modes))
    deadline = time.monotonic() + 60 * options.minutes
    slowest = 0.0
    if options.profile:
        cases = [(shape, options.stages[0], options.modes[0]) for shape in options.shapes]
    else:
        print(
            "| shape | ZeRO | | tokens/s | MFU loose | MFU strict | peak | plan | measured ÷ plan |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
    failed = 0
    for done, (shape, stage, mode) in enumerate(cases):
        begun = time.monotonic()
        if begun + slowest > deadline:
            left = ", ".join(" ".join(map(str, case)) for case in cases[done:])
            print(f"left out for want of time: {left}", flush=True)
            break
        row, problem = run_case(
            shape, stage, mode, min(CASE_SECONDS, deadline - begun), profile=options.profile
        )
        slowest = max(slowest, time.monotonic() - begun)
        failed += row is None
        if row is not None and options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if row is None:
            print(f"| {shape} | {stage} | {mode} | {problem} | | | | | |", flush=True)
        elif options.profile:
            print(f"{shape}, ZeRO {stage}, {mode}:\n{row['profile']}", flush=True)
        else:
            print(
                f"| {shape} | {stage} | {mode} | {row['tokens_per_second']:,.0f} | "
                f"{row['mfu']:.1%} | {row['mfu_strict']:.1%} | {row['peak_bytes'] / GIB:.2f} GiB "
                f"| {row['planned_bytes'] / GIB:.2f} GiB | "
                f"{row['peak_bytes'] / row['planned_bytes']:.2f} |",
                flush=True,
            )
    return 1 if failed else 0


def run_case(
    shape: str, stage: int, mode: str, seconds: float, *, profile: bool
) -> tuple[dict[str, Any] | None, str]:
    """What the case's process printed, or why there is nothing; its last words go to stderr."""
    command = [
        sys.executable,
        "-m",
        "bench.gpu.one",
        shape,
        str(stage),
        mode,
        *(["profile"] if profile else []),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return None, f"over {seconds:.0f} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        print(done.stderr[-1500:], file=sys.stderr)
        return None, "failed"
    return json.loads(lines[-1]), ""


def _parse() -> argparse.Namespace:
    known = [name for name in SHAPES if name != "tiny"]
    parser = argparse.ArgumentParser(prog="bench/gpu/run.sh")
    parser.add_argument("shapes", nargs="*", default=[], metavar="SHAPE", help=", ".join(known))
    parser.add_argument(
        "--stages",
        type=lambda text: [int(stage) for stage in text.split(",")],
        default=[0, 1, 2, 3],
    )
    parser.add_argument("--modes", type=lambda text: text.split(","), default=["eager", "compiled"])
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--smallest", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add each case's figures to it")
    options = parser.parse_args()
    unknown = (
        (set(options.shapes) - set(known))
        | (set(options.modes) - {"eager", "compiled"})
        | (set(options.stages) - {0, 1, 2, 3})
    )
    if unknown:
        parser.error(f"unknown: {', '.join(map(str, unknown))}")
    options.shapes = options.shapes or known
    if options.smallest:
        options.shapes, options.modes = ["tiny"], ["eager"]
    return options


if __name__ == "__main__":
    sys.exit(main())
