"""Evidence of failures: kept and read on every kind of storage; what is damaged is left out."""

from __future__ import annotations

import json

from dray.runs import Run
from dray.runs.evidence import (
    TAIL_BYTES,
    load_beats,
    load_failures,
    load_log,
    load_stacks,
    make_rank_failure,
    save_beat,
    save_failure,
    save_log,
    save_stacks,
    stack_path,
    unwrap,
)
from dray.runs.records import Failure
from dray.storage.filesystem import list_files, read_bytes, write_bytes


def test_what_is_saved_is_read(run: Run) -> None:
    assert (load_failures(run), load_log(run, 1, 0), load_stacks(run, 1), load_beats(run, 1)) == (
        [],
        [],
        {},
        {},
    )
    save_log(run, 1, 1, "x" * (TAIL_BYTES + 5) + "\nlast words\n")
    save_log(run, 2, 1, "another attempt's")
    save_stacks(run, 1, 12345, "Thread 0x1 (most recent call first):\n")
    save_beat(run, 1, 1, {"step": 3, "phase": "data"})
    killed = make_rank_failure(1, exit="SIGKILL")
    save_failure(run, Failure(1, 3, 0, "worker_exit", (killed,)))
    later = {"attempt": 12, "reason": "no cluster"}  # of another version
    write_bytes(run.filesystem, f"{run.path}/failures/a0012.json", json.dumps(later).encode())
    assert load_log(run, 1, 1)[-1] == "last words"
    assert len(load_log(run, 1, 1)[0]) < TAIL_BYTES
    assert load_log(run, 2, 1) == ["another attempt's"]
    assert list(load_stacks(run, 1)) == [12345]
    assert load_beats(run, 1) == {1: {"rank": 1, "step": 3, "phase": "data"}}
    first, second = load_failures(run)
    assert (first["attempt"], first["step"], first["ranks"][0]["exit"]) == (1, 3, "SIGKILL")
    assert (second["attempt"], second["ranks"], second["reason"]) == (12, [], "no cluster")


def test_no_secret_is_kept(run: Run) -> None:
    secret = "wJalrXUtnFEMIK7MDENG"
    save_log(run, 1, 0, f"AWS_SECRET_ACCESS_KEY={secret}\nlast words\n")
    save_stacks(run, 1, 0, f"s3://me:{secret}@bucket")
    save_beat(run, 1, 0, {"password": secret})
    told = make_rank_failure(0, OSError(f"s3://b?secret_key={secret}"))
    save_failure(run, Failure(1, 3, 0, "exception", (told,)))
    for folder in ("logs", "stacks", "beats", "failures"):
        (name,) = list_files(run.filesystem, f"{run.path}/{folder}")
        assert secret not in read_bytes(run.filesystem, f"{run.path}/{folder}/{name}").decode()
    assert load_log(run, 1, 0)[-1] == "last words"


def test_damage_is_left_out(run: Run) -> None:
    for attempt in (1, 2):
        save_failure(run, Failure(attempt, 3, 0, "worker_exit", ()))
    save_beat(run, 1, 0, {"step": 3})
    write_bytes(run.filesystem, f"{run.path}/failures/a0001.json", b"{")
    write_bytes(run.filesystem, f"{run.path}/failures/notes.txt", b"a person's")
    write_bytes(run.filesystem, f"{run.path}/beats/a0001-r00000.json", b"[]")
    write_bytes(run.filesystem, stack_path(run, 1, 0), b"\xff\xfe")
    assert [failure["attempt"] for failure in load_failures(run)] == [2]
    assert load_beats(run, 1) == {}
    assert load_stacks(run, 1) == {0: "\ufffd\ufffd"}


def test_an_error_is_freed_of_its_wrappers() -> None:
    class Wrapper(Exception):
        def __init__(self, cause: BaseException | None) -> None:
            super().__init__("outer")
            self.cause = cause

    inner = KeyError("no such column")
    assert unwrap(Wrapper(Wrapper(inner))) is inner
    assert str(unwrap(Wrapper(None))) == "outer"
    record = make_rank_failure(2, Wrapper(inner), node="a", step=7)
    assert (record.error_type, record.node, record.step, record.exit) == (
        "builtins.KeyError",
        "a",
        7,
        None,
    )
    assert record.traceback.startswith("KeyError")
