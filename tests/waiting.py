"""Waiting for what other processes do, and finding and ending those that a test started."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import psutil

T = TypeVar("T")


def wait_for(
    look: Callable[[], T], what: str, seconds: float = 300, instead: Callable[[], object] = str
) -> T:
    """What `look` gives once it is something true. Raises TimeoutError that says what did not
    come, and what is there `instead`."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s {instead()}")
        time.sleep(0.1)
    return found


def processes_named(word: str, of: psutil.Process | None = None) -> list[psutil.Process]:
    """Descendants of a process (by default this one) whose command line has the word: only what a
    test started."""
    found = []
    for process in (of or psutil.Process()).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if word in " ".join(process.cmdline()):
                found.append(process)
    return found


def rank_processes(of: psutil.Process | None = None) -> list[psutil.Process]:
    """Those that compute."""
    return processes_named("RayTrainWorker", of)


def kill_all(process: psutil.Process) -> list[psutil.Process]:
    """SIGKILL to a process and all of its descendants at once, as where a machine loses its power;
    which those were."""
    everything = [process]
    with suppress(psutil.NoSuchProcess):
        everything += process.children(recursive=True)
    for one in everything:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    return everything
