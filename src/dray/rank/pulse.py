"""What a rank is doing right now, for those who watch it; and how to make it say where it stands
when it hangs.

The loop says which phase it enters; nothing else here runs in its thread. Stack dumps are written
by C code in the signal handler, so that a rank that holds the interpreter's lock for ever can still
be seen into.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable

from dray.plan import used_memory_share
from dray.runs.records import Beat

STACK_SIGNAL = signal.SIGUSR1
LONG_PHASES = frozenset({"start", "build", "restore", "save"})
"""Phases in which a rank may say nothing for long without being stuck: libraries that build,
allocate or pin gigabytes hold the interpreter's lock meanwhile, and no thread of Python's runs."""


class Pulse:
    """One rank's present: phase, step, and since when.

    Its first step is long too, since it compiles. A phase that may be silent is announced as it
    begins: once it holds the lock it is too late to say so.
    """

    def __init__(self, rank: int) -> None:
        self.rank, self.is_warm = rank, False
        self.announce: Callable[[], None] = lambda: None
        """Sends a beat at once."""
        self.attempt, self.step, self.phase, self._since = 0, 0, "start", time.monotonic()
        self.stack_file = ""

    def enter(self, phase: str, step: int | None = None) -> None:
        """Say that a phase begins, at a step if it changed."""
        self.phase, self._since = phase, time.monotonic()
        self.step = self.step if step is None else step
        if phase in LONG_PHASES:
            self.announce()

    @property
    def is_long(self) -> bool:
        """Whether it may be silent for long now."""
        return self.phase in LONG_PHASES or not self.is_warm

    def beat(self, node_id: str = "", node: str = "") -> Beat:
        """The present; `node_id` and `node` (its address) are Ray's names of the node."""
        return Beat(
            rank=self.rank,
            attempt=self.attempt,
            step=self.step,
            phase=self.phase,
            long=self.is_long,
            seconds=time.monotonic() - self._since,
            pid=os.getpid(),
            host=socket.gethostname(),
            stack_file=self.stack_file,
            log_file=_stderr_file(),
            time=time.time(),
            node_id=node_id,
            node=node,
            memory_share=used_memory_share(),
        )

    def dump_stacks_on_signal(self) -> None:
        """From now on STACK_SIGNAL writes the stacks of all threads into a file of this machine."""
        stream = tempfile.TemporaryFile("w", encoding="utf-8")  # noqa: SIM115 - the stream must outlive the handler
        faulthandler.register(STACK_SIGNAL, file=stream, all_threads=True, chain=False)
        # A file without a name: nobody can put another in its place, and it ends with the process.
        self._stream, self.stack_file = stream, f"/proc/{os.getpid()}/fd/{stream.fileno()}"


def _stderr_file() -> str:
    """The file that this process' standard error goes to, where it is one."""
    try:
        return os.readlink("/proc/self/fd/2")
    except OSError:
        return ""
