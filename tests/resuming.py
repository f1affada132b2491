"""Runs that are killed and taken up again elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil
import pytest

from dray.errors import RunFailed
from dray.runs import Run
from dray.spec import make_spec
from dray.train.driver import train
from waiting import rank_processes, wait_for


def rows_of(run: Run) -> list[tuple[int, str, float]]:
    """Step, digest of the rows and loss of each step."""
    return [(row["step"], row["rows_digest"], row["loss"]) for row in run.metrics()]


def kill_and_resume(
    tree: Mapping[str, Any], storage: str, name: str, step: int, workers: int
) -> Run:
    """Kill the ranks of the run once they have done the step and saved one, and finish it with
    other workers. Up to then it has a row a micro batch, so that it does not end before."""

    def reached() -> bool:
        run = Run.find(storage, name)
        steps = [row["step"] for row in run.metrics()] if run else []
        return bool(steps and steps[-1] >= step and run and run.checkpoints())

    def kill() -> None:
        wait_for(reached, f"step {step}")
        for process in rank_processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    slow = {
        **tree,
        "resources": {**tree["resources"], "max_failures": 0},
        "batch": {**tree["batch"], "micro_rows": 1},
    }
    with pytest.raises(RunFailed):
        train(make_spec(slow), storage=storage, run_name=name)
    killer.join()
    # As an elastic group of that size: it may leave some slots of a step empty.
    elsewhere = {**tree, "resources": {**tree["resources"], "workers": [workers, workers]}}
    run = train(make_spec(elsewhere), storage=storage, run_name=name).run
    assert {row["num_ranks"] for row in run.metrics()} == {tree["resources"]["workers"], workers}
    return run


def assert_same_steps(found: Run, expected: Run, rel: float = 1e-5) -> None:
    """That two runs read the same rows and lost the same on them, nearly."""
    pairs = list(zip(rows_of(found), rows_of(expected), strict=True))
    assert [(one[:2]) for one, _ in pairs] == [other[:2] for _, other in pairs]
    for one, other in pairs:
        assert one[2] == pytest.approx(other[2], rel=rel), one[0]
