"""Faults at an exact place inside dray's own processes; on their PYTHONPATH, and asleep until a
test names a fault.

The file that DRAY_FAULT_FILE names holds, once a test has written it,
`module:qualified.name:moment:flag file[:action]`: at the moment (`before` or `after`) of the first
call of that function in any process, the process does the action; `before 8` is before its eighth
call in that process. The flag file is created with O_EXCL, so that of all processes and attempts
just one does it, once; for the flag file `always` all do it each time. At the moment `late` the
function returns False for PAUSE_SECONDS from the first time on that it had True to return; at the
moment `slow` every call takes PAUSE_SECONDS longer, in all processes.

A module is armed when it is loaded, or, in a fork of a process that had loaded it, when that
begins.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import importlib.abc
import importlib.machinery
import os
import resource
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _fail() -> None:
    raise RuntimeError("a mistake in the code")


def _leak() -> None:
    """As a library that says in its error how it was called."""
    kept = {name: text for name, text in os.environ.items() if name in _SECRETS}
    uris = [f"s3://me:{text}@bucket/x?secret_key={text}" for text in kept.values()]
    raise RuntimeError(f"{kept} {' '.join(kept.values())} {' '.join(uris)}")


def _deadlock() -> None:
    """Lock a mutex twice, with the interpreter's lock held: no other thread of this process ever
    runs again."""
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def _hasten_clock() -> None:
    """From now on this process' clock is an hour fast: a stand-in, since all processes of a machine
    share one."""
    original, hour = time.time, datetime.timedelta(hours=1)

    class Fast(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime.now(tz) + hour

    time.time = lambda: original() + hour.total_seconds()
    for name, module in list(sys.modules.items()):
        if name.startswith("dray.") and getattr(module, "datetime", None) is datetime.datetime:
            module.datetime = Fast  # type: ignore[attr-defined]


def _starve() -> None:
    """From now on this process may have just a little more memory than it has."""
    kilobytes = int(Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (kilobytes * 1024 + 2**24, resource.RLIM_INFINITY))


_SECRETS = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD")

ACTIONS = {
    "kill": _kill,
    "stop": _stop,
    "fail": _fail,
    "leak": _leak,
    "deadlock": _deadlock,
    "hasten_clock": _hasten_clock,
    "starve": _starve,
}


PAUSE_SECONDS = 3.0


def _is_first(flag: str) -> bool:
    if flag == "always":
        return True
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _arm(module: ModuleType, qualified: str, moment: str, flag: str, action: str = "kill") -> None:
    *owners, name = qualified.split(".")
    owner: Any = module
    for part in owners:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    armed_for = _named_fault()
    if getattr(original, "armed_for", None) == armed_for:
        return
    late_until, calls = 0.0, 0
    moment, _, nth = moment.partition(" ")

    @functools.wraps(original)
    def faulty(*arguments: Any, **named: Any) -> Any:
        nonlocal late_until, calls
        if _named_fault() != armed_for:  # of an earlier test
            return original(*arguments, **named)
        if moment == "slow":
            time.sleep(PAUSE_SECONDS)
        calls += 1
        if moment == "before" and calls >= int(nth or 1) and _is_first(flag):
            ACTIONS[action]()
        result = original(*arguments, **named)
        if moment == "after" and _is_first(flag):
            ACTIONS[action]()
        if moment == "late" and result and _is_first(flag):
            late_until = time.monotonic() + PAUSE_SECONDS
        return result if time.monotonic() >= late_until else False

    faulty.armed_for = armed_for  # type: ignore[attr-defined]
    for holder in [
        owner,
        *(other for path, other in list(sys.modules.items()) if path.startswith("dray.")),
    ]:
        if vars(holder).get(name) is original:  # other modules have imported it by name
            setattr(holder, name, faulty)


def _named_fault() -> list[str]:
    file = Path(os.environ.get("DRAY_FAULT_FILE", "/dev/null"))
    text = file.read_text() if file.exists() else ""
    return text.split(":") if text else []


class _Finder(importlib.abc.MetaPathFinder):
    """Arms the module of the fault, if one is named by then, once it has been loaded by whoever
    finds it."""

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("dray."):
            return None
        fault = _named_fault()
        if not fault or fault[0] != name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec and spec.loader:
            load = spec.loader.exec_module

            def load_and_arm(module: ModuleType) -> None:
                load(module)
                _arm(module, *fault[1:])

            spec.loader.exec_module = load_and_arm  # type: ignore[method-assign]
        return spec


def _arm_what_is_loaded() -> None:
    fault = _named_fault()
    if fault and fault[0] in sys.modules:
        _arm(sys.modules[fault[0]], *fault[1:])


if "DRAY_FAULT_FILE" in os.environ:
    os.register_at_fork(after_in_child=_arm_what_is_loaded)
    sys.meta_path.insert(0, _Finder())
