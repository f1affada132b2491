"""Rows that survive kills, and the one history they make."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dray.runs import Run, create_run, fork_run
from dray.runs.row_log import PART_BYTES, RowLog, make_history, make_table
from dray.storage.filesystem import is_local, list_files, open_filesystem
from sharded_model import PLAN, make_test_spec, save


def rows_of(attempt: int, first: int, last: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"step": step, "attempt": attempt, "loss": step / 10, **more}
        for step in range(first, last + 1)
    ]


def test_history_has_one_row_a_step(run: Run) -> None:
    run.begin_attempt(2, 0)
    run.log_metrics(rows_of(1, 1, 7))
    run.begin_attempt(4, 5)
    run.log_metrics(rows_of(2, 6, 6))
    run.log_metrics(rows_of(2, 7, 9))
    run.begin_attempt(1, 9)
    run.log_metrics(rows_of(3, 10, 10))
    assert [(row["step"], row["attempt"]) for row in run.metrics()] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 1),
        (5, 1),
        (6, 2),
        (7, 2),
        (8, 2),
        (9, 2),
        (10, 3),
    ]


def test_validation_rows_are_apart(run: Run) -> None:
    attempt = run.begin_attempt(1, 0)
    run.log_metrics(
        [
            *rows_of(attempt, 1, 2),
            {"kind": "validation", "step": 2, "attempt": attempt, "loss": 1.5},
        ]
    )
    assert [row["step"] for row in run.metrics()] == [1, 2]
    assert [row["loss"] for row in run.validations()] == [1.5]
    with pytest.raises(ValueError, match="needs step and attempt"):
        run.log_metrics([{"step": 1}])


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 8)), min_size=1, max_size=6))
def test_history_against_a_replay(attempts: list[tuple[int, int]]) -> None:
    """Attempts of (steps back from where the last one stopped, steps done): the history is what a
    list would hold."""
    rows, start_steps, state = [], {}, list[tuple[int, int]]()
    for number, (back, done) in enumerate(attempts, 1):
        state = state[: max(0, len(state) - back)]
        start_steps[number] = len(state)
        new = [(len(state) + n, number) for n in range(1, done + 1)]
        state += new
        rows += [{"step": step, "attempt": attempt} for step, attempt in new]
    assert [(row["step"], row["attempt"]) for row in make_history(rows, start_steps)] == state


def test_events(run: Run) -> None:
    run.log_event("started", host="a")
    Run.open(run.storage, run.name).log_event("failed", reason="…\nline two")
    run.log_event("ended")
    assert [event["kind"] for event in run.events()] == ["started", "failed", "ended"]
    assert run.events()[1]["reason"] == "…\nline two"
    assert all(event["time"].endswith("+00:00") for event in run.events())


def test_foreign_numbers(local_run: Run) -> None:
    local_run.log_metrics(
        [{"step": np.int64(1), "attempt": 1, "loss": torch.tensor(0.5), "grad_norm": float("nan")}]
    )
    row = local_run.metrics()[0]
    assert (row["step"], row["loss"]) == (1, 0.5)
    assert row["grad_norm"] != row["grad_norm"]
    with pytest.raises(TypeError, match="has no place in a record"):
        local_run.log_metrics([{"step": 2, "attempt": 1, "loss": object()}])


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "att', b"{", b'{"step": 3, "attempt": 1}', b"x" * 200_000]
)
def test_torn_line_is_ignored_and_repaired(local_run: Run, torn: bytes) -> None:
    local_run.log_metrics(rows_of(1, 1, 2))
    path = Path(local_run.path, "metrics", "a0001.jsonl")
    with path.open("ab") as stream:
        stream.write(torn)
    assert [row["step"] for row in local_run.metrics()] == [1, 2]
    local_run.log_metrics(rows_of(1, 3, 3))
    assert [row["step"] for row in local_run.metrics()] == [1, 2, 3]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_only_a_torn_line(local_run: Run) -> None:
    path = Path(local_run.path, "metrics", "a0001.jsonl")
    path.parent.mkdir()
    path.write_bytes(b'{"step"')
    assert local_run.metrics() == []
    local_run.log_metrics(rows_of(1, 1, 1))
    assert len(local_run.metrics()) == 1


LOG_FOR_EVER = """
import sys
from dray.runs import Run
run, step = Run.open(sys.argv[1], "speeches"), 0
while True:
    step += 1
    run.log_metrics([{"step": step, "attempt": 1, "filler": "x" * 5000}])
    sys.stdout.write(f"{step}\\n"); sys.stdout.flush()
"""


def test_kill_9_loses_no_stored_row(local_run: Run) -> None:
    for seconds in (0.02, 0.05, 0.11):
        child = subprocess.Popen(
            [sys.executable, "-c", LOG_FOR_EVER, local_run.storage],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(seconds)
        os.kill(child.pid, signal.SIGKILL)
        said = [
            line for line in child.communicate()[0].splitlines(keepends=True) if line.endswith("\n")
        ]
        assert len(local_run.metrics()) >= len(said) + 1
    local_run.log_metrics(rows_of(1, 1, 1))
    parts = sorted(Path(local_run.path, "metrics").glob("*.jsonl"))
    assert parts, "the rows just logged are in no part"
    for part in parts:  # a fast disk fills more than one: the earlier ones are compacted
        for line in part.read_text().splitlines():
            json.loads(line)


APPEND = """
import sys
from dray.runs import Run
run = Run.open(sys.argv[1], "speeches")
for number in range(300):
    run.log_event("mark", writer=sys.argv[2], number=number)
"""


def test_many_writers_at_once(local_run: Run) -> None:
    children = [
        subprocess.Popen([sys.executable, "-c", APPEND, local_run.storage, str(writer)])
        for writer in range(3)
    ]
    assert [child.wait() for child in children] == [0, 0, 0]
    found = {(event["writer"], event["number"]) for event in local_run.events()}
    assert found == {(str(writer), number) for writer in range(3) for number in range(300)}
    assert len(local_run.events()) == 900


def test_parts_on_an_object_store(s3_storage: str) -> None:
    """An object store cannot append: parts are rewritten until they are full, and two writers never
    share one."""
    filesystem, path = open_filesystem(s3_storage)
    one, two = RowLog(filesystem, f"{path}/rows"), RowLog(filesystem, f"{path}/rows")
    for number in range(12):
        one.append("a", [{"writer": 1, "number": number, "filler": "x" * (PART_BYTES // 4)}])
        two.append("a", [{"writer": 2, "number": number}])
    rows = one.rows()
    for writer in (1, 2):
        assert [row["number"] for row in rows if row["writer"] == writer] == list(range(12))
    sizes = list_files(filesystem, f"{path}/rows")
    assert len(sizes) == 4
    assert max(sizes.values()) < 1.5 * PART_BYTES


@pytest.mark.parametrize("read_bytes", [13, 97, 10**6])
def test_rows_are_read_in_pieces_of_any_size(
    run: Run, monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    monkeypatch.setattr("dray.runs.row_log.READ_BYTES", read_bytes)
    attempt = run.begin_attempt(1, 0)
    rows = [{"step": step, "attempt": attempt, "filler": "ä" * step} for step in range(1, 30)]
    run.log_metrics(rows)
    if is_local(run.filesystem):
        with open(f"{run.path}/metrics/a0001.jsonl", "ab") as stream:
            stream.write(b'{"step": 30, "att')  # torn
    assert list(run.iterate_metrics()) == run.metrics() == rows


def test_table_and_parquet(run: Run) -> None:
    attempt = run.begin_attempt(1, 0)
    assert run.metrics_table().num_rows == 0
    run.log_metrics(
        [
            {"step": 1, "attempt": attempt, "loss": 1, "where": {"a": 1}, "mixed": 1},
            {"step": 2, "attempt": attempt, "loss": 0.5, "late": "x", "mixed": "y"},
        ]
    )
    table = run.metrics_table()
    assert table.column_names == ["step", "attempt", "loss", "where", "mixed", "late"]
    assert table.column("loss").to_pylist() == [1.0, 0.5]
    assert table.column("where").to_pylist() == ['{"a": 1}', None]
    assert table.column("mixed").to_pylist() == ["1", '"y"']
    path = run.export_metrics_parquet()
    assert pq.read_table(path, filesystem=run.filesystem).equals(table)


def test_table_of_large_numbers() -> None:
    table = make_table([{"tokens": 2**40, "rate": 3e-4}, {"tokens": None, "rate": float("inf")}])
    assert table.column("tokens").to_pylist() == [2**40, None]


def train(run: Run, last: int, every: int = 10) -> int:
    """An attempt as the driver does it: it starts from the newest sound checkpoint, logs each step,
    saves at times."""
    newest = run.latest_checkpoint()
    start = newest.step if newest else 0
    attempt = run.begin_attempt(1, start)
    for step in range(start + 1, last + 1):
        run.log_metrics([{"step": step, "attempt": attempt, "loss": 1.0}])
        if step % every == 0:
            save(run, step, num_ranks=1, attempt=attempt)
    return attempt


def assert_one_row_a_step(run: Run, last: int) -> None:
    assert [row["step"] for row in run.metrics()] == list(range(1, last + 1))


@pytest.mark.parametrize("bad", [[30], [30, 20], [20], [10, 20, 30], [30, 10]], ids=str)
def test_falling_back_to_an_older_checkpoint_leaves_no_gap(local_run: Run, bad: list[int]) -> None:
    """Three attempts, then some of their checkpoints turn out bad: one row a step, of the attempt
    that counts."""
    train(local_run, 14)
    train(local_run, 23)
    train(local_run, 36)
    assert_one_row_a_step(local_run, 36)
    assert [(info.step, info.attempt) for info in local_run.checkpoints()] == [
        (10, 1),
        (20, 2),
        (30, 3),
    ]
    for info in local_run.checkpoints():
        if info.step in bad:
            local_run.set_aside(info, "its checksum is another")
    sound = [step for step in (10, 20, 30) if step not in bad]
    newest = local_run.latest_checkpoint()
    assert (newest.step if newest else None) == (sound[-1] if sound else None)
    attempt = train(local_run, 40)
    assert_one_row_a_step(local_run, 40)
    start = sound[-1] if sound else 0
    assert {row["attempt"] for row in local_run.metrics() if row["step"] > start} == {attempt}
    assert [info.step for info in local_run.checkpoints()] == sound + [
        s for s in (10, 20, 30, 40) if s > start
    ]
    assert all(
        "undone" in info.problem or "set aside" in info.problem
        for info in local_run.checkpoints(verified_only=False)
        if not info.verified
    )


def test_a_checkpoint_set_aside_after_others_were_made_from_it(local_run: Run) -> None:
    """What was trained from it before stays sound: it was verified when it was read."""
    train(local_run, 10)
    train(local_run, 20)
    local_run.set_aside(local_run.checkpoints()[0], "a bad sector")
    assert [info.step for info in local_run.checkpoints()] == [20]
    train(local_run, 30)
    assert_one_row_a_step(local_run, 30)
    local_run.set_aside(local_run.checkpoints()[0], "a bad sector")
    local_run.set_aside(local_run.checkpoints()[0], "a bad sector")
    train(local_run, 12)
    assert_one_row_a_step(local_run, 12)


def test_a_fork_falls_back_to_where_it_came_from(local_run: Run) -> None:
    train(local_run, 10)
    fork = fork_run(local_run.storage, "speeches", "branch", make_test_spec(seed=1), PLAN)
    train(fork, 20)
    fork.set_aside(fork.checkpoints()[0], "a bad sector")
    newest = fork.latest_checkpoint()
    assert newest is not None
    assert newest.path.startswith(local_run.path)
    train(fork, 25)
    assert [row["step"] for row in fork.metrics()] == list(range(11, 26))


@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.sets(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=5,
    )
)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_life_has_one_row_a_step(tmp_path: Path, life: list[tuple[int, set[int]]]) -> None:
    """Attempts of some steps, after each of which some of the sound checkpoints turn out bad."""
    run = create_run(tmp_path, f"r{uuid.uuid4().hex}", make_test_spec(), PLAN)
    for done, bad in life:
        newest = run.latest_checkpoint()
        last = (newest.step if newest else 0) + done
        train(run, last, every=4)
        assert_one_row_a_step(run, last)
        for index, info in enumerate(run.checkpoints()):
            if index in bad:
                run.set_aside(info, "bad")
