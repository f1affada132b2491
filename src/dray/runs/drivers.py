"""Who may drive a run: one driver at a time, each with a number that fences off those before it.

A driver takes a run over by creating drivers/<number>.json, which nobody else can, and gives signs
of life beside it. Refuses a second driver while the first lives: on the same machine its process
tells, from elsewhere its signs of life.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from dray.errors import StoreError
from dray.runs.layout import DRIVERS, make_driver_file, parse_driver_file
from dray.runs.row_log import load_json, make_json, now, save_json
from dray.storage.exclusive import create_exclusive
from dray.storage.filesystem import TEMPORARY, delete_file, list_files, modified

HEARTBEAT_SECONDS = 15.0
"""How often a driver should give a sign of life."""
DEAD_SECONDS = 60.0
"""A driver on another machine without a sign of life for so long is gone."""
LOOK_SECONDS = 1.0
"""How often one that waits for another driver looks again."""
_held: set[str] = set()
"""Nonces of the holds that this process has now: one that it could not write the end of has ended
all the same."""


@dataclass(frozen=True)
class Driver:
    """A driver's hold on a run. `number` is the writer token: under a lower one than the newest
    nothing counts."""

    number: int
    nonce: str


def make_process() -> dict[str, Any]:
    """This process, so that others can tell whether it still runs: host, pid, started, machine."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _process_start(os.getpid()),
        "machine": _machine(),
    }


def is_gone(process: Mapping[str, Any]) -> bool | None:
    """Whether a process has ended; none where this machine cannot know, since it ran on another
    one."""
    if not os.path.isdir("/proc/self") or process.get("host") != socket.gethostname():
        return None
    if (
        process.get("machine", _machine()) != _machine()
    ):  # another container, or the machine was started anew
        return None
    return _process_start(int(process["pid"])) != process.get("started")


def newest_driver(filesystem: pafs.FileSystem, run_path: str) -> int:
    """Number of the driver that took the run over last; 0 if none has."""
    names = list_files(filesystem, f"{run_path}/{DRIVERS}")
    return max((parse_driver_file(name) or 0 for name in names), default=0)


def load_driver(filesystem: pafs.FileSystem, run_path: str) -> dict[str, Any] | None:
    """The newest driver's record: number, nonce, host, pid, started, machine, time, and `released`
    if it is."""
    folder, number = f"{run_path}/{DRIVERS}", newest_driver(filesystem, run_path)
    if not number:
        return None
    record = load_json(filesystem, f"{folder}/{make_driver_file(number)}")
    try:
        return record | load_json(filesystem, f"{folder}/{make_driver_file(number, '-end')}")
    except FileNotFoundError:
        return record


def take_over(
    filesystem: pafs.FileSystem, run_path: str, where: str, wait_seconds: float = 0.0
) -> Driver:
    """Become the run's driver. Raises StoreError while another one lives; one on another machine is
    waited for."""
    folder, deadline = f"{run_path}/{DRIVERS}", time.monotonic() + wait_seconds
    while True:
        before = load_driver(filesystem, run_path)
        if before is not None and "released" not in before:
            try:
                _check_gone(filesystem, folder, before, where)
            except StoreError:
                if is_gone(before) is not None or time.monotonic() >= deadline:
                    raise
                time.sleep(LOOK_SECONDS)
                continue
        driver = Driver(before["number"] + 1 if before else 1, uuid.uuid4().hex)
        record = {"number": driver.number, "nonce": driver.nonce, "time": now(), **make_process()}
        path = f"{folder}/{make_driver_file(driver.number)}"
        if create_exclusive(filesystem, path, make_json(record, indent=1)):
            _held.add(driver.nonce)
            return driver  # else another was faster: it is the one to be asked now


def check_free(filesystem: pafs.FileSystem, run_path: str, where: str) -> None:
    """Raise StoreError while a driver is at work on the run."""
    record = load_driver(filesystem, run_path)
    if record is not None and "released" not in record:
        _check_gone(filesystem, f"{run_path}/{DRIVERS}", record, where)


def heartbeat(filesystem: pafs.FileSystem, run_path: str, driver: Driver, where: str) -> None:
    """Give a sign of life: two requests. Raises StoreError if the run has been taken over."""
    check_driver(filesystem, run_path, driver.number, where)
    save_json(
        filesystem,
        f"{run_path}/{DRIVERS}/{make_driver_file(driver.number, '-beat')}",
        {"nonce": driver.nonce, "time": now()},
        durable=False,
    )


def release(filesystem: pafs.FileSystem, run_path: str, driver: Driver) -> None:
    """Let the next driver take over at once."""
    _held.discard(driver.nonce)
    save_json(
        filesystem,
        f"{run_path}/{DRIVERS}/{make_driver_file(driver.number, '-end')}",
        {"released": now()},
    )


def check_driver(filesystem: pafs.FileSystem, run_path: str, number: int, where: str) -> None:
    """Raise StoreError if a later driver than this one has taken the run over."""
    newest = newest_driver(filesystem, run_path)
    if newest > number:
        raise StoreError(
            where,
            f"driver {number} is over: driver {newest} has taken the run over",
            "one driver at a time",
            "leave the run to it, or stop it and start again",
        )


class Heart:
    """Gives a driver's signs of life while the block runs: `beat()` gives one, and `lost(error)` is
    called once another driver has taken over."""

    def __init__(self, beat: Callable[[], object], lost: Callable[[StoreError], object]) -> None:
        self._beat_once, self._lost = beat, lost
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heart", daemon=True)
        self.replaced: StoreError | None = None
        """What says so, if it has been replaced."""

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                self._beat_once()
            except (
                OSError
            ):  # StorageFailed too, which is a StoreError besides: the next beat may come through
                continue
            except StoreError as error:  # what this driver does from now on does not count
                self.replaced = error
                self._lost(error)
                return


def is_alive(
    filesystem: pafs.FileSystem, run_path: str, record: Mapping[str, Any], at: float
) -> bool:
    """Whether a driver that may run on another machine counts as alive at a time (seconds since
    1970)."""
    if "released" in record:
        return False
    gone = is_gone(record)
    if gone is not None:
        return not gone
    return (
        at - _last_seen(filesystem, f"{run_path}/{DRIVERS}", int(record["number"])) <= DEAD_SECONDS
    )


def _check_gone(
    filesystem: pafs.FileSystem, folder: str, record: Mapping[str, Any], where: str
) -> None:
    """Raise StoreError unless a driver's process is known to have ended, or it was silent for long
    enough."""
    gone = is_gone(record)
    if gone or (gone is False and record["pid"] == os.getpid() and record["nonce"] not in _held):
        return
    who = (
        f"driver {record['number']} (process {record['pid']} on {record['host']}, since "
        f"{record['time']})"
    )
    if gone is not None:
        raise StoreError(
            where,
            f"{who} is at work on it",
            "one driver at a time",
            f"wait for it, or stop it with `kill {record['pid']}`",
        )
    silent = _storage_time(filesystem, folder) - _last_seen(
        filesystem, folder, int(record["number"])
    )
    if silent <= DEAD_SECONDS:
        raise StoreError(
            where,
            f"{who} is at work on it",
            "one driver at a time",
            f"wait for it or stop it there: {DEAD_SECONDS:.0f} s without a sign of "
            "life end its hold",
        )


def _last_seen(filesystem: pafs.FileSystem, folder: str, number: int) -> float:
    """When the storage last saw a driver, by the storage's clock; by the driver's where the storage
    keeps no times."""
    return max(
        _written(filesystem, f"{folder}/{make_driver_file(number, suffix)}")
        for suffix in ("", "-beat")
    )


def _written(filesystem: pafs.FileSystem, path: str) -> float:
    """When a record was written; 0 if it is not there."""
    written = modified(filesystem, path)
    if written is not None:
        return written
    try:
        return datetime.fromisoformat(load_json(filesystem, path)["time"]).timestamp()
    except FileNotFoundError:
        return 0.0


def _storage_time(filesystem: pafs.FileSystem, folder: str) -> float:
    """The time by the storage's clock: two machines' own clocks may differ by more than a driver's
    silence."""
    path = f"{folder}/{TEMPORARY}clock-{uuid.uuid4().hex[:12]}"
    save_json(filesystem, path, {"time": now()}, durable=False)
    try:
        return _written(filesystem, path)
    finally:
        delete_file(filesystem, path)


def _machine() -> str:
    """The running system and its process numbers: two containers may share a host name, and a host
    may start anew."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """When a process started, in clock ticks since boot: tells it from a later one of the same
    number."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stream:
            fields = stream.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
