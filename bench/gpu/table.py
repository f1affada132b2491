"""Runs the cases of the GPU benchmark one after the other, each in a process of its own, and prints the table."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

from bench.gpu.one import SHAPES

STAGES = (0, 1, 3)
CASE_SECONDS = 280


def main() -> int:
    smallest = "--smallest" in sys.argv
    shapes = ["tiny"] if smallest else [name for name in sys.argv[1:] if name in SHAPES] or list(SHAPES)[1:]
    modes = ("eager",) if smallest else ("eager", "compiled")
    print("| shape | ZeRO | | tokens/s | MFU loose | MFU strict | peak | plan | measured ÷ plan |")
    print("|---|---|---|---|---|---|---|---|---|")
    failed = 0
    for shape, stage, mode in itertools.product(shapes, STAGES, modes):
        command = [sys.executable, "-m", "bench.gpu.one", shape, str(stage), mode]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=CASE_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            print(f"| {shape} | {stage} | {mode} | over {CASE_SECONDS} s | | | | | |", flush=True)
            failed += 1
            continue
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            print(f"| {shape} | {stage} | {mode} | failed | | | | | |", flush=True)
            print(done.stderr[-1500:], file=sys.stderr)
            failed += 1
            continue
        row = json.loads(lines[-1])
        gib = 1024**3
        print(f"| {shape} | {stage} | {mode} | {row['tokens_per_second']:,.0f} "
              f"| {row['mfu']:.1%} | {row['mfu_strict']:.1%} | {row['peak_bytes'] / gib:.2f} GiB "
              f"| {row['planned_bytes'] / gib:.2f} GiB | {row['peak_bytes'] / row['planned_bytes']:.2f} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
