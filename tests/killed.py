"""A run of which a rank is killed, and which goes on with another number of workers."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from dray.errors import RunFailed
from dray.runs import Run
from dray.spec import Spec
from dray.train import train
from waiting import rank_processes


def killed_and_resumed(make: Callable[..., Spec], storage: str, name: str) -> Run:
    """Two ranks under ZeRO 1, one of which gets SIGKILL in the middle; then one rank without
    ZeRO."""
    done: list[int] = []

    def kill(row: Mapping[str, Any]) -> None:
        if "rows_digest" in row and row["step"] >= 7 and not done:
            done.append(row["step"])
            rank_processes()[-1].send_signal(signal.SIGKILL)

    places = {"workers": 2, "max_failures": 0}
    with pytest.raises(RunFailed):
        train(
            make(resources=places, zero={"stage": 1}),
            storage=storage,
            run_name=name,
            observer=kill,
        )
    assert done
    assert Run.open(storage, name).checkpoints()
    return train(
        make(resources={"workers": 1}, zero={"stage": 0}), storage=storage, run_name=name
    ).run


def assert_same_steps(run: Run, other: Run, within: float = 1e-5) -> None:
    """That both have the same steps, of the same rows, with nearly the same losses."""
    rows, others = run.metrics(), other.metrics()
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    assert [row["rows_digest"] for row in rows] == [row["rows_digest"] for row in others]
    for row, same in zip(rows, others, strict=True):
        assert row["loss"] == pytest.approx(same["loss"], abs=within), row["step"]
