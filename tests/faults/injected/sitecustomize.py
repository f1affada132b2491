"""Faults at an exact place inside dray's own processes; on their PYTHONPATH only where a test puts it there.

DRAY_FAULT names `module:qualified.name:moment:flag file`: at the moment (`before` or `after`) of the first call of that
function in any process, the process kills itself with SIGKILL. The flag file is created with O_EXCL, so that of all
processes and attempts just one dies, once.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import os
import signal
import sys
from types import ModuleType
from typing import Any


def _die_once(flag: str) -> None:
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
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

    setattr(owner, name, dying)


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
