"""Rows that are compacted stay what they were, whatever happens meanwhile; and a history is read
without holding it."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dray.errors import StoreError
from dray.runs import Run, create_run
from dray.runs.compaction import make_parquet, read_parquet
from dray.runs.row_log import RowLog, make_history
from dray.show.report import format_summary
from dray.storage.filesystem import is_local, list_files, open_filesystem, read_bytes, write_bytes
from sharded_model import PLAN, make_test_spec

VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers(0, 9), max_size=2)
    | st.dictionaries(st.text(max_size=2), st.booleans(), max_size=2)
)


@given(
    st.lists(
        st.dictionaries(st.sampled_from(["a", "b", "c", "_part", "ü"]), VALUES, max_size=4),
        max_size=12,
    )
)
@settings(deadline=None, max_examples=30)
def test_any_rows_come_back_as_they_were(rows: list[dict[str, Any]]) -> None:
    plain = [json.loads(json.dumps(row)) for row in rows]
    parts = [index // 3 for index in range(len(rows))]
    content = make_parquet(plain, parts)
    assert [(part, json.dumps(row)) for part, row in read_parquet(content)] == [
        (part, json.dumps(row)) for part, row in zip(parts, plain, strict=True)
    ]
    assert [json.dumps(row) for _, row in read_parquet(content, ("b", "ü"))] == [
        json.dumps({key: row[key] for key in row if key in ("b", "ü")}) for row in plain
    ]


def row_of(step: int, attempt: int = 1) -> dict[str, Any]:
    return {
        "step": step,
        "attempt": attempt,
        "loss": 1 / step,
        "seconds": 0.5,
        "tokens": step * 100,
        "memory_bytes_max": 10**9 + step,
        "tokens_per_second": 200.0,
        "rows_digest": f"{step:016x}",
        **({"late": [step]} if step % 7 == 0 else {}),
    }


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dray.runs.row_log.PART_BYTES", 250)
    monkeypatch.setattr("dray.runs.row_log.LOCAL_PART_BYTES", 1200)
    monkeypatch.setattr("dray.runs.row_log.COMPACT_PARTS", 4)


SPANS = ((0, 40), (30, 55), (55, 58), (45, 80))


def log_steps(run: Run, first: int, last: int, attempt: int = 1, at_once: int = 2) -> None:
    for step in range(first, last + 1, at_once):
        run.log_metrics([row_of(s, attempt) for s in range(step, min(step + at_once, last + 1))])


def test_a_run_with_restarts(run: Run, small_parts: None) -> None:
    """Compacted parts, open ones, undone rows and several attempts: every way of reading tells the
    same."""
    for attempt, (start, stop) in enumerate(SPANS, 1):
        run.begin_attempt(1, start)
        log_steps(run, start + 1, stop, attempt)
    names = list_files(run.filesystem, f"{run.path}/metrics")
    assert sum(name.endswith(".parquet") for name in names) >= 3
    assert len(names) < 30
    expected = make_history(
        [
            row_of(step, attempt)
            for attempt, (start, stop) in enumerate(SPANS, 1)
            for step in range(start + 1, stop + 1)
        ],
        {1: 0, 2: 30, 3: 55, 4: 45},
    )
    assert run.metrics() == list(run.iterate_history()) == expected
    assert len(expected) == 80
    assert list(run.iterate_history(("loss",))) == [
        {"step": row["step"], "attempt": row["attempt"], "loss": row["loss"]} for row in expected
    ]
    for count in (1, 20, 40, 1000):
        assert run.last_metrics(count) == expected[-count:]
    outline, summary = run.outline(), run.summary()
    assert outline.num_steps == 80
    assert outline.seconds == pytest.approx(40)
    assert (outline.tokens, outline.memory_bytes_max, outline.first_loss) == (8000, 10**9 + 80, 1.0)
    assert (summary["step"], summary["train_loss"], summary["tokens_per_second"]) == (
        80,
        1 / 80,
        200.0,
    )
    assert "8,000 tokens" in format_summary(run)
    assert pq.read_table(run.export_metrics_parquet(), filesystem=run.filesystem).equals(
        run.metrics_table()
    )
    assert len(list(run.iterate_metrics(("step", "rows_digest")))) == sum(
        stop - start for start, stop in SPANS
    )


def crash(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("where", "at"), [("write_bytes", 0), ("delete_file", 0), ("delete_file", 2)]
)
def test_a_process_that_dies_while_compacting(
    run: Run, small_parts: None, monkeypatch: pytest.MonkeyPatch, where: str, at: int
) -> None:
    """Before the Parquet file is there, after it, or half way through deleting the parts."""
    from dray.runs import row_log as records

    real, calls = getattr(records, where), []

    def dying(filesystem: Any, path: str, *rest: Any) -> Any:
        if where == "delete_file" or path.endswith(".parquet"):
            calls.append(path)
            if len(calls) == at + 1:
                crash()
        return real(filesystem, path, *rest)

    run.begin_attempt(1, 0)
    monkeypatch.setattr(f"dray.runs.row_log.{where}", dying)
    done = 0
    try:
        for step in range(1, 60):
            run.log_metrics([row_of(step)])
            done = step
    except KeyboardInterrupt:
        done = len(run.metrics())  # the row that was being logged is stored already
    monkeypatch.setattr(f"dray.runs.row_log.{where}", real)
    assert done < 59
    again = Run.open(run.storage, run.name)
    assert [row["step"] for row in again.metrics()] == list(range(1, done + 1))
    log_steps(again, done + 1, done + 30)
    assert again.metrics() == [row_of(step) for step in range(1, done + 31)]
    for log in (again, run):
        log._metrics.compact("a0001")
    assert again.metrics() == [row_of(step) for step in range(1, done + 31)]
    files = list_files(run.filesystem, f"{run.path}/metrics")
    assert sum(name.endswith(".jsonl") for name in files) <= 3, (
        "what a dead process left is cleared away"
    )


def test_two_compactors_at_once(
    run: Run, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They see the same parts, or one more: rows are given once all the same."""
    monkeypatch.setattr("dray.runs.row_log.COMPACT_PARTS", 10**6)
    monkeypatch.setattr("dray.runs.row_log.RowLog._compact_when_due", lambda *_: None)
    log_steps(run, 1, 40)
    listed = [file for file in run._metrics._files("a0001") if not file.is_compact][:-1]
    others = [Run.open(run.storage, run.name)._metrics for _ in range(3)]
    threads = [
        threading.Thread(target=log._compact_files, args=(listed[:stop],))
        for log, stop in zip(others, (2, len(listed), 3), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert run.metrics() == [row_of(step) for step in range(1, 41)]
    # Files that overlap in part, as a third one that came late would leave.
    filesystem, folder = run.filesystem, f"{run.path}/metrics"
    writer = listed[0].writer
    for name in list_files(filesystem, folder):
        filesystem.delete_file(f"{folder}/{name}")

    def write(first: int, last: int) -> None:
        parts = [part for part in range(first, last + 1) for _ in range(3)]
        rows = [
            row_of(1 + 3 * part + index) for part in range(first, last + 1) for index in range(3)
        ]
        write_bytes(
            filesystem,
            f"{folder}/a0001-{writer}-{first:06d}-{last:06d}.parquet",
            make_parquet(rows, parts),
        )

    for first, last in ((0, 4), (0, 2), (3, 8), (8, 8), (5, 7)):
        write(first, last)
    assert [row["step"] for row in run.metrics()] == list(range(1, 28))
    assert run.outline().num_steps == 27


def test_reading_while_it_is_compacted(
    run: Run, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that has come half way loses and doubles nothing when the parts before it go
    away."""
    monkeypatch.setattr("dray.runs.row_log.RowLog._compact_when_due", lambda *_: None)
    log_steps(run, 1, 40)
    monkeypatch.undo()
    for taken in (1, 7, 20):
        reading = run.iterate_metrics()
        steps = [next(reading)["step"] for _ in range(taken)]
        if taken == 7:
            monkeypatch.setattr("dray.runs.row_log.LOCAL_PART_BYTES", 1200)
            Run.open(run.storage, run.name)._metrics.compact("a0001")
            monkeypatch.undo()
        steps += [row["step"] for row in reading]
        assert steps == list(range(1, 41))


def test_a_damaged_parquet_file(
    run: Run, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the parts are there they are read; afterwards the damage is named, not passed over."""
    monkeypatch.setattr("dray.runs.row_log.RowLog._delete", lambda *_: None)
    log_steps(run, 1, 40)
    folder = f"{run.path}/metrics"
    name = next(
        name for name in sorted(list_files(run.filesystem, folder)) if name.endswith(".parquet")
    )
    content = read_bytes(run.filesystem, f"{folder}/{name}")
    for damaged in (content[: len(content) // 2], b"", content[:-20] + bytes(20)):
        write_bytes(run.filesystem, f"{folder}/{name}", damaged)
        assert [row["step"] for row in run.metrics()] == list(range(1, 41))
        assert run.outline().num_steps == 40
    monkeypatch.undo()
    Run.open(run.storage, run.name)._metrics.compact("a0001")
    assert read_bytes(run.filesystem, f"{folder}/{name}") == content, "it was made anew"
    write_bytes(run.filesystem, f"{folder}/{name}", content[:100])
    with pytest.raises(StoreError, match="not a file of rows"):
        run.metrics()


def test_a_part_with_a_damaged_line_stays(local_run: Run, small_parts: None) -> None:
    log_steps(local_run, 1, 4)
    path = Path(local_run.path, "metrics", "a0001.jsonl")
    path.write_bytes(path.read_bytes().replace(b'{"step": 3,', b'{"step" 3,'))
    log_steps(local_run, 5, 60)
    assert path.exists()
    assert [row["step"] for row in local_run.metrics()] == [1, 2, *range(4, 61)]


def test_a_stale_appender_does_not_write_into_what_is_gone(
    local_run: Run, small_parts: None
) -> None:
    """Two processes append to one log; one of them sleeps while the other fills and compacts the
    part."""
    log = local_run._events
    stale = RowLog(log.filesystem, log.folder)
    stale.append("events", [{"number": 0}])
    for number in range(1, 40):
        log.append("events", [{"number": number, "filler": "x" * 50}])
    assert not os.path.exists(f"{log.folder}/events.jsonl")
    stale.append("events", [{"number": 40}])
    assert sorted(row["number"] for row in log.rows()) == list(range(41))


def test_attempts_are_read_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from dray.runs import row_log as records

    for start in range(6):
        run.end_attempt(run.begin_attempt(1, start), "failed", start + 1)
    run.attempts()
    reads: list[str] = []
    real = records.read_bytes
    monkeypatch.setattr(
        "dray.runs.row_log.read_bytes", lambda fs, path: reads.append(path) or real(fs, path)
    )
    assert len(Run.open(run.storage, run.name).attempts()) == 6
    assert reads == []
    number = run.begin_attempt(1, 9)
    assert not run.attempts()[-1].status
    run.end_attempt(number, "resized", 12)
    assert run.attempts()[-1].status == "resized"
    assert len(reads) == 2


def test_a_run_of_an_earlier_version(tmp_path: Path) -> None:
    """Parts as they were written before compaction was there, a large one among them."""
    run = create_run(tmp_path, "speeches", make_test_spec(), PLAN)
    folder = Path(run.path, "metrics")
    folder.mkdir()
    lines = "".join(json.dumps(row_of(step)) + "\n" for step in range(1, 4000))
    (folder / "a0001.jsonl").write_text(lines)
    (folder / "a0002-0123abcd-000000.jsonl").write_text(json.dumps(row_of(4000, 2)) + "\n")
    assert run.summary()["step"] == 4000
    run.log_metrics([row_of(4001, 1)])
    assert [row["step"] for row in run.last_metrics(3)] == [3999, 4000, 4001]
    assert is_local(open_filesystem(tmp_path)[0])
