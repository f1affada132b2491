"""The driver's side of metrics: nothing is lost while a disk is full, a slow rank is named once,
and ends are told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dray.cluster.gauges import Gauges
from dray.doctor import diagnose
from dray.errors import Cause, StorageFailed
from dray.plan import local_shape, make_plan
from dray.runs import Run, build_trackers, create_run
from dray.runs.records import Event, Report, StepReport
from dray.spec import make_spec
from dray.train.recorder import Recorder
from dray.train.watching import Watching
from remarks import Remarks
from small_disk import small_disk
from tiny import tiny_tree


class Listening(Remarks):
    """Keeps what is said but for the steps."""

    def step(self, row: Mapping[str, Any]) -> None:
        pass


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of two megabytes."""
    with small_disk(tmp_path / "disk", 2) as folder:
        yield folder


def make_recorder(storage: Path) -> tuple[Run, Recorder, Listening]:
    spec = make_spec(tiny_tree(storage))
    plan = make_plan(spec, local_shape())
    run = create_run(storage, "recorded", spec, plan.model_dump(mode="json"))
    run.begin_attempt(2, 0)
    display = Listening()
    watching = Watching(Gauges(run.name, is_read=False), run, plan.num_steps or 0)
    return run, Recorder(run, plan, build_trackers(run, spec), display, watching), display


def make_records(
    step: int, forward_seconds: tuple[float, float] = (1.0, 1.0), attempt: int = 1, at: float = 0.0
) -> list[Report]:
    return [
        StepReport(
            rank=rank,
            attempt=attempt,
            step=step,
            num_ranks=2,
            loss_sum=1.0,
            num_targets=2,
            learning_rate=0.1,
            grad_norm=1.0,
            rows_digest="",
            tokens=8,
            step_tokens=8,
            seconds=2.0,
            data_wait_seconds=0.0,
            forward_seconds=forward_seconds[rank],
            time=at,
            memory_bytes=1,
        )
        for rank in (0, 1)
    ]


def test_what_a_full_disk_does_not_take_is_kept_until_it_is_freed(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recorder, display = make_recorder(disk)
    recorder.take(make_records(1))
    ballast = disk / "ballast"
    with pytest.raises(OSError, match="No space"):
        ballast.write_bytes(bytes(3_000_000))
    for step in range(2, 30):  # more than the last page of the file still takes
        recorder.take([*make_records(step), Event("note", 1, step)])
    assert not recorder.is_stored
    assert sum("kept in memory" in text for text in display.lines) == 1
    ballast.unlink()
    recorder.take([])
    assert recorder.is_stored
    assert [row["step"] for row in run.iterate_metrics()] == list(range(1, 30))
    assert [event["step"] for event in run.events() if event["kind"] == "note"] == list(
        range(2, 30)
    )
    with pytest.raises(OSError, match="No space"):
        ballast.write_bytes(bytes(3_000_000))
    monkeypatch.setattr("dray.train.recorder.OUTAGE_SECONDS", 0.3)
    recorder.take([record for step in range(30, 90) for record in make_records(step)])
    with pytest.raises(StorageFailed, match="is full"):
        recorder.wait_stored()


def test_a_thread_that_waits_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Ray the thread that saves waits for the metrics while the next steps come in."""
    run, recorder, _ = make_recorder(tmp_path)
    log_metrics, log_event = Run.log_metrics, Run.log_event

    def log_slowly(self: Run, rows: Sequence[Mapping[str, Any]]) -> None:
        log_metrics(self, rows)
        time.sleep(0.002)

    def tell_slowly(self: Run, kind: str, **fields: Any) -> None:
        log_event(self, kind, **fields)
        time.sleep(0.002)

    monkeypatch.setattr(Run, "log_metrics", log_slowly)
    monkeypatch.setattr(Run, "log_event", tell_slowly)
    monkeypatch.setattr("dray.train.recorder.DRAIN_SECONDS", 0.0)
    ended = threading.Event()

    def save() -> None:
        while not ended.is_set():
            recorder.wait_stored()

    savers = [threading.Thread(target=save) for _ in range(2)]
    for saver in savers:
        saver.start()
    for step in range(1, 61):
        recorder.take([*make_records(step), Event("note", 1, step)])
    ended.set()
    for saver in savers:
        saver.join()
    recorder.wait_stored()
    assert [row["step"] for row in run.iterate_metrics()] == list(range(1, 61))
    assert sorted(event["step"] for event in run.events() if event["kind"] == "note") == list(
        range(1, 61)
    )


def test_a_save_that_fails_is_told_and_so_is_what_cannot_be_deleted(tmp_path: Path) -> None:
    _, recorder, display = make_recorder(tmp_path)
    for step in (1, 2):
        for kind in ("checkpoint_failed", "retention_failed"):
            recorder.take([Event(kind, 1, step, {"problem": "no such luck"})])
    assert [text.partition(":")[0] for text in display.lines] == [
        "step 1 could not be saved",
        "older checkpoints cannot be deleted, so the storage fills up",
        "step 2 could not be saved",
    ]


def test_a_slow_rank_is_named_once_an_attempt(tmp_path: Path) -> None:
    run, recorder, display = make_recorder(tmp_path)
    for step in range(1, 31):
        recorder.take(make_records(step, (1.0, 5.0 if step > 4 else 1.0)))
    slow = [event for event in run.events() if event["kind"] == "straggler"]
    assert [(event["rank"], round(event["ratio"], 3)) for event in slow] == [(1, 5.0)]
    assert slow[0]["step"] > 12  # not for a hiccup
    assert sum("rank 1 is slow" in text for text in display.lines) == 1
    run.begin_attempt(2, 30)
    for step in range(31, 45):
        recorder.take(make_records(step, (5.0, 1.0), attempt=2))
    assert [event["rank"] for event in run.events() if event["kind"] == "straggler"] == [1, 0]


def test_the_time_to_the_next_new_step_is_by_the_drivers_clock(tmp_path: Path) -> None:
    run, recorder, _ = make_recorder(tmp_path)
    recorder.take(make_records(1, at=3600.0))
    run.begin_attempt(2, 0)
    recorder.take([*make_records(1, attempt=2, at=5.0), *make_records(2, attempt=2, at=6.0)])
    recovered = next(event for event in run.events() if event["kind"] == "recovered")
    assert 0 <= recovered["seconds"] < 60
    # The restart ends with the first step after it, though that is one that is done again.
    (restarted,) = (event for event in run.events() if event["kind"] == "restarted")
    assert (restarted["attempt"], restarted["step"]) == (2, 1)
    assert 0 <= restarted["seconds"] <= recovered["seconds"]


@pytest.mark.parametrize(
    ("reason", "fault"),
    [
        (
            "Ray Train's controller was lost: The actor died unexpectedly before finishing this "
            "task.",
            Cause.KILLED,
        ),
        (
            "metrics/a0001.jsonl: the storage is full ([Errno 28] No space left on device); free "
            "space there",
            Cause.STORAGE,
        ),
        (
            "the workers failed: dray.errors.StorageFailed: x: the storage refuses it (Read-only "
            "file system)",
            Cause.STORAGE,
        ),
    ],
)
def test_what_the_driver_could_not_write_down_is_told_all_the_same(
    tmp_path: Path, reason: str, fault: Cause
) -> None:
    run, _, _ = make_recorder(tmp_path)
    run.set_status("running")
    found = diagnose(run, reason=reason)
    assert (found.status, found.fault) == ("failed", fault)
