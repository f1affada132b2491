"""Runs that are killed and taken up again elsewhere."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from dray.errors import RunFailed
from dray.runs import Run
from dray.spec import Spec
from dray.train import train
from waiting import rank_processes

PLACES: Sequence[tuple[int, int]] = ((2, 1), (1, 0), (2, 3))
"""Workers and ZeRO stage of each attempt."""


def killed_and_resumed(
    make: Callable[..., Spec],
    storage: str,
    name: str,
    *,
    at: Sequence[int] = (7, 14),
    places: Sequence[tuple[int, int]] = PLACES,
) -> Run:
    """A run of which a rank gets SIGKILL once it has done each of the steps `at`: every attempt in
    another place. What is killed saves each step: it is not done before the signal comes."""
    for attempt, (workers, stage) in enumerate(places):
        place: dict[str, Any] = {
            "resources": {"workers": workers, "max_failures": 0},
            "zero": {"stage": stage},
        }
        if attempt == len(at):
            return train(make(**place), storage=storage, run_name=name).run
        spec = make(**place, checkpoint={"every_steps": 1})
        killed: list[int] = []

        def kill(row: Mapping[str, Any], step: int = at[attempt], killed: Any = killed) -> None:
            if "rows_digest" in row and row["step"] >= step and not killed:
                killed.append(row["step"])
                rank_processes()[-1].send_signal(signal.SIGKILL)

        with pytest.raises(RunFailed):
            train(spec, storage=storage, run_name=name, observer=kill)
        assert killed
        assert len(Run.open(storage, name).attempts()) == attempt + 1
        assert Run.open(storage, name).checkpoints()
    raise AssertionError("a place is left for the attempt behind each kill")


def assert_same_steps(run: Run, other: Run, within: float = 1e-5) -> None:
    """That both have the same steps, of the same rows, with nearly the same losses."""
    rows, others = run.metrics(), other.metrics()
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    assert [row["rows_digest"] for row in rows] == [row["rows_digest"] for row in others]
    for row, same in zip(rows, others, strict=True):
        assert row["loss"] == pytest.approx(same["loss"], abs=within), row["step"]
