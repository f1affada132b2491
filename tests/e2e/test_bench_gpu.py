"""The GPU benchmark's one command, with its smallest shape on this CPU: what breaks here would break on the GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_smallest_shape_runs_under_every_stage():
    done = subprocess.run(["bash", "bench/gpu/run.sh", "--smallest"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHON": sys.executable}, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| tiny")]
    assert [row[2].strip() for row in rows] == ["0", "1", "3"]
    assert all(float(row[4].replace(",", "")) > 0 for row in rows)  # tokens/s
