"""One driver at a time: real processes that are killed, stopped or far away, on a disk and on
S3."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from dray.errors import StoreError
from dray.runs import CheckpointInfo, CheckpointWriter, Driver, Run, create_run
from dray.runs.drivers import is_gone, make_process
from dray.runs.row_log import load_json, save_json
from dray.storage.filesystem import list_files, read_bytes, write_bytes
from races import go, start
from sharded_model import PLAN, SHAPES, make_fragments, make_test_spec, make_whole, save

TAKE_OVER = """
import sys
from dray.errors import StoreError
from dray.runs import Run
run = Run.open(sys.argv[1], "speeches")
print("ready", flush=True)
sys.stdin.readline()
try:
    print("won", run.take_over().number, flush=True)
except StoreError as error:
    print("refused", error, flush=True)
sys.stdin.read()
"""


def answer(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline()


def end(child: subprocess.Popen[str]) -> None:
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()


def send_away(run: Run, driver: Driver, seconds: float = 0.0) -> None:
    """Make the driver one of another machine, last seen so many seconds ago."""
    path = f"{run.path}/drivers/{driver.number:04d}.json"
    save_json(run.filesystem, path, load_json(run.filesystem, path) | {"host": "elsewhere"})
    if seconds:
        past = time.time() - seconds
        for name in list_files(run.filesystem, f"{run.path}/drivers"):
            os.utime(f"{run.path}/drivers/{name}", (past, past))


def test_one_after_the_other(run: Run) -> None:
    assert run.driver() is None
    first = run.take_over()
    assert first.number == 1
    with pytest.raises(
        StoreError,
        match=rf"driver 1 \(process {os.getpid()} on .* is at work on "
        r"it.*kill",
    ) as caught:
        run.take_over()
    assert "\n" not in str(caught.value)
    run.heartbeat(first)
    run.release(first)
    second = run.take_over()
    assert second.number == 2
    assert second.nonce != first.nonce
    newest = run.driver()
    assert newest is not None
    assert (newest["number"], newest["nonce"], newest["pid"]) == (2, second.nonce, os.getpid())
    assert "released" not in newest
    with pytest.raises(StoreError, match="driver 1 is over: driver 2 has taken the run over"):
        run.heartbeat(first)
    run.heartbeat(second)
    run.release(first)
    with pytest.raises(StoreError, match="driver 2"):
        run.take_over()


def test_of_several_at_once_one_wins(run: Run) -> None:
    children = [start(TAKE_OVER, run.storage) for _ in range(4)]
    for child in children:
        go(child)
    answers = [answer(child) for child in children]
    assert sorted(text.split()[0] for text in answers) == ["refused", "refused", "refused", "won"]
    assert all("driver 1" in text for text in answers if text.startswith("refused"))
    with pytest.raises(StoreError, match="driver 1"):
        run.take_over()
    for child in children:
        end(child)
    assert run.take_over().number == 2, "a killed driver holds nothing"


def test_a_stopped_process_is_alive(local_run: Run) -> None:
    child = start(TAKE_OVER, local_run.storage)
    go(child)
    assert answer(child) == "won 1\n"
    os.kill(child.pid, signal.SIGSTOP)
    with pytest.raises(StoreError, match=f"kill {child.pid}"):
        local_run.take_over()
    end(child)
    assert local_run.take_over().number == 2


def test_a_driver_elsewhere_lives_by_its_signs_of_life(
    local_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = local_run.take_over()
    local_run.set_status("running")
    local_run.update(driver=local_run.record()["driver"] | {"host": "elsewhere"})
    send_away(local_run, first, seconds=59)
    with pytest.raises(StoreError, match=r"on elsewhere.*60 s without a sign of life"):
        local_run.take_over()
    assert local_run.status == "running"
    send_away(local_run, first, seconds=62)
    assert local_run.status == "interrupted"
    local_run.heartbeat(first)
    assert local_run.status == "running"
    with pytest.raises(StoreError, match="is at work on it"):
        local_run.take_over()
    send_away(local_run, first, seconds=62)
    assert local_run.take_over().number == 2
    names = list_files(local_run.filesystem, f"{local_run.path}/drivers")
    assert sorted(names) == ["0001-beat.json", "0001.json", "0002.json"], "nothing else is left"


def test_clocks_that_differ_do_not_matter(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is the storage's: what a far driver, or this machine, takes for the time is not
    asked."""
    first = run.take_over()
    send_away(run, first)
    real = time.time
    for shift in (-86400, 86400):
        monkeypatch.setattr(time, "time", lambda shift=shift: real() + shift)
        with pytest.raises(StoreError, match="is at work on it"):
            run.take_over()


def test_one_that_waits_for_a_driver_elsewhere(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dray.runs.drivers.DEAD_SECONDS", 2.0)
    monkeypatch.setattr("dray.runs.drivers.LOOK_SECONDS", 0.1)
    send_away(run, run.take_over())
    assert run.take_over(wait_seconds=30).number == 2
    begun = time.monotonic()
    with pytest.raises(StoreError, match="is at work"):
        run.take_over(wait_seconds=30)
    assert time.monotonic() - begun < 10, "one on this machine that lives is not waited for"


def test_on_a_filesystem_without_times() -> None:
    """Many of fsspec's keep none that pyarrow passes on: then what the driver wrote down counts."""
    run = create_run(f"memory://{uuid.uuid4().hex}", "speeches", make_test_spec(), PLAN)
    first = run.take_over()
    send_away(run, first)
    with pytest.raises(StoreError, match="is at work"):
        run.take_over()
    run.heartbeat(first)
    for name in ("0001.json", "0001-beat.json"):
        path = f"{run.path}/drivers/{name}"
        record = load_json(run.filesystem, path) | {"time": "2020-01-01T00:00:00.000+00:00"}
        save_json(run.filesystem, path, record)
    assert run.take_over().number == 2


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        ({}, False),
        ({"started": "1"}, True),
        ({"host": "elsewhere"}, None),
        ({"machine": "another boot"}, None),
        ({"pid": 2**22 + 1}, True),
    ],
)
def test_who_is_gone(change: dict[str, object], gone: bool | None) -> None:
    assert is_gone(make_process() | change) is gone


def test_a_process_that_nobody_has_waited_for_is_gone() -> None:
    child = subprocess.Popen(["sleep", "60"])
    fields = Path(f"/proc/{child.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    process = make_process() | {"pid": child.pid, "started": fields[19]}
    assert is_gone(process) is False
    os.kill(child.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert is_gone(process) is True
    child.wait()


# ---- fencing -----------------------------------------------------------------------------------


def write_and_wait(
    run: Run, step: int, attempt: int
) -> tuple[CheckpointWriter, list[object], dict[str, object]]:
    """A checkpoint all of whose files are written, and which is not committed yet."""
    writer, whole = CheckpointWriter(run, step, attempt), make_whole(step)
    files: list[object] = [
        writer.write_rank(rank, 2, make_fragments(whole, rank, 2)) for rank in range(2)
    ]
    return writer, files, {"shapes": SHAPES, "step": step}


def take_over_from(run: Run, driver: Driver) -> Driver:
    """As if the driver's machine had gone silent."""
    path = f"{run.path}/drivers/{driver.number:04d}.json"
    save_json(run.filesystem, path, load_json(run.filesystem, path) | {"pid": 2**22 + 1})
    return run.take_over()


def test_a_replaced_driver_commits_nothing(run: Run) -> None:
    first = run.take_over()
    attempt = run.begin_attempt(2, 0, driver=first.number)
    assert run.attempts()[0].driver == 1
    save(run, 10, attempt=attempt)
    writer, files, metadata = write_and_wait(run, 20, attempt)
    second = take_over_from(run, first)
    with pytest.raises(StoreError, match="driver 1 is over: driver 2 has taken the run over"):
        writer.commit(files, metadata)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="driver 1 is over"):
        run.begin_attempt(2, 10, driver=first.number)
    assert [info.step for info in run.checkpoints()] == [10]
    later = run.begin_attempt(2, 10, driver=second.number)
    with pytest.raises(StoreError, match="attempt 1 is over: attempt 2 has begun"):
        writer.commit(files, metadata)  # type: ignore[arg-type]
    save(run, 20, attempt=later)
    assert [(info.step, info.attempt) for info in run.checkpoints()] == [(10, 1), (20, 2)]
    assert run.begin_attempt(1, 20) == 3, "without a driver it is the newest's"
    assert run.attempts()[-1].driver == 2


def test_what_a_stale_attempt_does_late_is_harmless(run: Run) -> None:
    """Between the last look and the marker another driver takes over: its attempt undoes what lies
    past its start."""
    first = run.take_over()
    attempt = run.begin_attempt(2, 0, driver=first.number)
    before = save(run, 10, attempt=attempt)
    later: list[int] = []

    class Overtaken(CheckpointWriter):
        def _check_current(self) -> None:
            super()._check_current()
            newest = run.latest_checkpoint()
            assert newest is not None
            later.append(
                run.begin_attempt(2, newest.step, driver=take_over_from(run, first).number)
            )

    _, files, metadata = write_and_wait(run, 20, attempt)
    late = Overtaken(run, 20, attempt).commit(files, metadata)  # type: ignore[arg-type]
    assert run.latest_checkpoint() == before
    assert run.checkpoints(verified_only=False)[-1].problem == "undone: attempt 2 started before it"
    run.log_metrics([{"step": step, "attempt": attempt, "loss": 1.0} for step in range(1, 21)])
    run.log_metrics([{"step": step, "attempt": later[0], "loss": 2.0} for step in range(11, 21)])
    run.set_status("failed", "late", driver=first)
    assert run.record()["status"] == "created", "what it says of the run is not recorded"
    assert [(row["step"], row["attempt"]) for row in run.metrics()] == [
        *((step, 1) for step in range(1, 11)),
        *((step, 2) for step in range(11, 21)),
    ]
    own = save(run, 20, attempt=later[0])
    assert run.latest_checkpoint() == own
    assert own.path != late.path


def test_an_attempt_that_a_stale_driver_recorded_late_is_none(run: Run) -> None:
    """A driver that was overtaken in the middle of `begin_attempt` leaves a record; it undoes
    nothing."""
    first = run.take_over()
    run.begin_attempt(2, 0, driver=first.number)
    save(run, 10, attempt=1)
    second = take_over_from(run, first)
    attempt = run.begin_attempt(2, 10, driver=second.number)
    stale = {"attempt": 3, "num_ranks": 2, "start_step": 0, "started": "", "driver": 1, "nonce": ""}
    write_bytes(run.filesystem, f"{run.path}/attempts/0003.json", json.dumps(stale).encode())
    assert [info.step for info in run.checkpoints()] == [10]
    save(run, 20, attempt=attempt)
    assert [info.step for info in run.checkpoints()] == [10, 20]
    with pytest.raises(StoreError, match="driver 1 is over: driver 2 has taken the run over"):
        save(run, 30, attempt=3)
    assert run.begin_attempt(2, 20, driver=second.number) == 4
    assert [info.step for info in run.checkpoints()] == [10, 20]


COMMIT_LATE = """
import sys, torch
from dray.runs import CheckpointWriter, Run
run = Run.open(sys.argv[1], "speeches")
driver = run.take_over()
attempt = run.begin_attempt(1, 0, driver=driver.number)
writer = CheckpointWriter(run, 20, attempt)
file = writer.write_rank(0, 1, {"w|param|0": torch.zeros(10)})
print("written", flush=True)
sys.stdin.readline()
try:
    writer.commit([file], {"shapes": {"w": [10]}})
    print("committed", flush=True)
except Exception as error:
    print(type(error).__name__, error, flush=True)
"""


def test_a_driver_that_wakes_up_after_it_was_replaced(local_run: Run) -> None:
    """A real process, stopped before its marker like a suspended machine, and set going again
    afterwards."""
    child = subprocess.Popen(
        [sys.executable, "-c", COMMIT_LATE, local_run.storage],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert answer(child) == "written\n"
    os.kill(child.pid, signal.SIGSTOP)
    send_away(local_run, Driver(1, ""), seconds=70)
    second = local_run.take_over()
    os.kill(child.pid, signal.SIGCONT)
    go(child)
    assert answer(child).startswith("StoreError ")
    child.communicate()
    assert local_run.latest_checkpoint() is None
    attempt = local_run.begin_attempt(1, 0, driver=second.number)
    info = save(local_run, 20, num_ranks=1, attempt=attempt)
    assert local_run.latest_checkpoint() == info


def test_signs_of_life_are_cheap(run: Run) -> None:
    driver = run.take_over()
    begun = time.monotonic()
    for _ in range(10):
        run.heartbeat(driver)
    assert (time.monotonic() - begun) / 10 < 1.0
    assert b"nonce" in read_bytes(run.filesystem, f"{run.path}/drivers/0001-beat.json")
    info: CheckpointInfo = save(run, 5, attempt=run.begin_attempt(2, 0))
    assert info.verified
