"""Processes that die, or fail, at the places where the most is at stake; the run goes on by
itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import causes, disturbed, kill, random_rank

from dray.runs import Run
from waiting import rank_processes

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(
            "dray.runs.commit:tensor_bytes:before",
            id="in-the-write-of-its-file",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "dray.runs.commit:CheckpointWriter.write_rank:after",
            id="after-its-file-is-whole",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "dray.runs.commit:CheckpointWriter._check_current:before", id="before-the-marker"
        ),
        pytest.param(
            "dray.runs.commit:CheckpointWriter.commit:after",
            id="after-the-marker",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_worker_is_killed_in_a_save(
    place: str,
    storage: str,
    tiny_corpus: Path,
    undisturbed: Run,
    measured,
    name_fault,
    request: pytest.FixtureRequest,
):
    """a worker killed in a save, {id}"""
    happened = name_fault(place)
    run = disturbed(storage, tiny_corpus, f"killed-{request.node.callspec.id}", {})
    assert happened.exists()
    measured(run, undisturbed)
    assert causes(run) == ["killed"]
    starts = [attempt.start_step for attempt in run.attempts()]
    assert starts == [
        0,
        6 if place.endswith("commit:after") else 0,
    ]  # what has its marker counts, and nothing else


def test_a_worker_is_killed_in_the_restore(
    storage: str, tiny_corpus: Path, undisturbed: Run, measured, name_fault
):
    """a worker killed in the restore after another kill"""
    happened = name_fault("dray.runs.checkpoint_reader:CheckpointReader.read:after")
    run = disturbed(storage, tiny_corpus, "killed-in-restore", {13: lambda: kill(random_rank())})
    assert happened.exists()
    measured(run, undisturbed)
    assert causes(run) == ["killed", "killed"]
    assert len({attempt.start_step for attempt in run.attempts()[1:]}) == 1


@pytest.mark.slow
def test_all_workers_are_killed_at_once(
    storage: str, tiny_corpus: Path, undisturbed: Run, measured
):
    """all workers killed at once in a step"""
    run = disturbed(
        storage, tiny_corpus, "all-killed", {8: lambda: [kill(rank) for rank in rank_processes()]}
    )
    measured(run, undisturbed)
    assert causes(run) == ["killed"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [
        pytest.param("dray.rank.loop:_Loop._checkpoint_due:before", id="in-a-step"),
        pytest.param("dray.rank.job:begin_attempt:before", id="before-its-attempt-is-recorded"),
    ],
)
def test_a_worker_raises(
    place: str,
    storage: str,
    tiny_corpus: Path,
    undisturbed: Run,
    measured,
    name_fault,
    request: pytest.FixtureRequest,
):
    """an exception in a worker, {id}"""
    happened = name_fault(place, "fail")
    run = disturbed(storage, tiny_corpus, f"raised-{request.node.callspec.id}", {})
    assert happened.exists()
    measured(run, undisturbed)
    assert causes(run) == ["code"]
    assert [attempt.number for attempt in run.attempts()] == [
        1,
        2,
    ]  # the one that failed so early has its record
    failure = Path(run.uri, "failures", "a0001.json").read_text()
    assert "a mistake in the code" in failure
