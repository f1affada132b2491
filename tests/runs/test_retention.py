"""Which checkpoints are kept: never too few, never the wrong ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dray.errors import StoreError
from dray.runs import (
    CheckpointInfo,
    CheckpointReader,
    Run,
    apply_retention,
    fork_run,
    verify_all,
    verify_checkpoint,
)
from dray.runs.row_log import load_json, save_json
from dray.storage.filesystem import list_files, list_folders
from sharded_model import PLAN, make_test_spec, save


def steps_of(run: Run) -> list[int]:
    return [info.step for info in run.checkpoints()]


def test_keep_last(run: Run) -> None:
    for step in (10, 20, 30):
        save(run, step)
    deleted = apply_retention(run, keep_last=2)
    assert [path.rpartition("/")[2] for path in deleted] == ["step-00000010-a0001"]
    assert steps_of(run) == [20, 30]
    assert all(verify_checkpoint(run, info).ok for info in run.checkpoints())
    assert apply_retention(run, keep_last=2) == []
    assert list_folders(run.filesystem, f"{run.path}/checkpoints") == [
        "step-00000020-a0001",
        "step-00000030-a0001",
    ]


@pytest.mark.parametrize(
    ("metric", "values", "kept"),
    [
        ("loss", {10: 1.0, 20: 3.0, 30: 2.0, 40: 4.0}, [10, 30, 40]),
        ("accuracy", {10: 0.1, 20: 0.9, 30: 0.2, 40: 0.3}, [20, 40]),
        ("loss", {10: float("nan"), 20: 3.0, 30: 2.0, 40: 4.0}, [20, 30, 40]),
        ("loss", {10: None, 20: float("inf"), 30: 2.0, 40: 4.0}, [30, 40]),
        ("loss", {40: 4.0}, [40]),
        ("perplexity", {10: 1.0, 20: 3.0}, [10, 20, 40]),
    ],
)
def test_keep_best(
    local_run: Run, metric: str, values: dict[int, float | None], kept: list[int]
) -> None:
    for step in (10, 20, 30, 40):
        save(local_run, step, **({"validation": {metric: values[step]}} if step in values else {}))
    apply_retention(
        local_run, keep_last=1, keep_best=2, metric=metric, sign=-1 if metric == "accuracy" else 1
    )
    assert steps_of(local_run) == kept


def test_best_by_the_validation_rows(local_run: Run) -> None:
    attempt = local_run.begin_attempt(1, 0)
    for step, loss in ((10, 3), (20, 1), (30, 2)):
        # What a checkpoint carries may stem from an earlier validation; the row of its own step
        # counts.
        save(local_run, step, validation={"loss": 9.0}, validation_step=10)
        local_run.log_metrics(
            [{"kind": "validation", "step": step, "attempt": attempt, "loss": loss}]
        )
    apply_retention(local_run, keep_last=1, keep_best=1)
    assert steps_of(local_run) == [20, 30]


def test_validation_of_another_step_does_not_count(local_run: Run) -> None:
    save(local_run, 10, validation={"loss": 1.0}, validation_step=10)
    save(local_run, 20, validation={"loss": 1.0}, validation_step=10)
    assert [info.metrics for info in local_run.checkpoints()] == [{"loss": 1.0}, {}]


def test_unsound_ones_go_only_when_a_newer_sound_one_is_there(local_run: Run) -> None:
    save(local_run, 10)
    for step in (20, 40):
        Path(save(local_run, step).path, "COMMITTED").unlink()
    apply_retention(local_run, keep_last=1)
    assert [info.step for info in local_run.checkpoints(verified_only=False)] == [10, 20, 40]
    save(local_run, 30)
    apply_retention(local_run, keep_last=1)
    assert [info.step for info in local_run.checkpoints(verified_only=False)] == [30, 40], (
        "40 may be in the writing"
    )


def test_what_was_set_aside_is_never_deleted(local_run: Run) -> None:
    local_run.set_aside(save(local_run, 10), "a bit flipped")
    for step in (20, 30):
        save(local_run, step)
        apply_retention(local_run, keep_last=1)
    assert [info.step for info in local_run.checkpoints(verified_only=False)] == [10, 30]


def test_nothing_sound_nothing_deleted(local_run: Run) -> None:
    Path(save(local_run, 10).path, "manifest.json").unlink()
    assert apply_retention(local_run, keep_last=1) == []
    with pytest.raises(ValueError, match="keep_last 0"):
        apply_retention(local_run, keep_last=0)


def test_what_a_fork_started_from_is_kept(storage: str, run: Run) -> None:
    save(run, 10)
    fork = fork_run(storage, "speeches", "branch", make_test_spec(seed=1), PLAN)
    for step in (20, 30):
        save(run, step)
        apply_retention(run, keep_last=1)
    assert steps_of(run) == [10, 30]
    found = fork.latest_checkpoint()
    assert found is not None
    assert verify_checkpoint(fork, found).ok


HOLD = """
import sys
from dray.runs import Run
run = Run.open(sys.argv[1], "speeches")
with run.hold(run.checkpoints()[0]):
    print("held", flush=True)
    sys.stdin.read()
"""


def names_of_pins(run: Run) -> list[str]:
    return sorted(list_files(run.filesystem, f"{run.path}/pins"))


def test_what_is_held_is_kept(run: Run) -> None:
    first = save(run, 10)
    with run.hold(first), CheckpointReader(run, first) as reader:
        for step in (20, 30):
            save(run, step)
            apply_retention(run, keep_last=1)
        assert steps_of(run) == [10, 30]
        assert reader.verify_files([0, 1]) == []
    assert names_of_pins(run) == []
    assert [path.rpartition("/")[2] for path in apply_retention(run, keep_last=1)] == [
        "step-00000010-a0001"
    ]
    with (
        pytest.raises(StoreError, match="the checkpoint of step 10 was deleted meanwhile"),
        run.hold(first),
    ):
        pytest.fail("it is gone")
    assert names_of_pins(run) == []


def test_a_reader_in_another_process(local_run: Run) -> None:
    """Its pin counts while it lives; killed, it holds nothing, and what it left is cleared away."""
    save(local_run, 10)
    save(local_run, 20)
    reader = subprocess.Popen(
        [sys.executable, "-c", HOLD, local_run.storage],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "held\n"
    apply_retention(local_run, keep_last=1)
    assert steps_of(local_run) == [10, 20]
    os.kill(reader.pid, signal.SIGKILL)
    reader.communicate()
    assert len(names_of_pins(local_run)) == 1
    apply_retention(local_run, keep_last=1)
    assert steps_of(local_run) == [20]
    assert names_of_pins(local_run) == []


@pytest.mark.parametrize(("hours", "kept"), [(23, True), (25, False)])
def test_a_reader_elsewhere_holds_for_a_day(run: Run, hours: int, kept: bool) -> None:
    save(run, 10)
    save(run, 20)
    with run.hold(run.checkpoints()[0]):
        path = f"{run.path}/pins/{names_of_pins(run)[0]}"
        time = (datetime.now(UTC) - timedelta(hours=hours)).isoformat()
        save_json(
            run.filesystem,
            path,
            load_json(run.filesystem, path) | {"host": "elsewhere", "time": time},
        )
        apply_retention(run, keep_last=1)
        assert steps_of(run) == ([10, 20] if kept else [20])


def test_a_reader_that_comes_in_the_middle(local_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a reader and a deletion at the same time at least one gives way, wherever the reader comes
    in."""
    from dray.runs import retention

    look, readers = retention._pinned, []
    for turn in (1, 2):  # before the first look at the pins, and between the two
        first = save(local_run, 10, attempt=turn)
        save(local_run, 20, attempt=turn)
        calls: list[int] = []

        def come_in(
            run: Run, info: CheckpointInfo = first, turn: int = turn, calls: list[int] = calls
        ) -> set[str]:
            calls.append(1)
            if len(calls) == turn:
                readers.append(run.hold(info))
                try:
                    readers[-1].__enter__()
                except StoreError as error:
                    readers[-1] = error
            return look(run)

        monkeypatch.setattr(retention, "_pinned", come_in)
        apply_retention(local_run, keep_last=1)
        monkeypatch.setattr(retention, "_pinned", look)
        if isinstance(readers[-1], StoreError):
            assert "was deleted meanwhile" in str(readers[-1])
        else:
            assert verify_checkpoint(local_run, first).ok
            readers[-1].__exit__(None, None, None)
    assert not isinstance(readers[0], StoreError)


def test_a_deletion_that_was_cut_off(local_run: Run) -> None:
    """What was to be deleted is no longer used, and goes the next time."""
    doomed, newest = save(local_run, 10), save(local_run, 20)
    Path(doomed.path, "DELETING").touch()
    assert steps_of(local_run) == [20]
    assert local_run.checkpoints(verified_only=False)[0].problem == "it is being deleted"
    assert apply_retention(local_run, keep_last=5) == [doomed.path]
    assert local_run.latest_checkpoint() == newest


def test_verifying_holds(run: Run) -> None:
    save(run, 10)
    save(run, 20)
    reports = verify_all(run)
    assert [(report.step, report.ok) for report in reports] == [(10, True), (20, True)]
    assert names_of_pins(run) == []
