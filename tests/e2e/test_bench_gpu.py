"""The GPU benchmark's one command, with its smallest shape on this CPU: what breaks here would
break on the GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*options: str) -> str:
    done = subprocess.run(
        ["bash", "bench/gpu/run.sh", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_smallest_shape_runs_under_every_stage():
    rows = [line.split("|") for line in run("--smallest").splitlines() if line.startswith("| tiny")]
    assert [row[2].strip() for row in rows] == ["0", "1", "2", "3"]
    assert all(float(row[4].replace(",", "")) > 0 for row in rows)  # tokens/s


@pytest.mark.slow
def test_it_profiles_and_says_what_time_did_not_allow():
    assert "aten::" in run("--smallest", "--profile", "--stages", "1")
    assert "left out for want of time: tiny 0 eager, tiny 3 eager" in run(
        "--smallest", "--stages", "0,3", "--minutes", "-1"
    )


def test_its_checks_hold_on_this_cpu_too():
    told = run("--checks", "shape", "loss", "saves").splitlines()
    assert [line.split(" (")[0] for line in told] == ["shape holds", "loss holds", "saves holds"]
