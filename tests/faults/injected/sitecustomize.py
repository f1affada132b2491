"""Faults at an exact place inside dray's own processes; on their PYTHONPATH only where a test puts it there.

DRAY_FAULT names `module:qualified.name:moment:flag file`: at the moment (`before` or `after`) of the first call of that
function in any process, the process kills itself with SIGKILL. The flag file is created with O_EXCL, so that of all
processes and attempts just one dies, once. At the moment `late` the process lives, but the function returns None for
LATE_SECONDS from the first time on that it had something to return. At the moment `slow` every call takes SLOW_SECONDS
longer, in all processes.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time
from types import ModuleType
from typing import Any

LATE_SECONDS = SLOW_SECONDS = 3.0


def _is_first(flag: str) -> bool:
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _die_once(flag: str) -> None:
    if _is_first(flag):
        os.kill(os.getpid(), signal.SIGKILL)


def _arm(module: ModuleType, qualified: str, moment: str, flag: str) -> None:
    *owners, name = qualified.split(".")
    owner: Any = module
    for part in owners:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    @functools.wraps(original)
    def dying(*arguments: Any, **named: Any) -> Any:
        if moment == "before":
            _die_once(flag)
        result = original(*arguments, **named)
        if moment == "after":
            _die_once(flag)
        return result

    late_until = 0.0

    @functools.wraps(original)
    def late(*arguments: Any, **named: Any) -> Any:
        nonlocal late_until
        result = original(*arguments, **named)
        if result is not None and _is_first(flag):
            late_until = time.monotonic() + LATE_SECONDS
        return result if time.monotonic() > late_until else None

    @functools.wraps(original)
    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(SLOW_SECONDS)
        return original(*arguments, **named)

    setattr(owner, name, {"late": late, "slow": slow}.get(moment, dying))


class _Finder(importlib.abc.MetaPathFinder):
    """Arms the module once it has been loaded by whoever finds it."""

    def __init__(self, name: str, *fault: str) -> None:
        self.name, self.fault = name, fault

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec and spec.loader:
            load = spec.loader.exec_module

            def load_and_arm(module: ModuleType) -> None:
                load(module)
                _arm(module, *self.fault)

            spec.loader.exec_module = load_and_arm  # type: ignore[method-assign]
        return spec


if "DRAY_FAULT" in os.environ:
    sys.meta_path.insert(0, _Finder(*os.environ["DRAY_FAULT"].split(":")))
