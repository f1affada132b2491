"""Runs that are killed: a process of its own trains, and gets SIGKILL behind a checkpoint."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

from dray.runs import Run
from dray.spec import Spec
from waiting import wait_for

_TRAIN = """
import json, sys
from dray.spec import make_spec
from dray.train import train_locally
tree, storage, name = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
train_locally(make_spec(tree), storage=storage, run_name=name)
"""


def train_and_kill(spec: Spec, storage: str, name: str, step: int) -> int:
    """Train with one rank on a corpus that is prepared, and kill that once a checkpoint of `step`
    is there. Returns the newest one's step."""
    tree = json.dumps(spec.model_dump(mode="json"))
    with subprocess.Popen([sys.executable, "-c", _TRAIN, tree, storage, name]) as process:

        def is_there() -> bool:
            assert process.poll() is None, "it has ended by itself"
            run = Run.find(storage, name)
            return run is not None and any(kept.step >= step for kept in run.checkpoints())

        try:
            wait_for(is_there, f"a checkpoint of step {step}")
        finally:
            process.send_signal(signal.SIGKILL)
    return max(kept.step for kept in Run.open(storage, name).checkpoints())


def history(run: Run) -> list[tuple[Any, ...]]:
    """Each step with the digest of its rows."""
    return [(row["step"], row["rows_digest"]) for row in run.metrics()]


def losses(run: Run) -> list[float]:
    return [row["loss"] for row in run.metrics()]
