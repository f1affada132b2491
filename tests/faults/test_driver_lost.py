"""The processes around the ranks die; the run goes on, by itself or when it is started again."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from harness import Training, befalling, kill, make_case

from dray.doctor import diagnose
from dray.errors import RunFailed
from dray.runs import Run
from dray.spec import make_spec
from dray.train.driver import train
from waiting import processes_named, wait_for


@pytest.mark.slow
def test_the_driver_is_killed_and_started_again(
    storage: str, tiny_corpus: Path, undisturbed: Run, measured, tmp_path: Path
):
    """driver killed (SIGKILL), `dray train` typed again at once"""
    first = Training(make_case(tiny_corpus), storage, "driverless", tmp_path)
    first.wait_for_step(8, 300)
    ranks = first.ranks()
    kill(first.process)
    wait_for(
        lambda: not any(rank.is_running() for rank in ranks),
        "the end of the ranks that lost their driver",
    )
    second = Training(make_case(tiny_corpus), storage, "driverless", tmp_path)
    assert second.finish(300) == 0, second.output
    measured(second.run, undisturbed)


@pytest.mark.slow
def test_the_controller_is_killed(
    storage: str, tiny_corpus: Path, undisturbed: Run, measured, local_ray: None
):
    """Ray Train's controller killed (SIGKILL), `dray train` typed again"""
    spec, killed = make_spec(make_case(tiny_corpus)), []

    def kill_controller() -> None:
        killed.append(time.monotonic())
        kill(processes_named("TrainController")[0])

    with (
        befalling(storage, "uncontrolled", {8: kill_controller}),
        pytest.raises(RunFailed, match="controller") as failed,
    ):
        train(spec, storage=storage, run_name="uncontrolled")
    assert time.monotonic() - killed[0] < 60
    run = Run.open(storage, "uncontrolled")
    assert (run.status, diagnose(run).fault) == ("failed", "killed")
    assert "starts the workers" in failed.value.diagnosis
    train(spec, storage=storage, run_name="uncontrolled")
    measured(run, undisturbed)
