"""What asks a process to stop: Ctrl-C, SIGTERM (`docker stop`, a batch system, Kubernetes), SIGHUP
(a closed terminal).

The first one is a wish, which raises `Stopped` or is noted for the loop that asks. The second one
raises at once, and ends the process for good if it is still there HARD_SECONDS later; the third one
ends it now. Only the main thread of a process is told of signals.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HARD_SECONDS = 20.0


class Stopped(KeyboardInterrupt):
    """A signal asked this process to stop; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")


class Wishes:
    """The signals that have come so far, in order."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.noting = False
        """Whether the first one is noted, so that it finds no record half taken, and raises
        nothing."""
        self.over = threading.Event()

    def __bool__(self) -> bool:
        return bool(self.numbers)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.numbers.append(number)
        if len(self.numbers) > 2:
            os._exit(128 + number)
        if len(self.numbers) == 2:
            threading.Thread(target=self._end_later, args=(number,), daemon=True).start()
        if len(self.numbers) == 2 or not self.noting:
            raise Stopped(number)

    def _end_later(self, number: int) -> None:
        if not self.over.wait(HARD_SECONDS):
            os._exit(128 + number)


@contextmanager
def stops(*, noted: bool = False) -> Iterator[Wishes]:
    """The wishes to stop that come while the block runs. Inside another such block the two share
    them.

    SIGHUP is left alone where it is ignored: `nohup` asks for that.
    """
    outer = signal.getsignal(signal.SIGINT)
    wishes = outer if isinstance(outer, Wishes) else Wishes()
    if threading.current_thread() is not threading.main_thread():
        yield Wishes()
        return
    before, noting = {number: signal.getsignal(number) for number in STOPS}, wishes.noting
    wishes.noting = noted
    for number, handler in before.items():
        if number != signal.SIGHUP or handler != signal.SIG_IGN:
            signal.signal(number, wishes)
    try:
        yield wishes
    finally:
        wishes.noting = noting
        if wishes is not outer:
            wishes.over.set()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def kept_handlers() -> Iterator[None]:
    """Put the handlers back that the block replaces, as `ray.init` does with SIGTERM's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if isinstance(handler, Wishes):
                signal.signal(number, handler)


def note_in_this_process() -> None:
    """From now on SIGTERM is noted (`is_noted`), and a second one ends the process. For a rank,
    which saves and leaves after its step; main thread only."""
    if not isinstance(signal.getsignal(signal.SIGTERM), _Note):
        signal.signal(signal.SIGTERM, _Note())


def is_noted() -> bool:
    """Whether `note_in_this_process` has been called here, and a signal has come."""
    handler = signal.getsignal(signal.SIGTERM)
    return isinstance(handler, _Note) and handler.noted


class _Note:
    def __init__(self) -> None:
        self.noted = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.noted:
            os._exit(128 + number)
        self.noted = True
