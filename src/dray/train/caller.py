"""The caller of `train` while its run goes on: what it is told, and when it wants the run to stop.

Its functions are called in its own thread, between other things, so they need no locks; while one
runs, nothing of what the ranks say is stored. What one of them raises stops the run as a wish to
stop does: the state is saved, and the error is raised when all has ended.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dray.errors import caught, one_line
from dray.processes.signals import Wishes
from dray.redaction import redact

Observer = Callable[[Mapping[str, Any]], object]
"""Gets each metrics row, of steps and of validations, once, in the order in which they are stored:
steps in theirs, validations in theirs."""
Stop = Callable[[], object]
"""Whether the run is to stop after the step that is being done: anything true, e.g. the reason."""


@dataclass(frozen=True)
class Wish:
    """That a run saves its state and stops."""

    reason: str
    number: int | None = None
    """Of the signal that asked for it; None: the caller did."""


class Caller:
    """What a call of `train` was given to tell and to ask."""

    def __init__(self, observer: Observer | None = None, stop: Stop | None = None) -> None:
        self._observer, self._stop = observer, stop
        self._wish: Wish | None = None
        self.error: BaseException | None = None
        """What one of its functions raised; none is called any more then."""
        self.complaint = ""
        """The same in words."""

    def tell(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Tell of rows that have been stored."""
        for row in rows:
            if self._observer is not None and self.error is None:
                self._call("observer", self._observer, dict(row))

    def wish(self, signals: Wishes | None = None) -> Wish | None:
        """Why the run is to stop, if it is: the first reason stays, but for a signal, which is
        for the whole program."""
        if signals and (self._wish is None or self._wish.number is None):
            number = signals.numbers[0]
            self._wish = Wish(f"stopped by {signal.Signals(number).name}", number)
        if self._wish is None and self._stop is not None and self.error is None:
            said = self._call("stop", self._stop)
            if said:
                self._wish = Wish(said if isinstance(said, str) else "the caller asked for it")
        return self._wish

    def give_up(self, reason: str) -> None:
        """Have the run stop for a reason that is not the caller's."""
        self._wish = self._wish or Wish(reason)

    def _call(self, name: str, function: Callable[..., object], *values: object) -> object:
        """Whatever the caller's code raises must not tear a record apart."""
        said, error = caught(lambda: function(*values))
        if error is not None:
            self.error = error
            self.complaint = redact(f"{name} raised {type(error).__name__}: {one_line(error)}")
            self.give_up(self.complaint)
        return said
