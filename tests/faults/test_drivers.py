"""The processes around the ranks die; the run goes on, by itself or when it is started again."""

from __future__ import annotations

from pathlib import Path

from harness import Training, kill, make_case, wait_for

from dray.store import Run


def test_the_driver_is_killed_and_started_again(storage: str, tiny_corpus: Path, undisturbed: Run, measured,
                                                tmp_path: Path):
    """driver killed (SIGKILL), `dray train` typed again at once"""
    first = Training(make_case(tiny_corpus), storage, "driverless", tmp_path)
    first.wait_for_step(8)
    ranks = first.ranks()
    kill(first.process)
    wait_for(lambda: not any(rank.is_running() for rank in ranks), "the end of the ranks that lost their driver")
    second = Training(make_case(tiny_corpus), storage, "driverless", tmp_path)
    assert second.finish() == 0, second.output
    measured(second.run, undisturbed)
