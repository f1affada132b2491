"""`python -m bench`: every benchmark, one after the other; the figures go to docs/."""

from __future__ import annotations

import subprocess
import sys

PARTS = (
    "bench.training",
    "bench.recovery",
    "bench.restore",
    "bench.corpus",
    "bench.memory",
    "bench.heap",
    "bench.parity",
    "bench.scale",
    "bench.finetuning",
    "bench.planned",
    "bench.sweeps",
    "bench.ladder",
)

if __name__ == "__main__":
    for part in PARTS:
        print(f"── {part}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", part], check=True)
