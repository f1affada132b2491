"""What a person sees while a run goes on: one live line on a terminal, plain log lines elsewhere.

Everything goes to stderr; stdout belongs to results. Nothing here decides anything.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from dray.errors import visible
from dray.plan import format_bytes, format_seconds
from dray.processes.streams import Forgiving
from dray.redaction import redact

LOG_EVERY_SECONDS = 5.0
_LOGGED_STEP = re.compile(r"step (?P<step>\d+)/(?P<num_steps>\d+)  loss ")
_live_line = threading.Lock()
"""A terminal has one live line: of several runs at once in a process the others are logged."""


class Display:
    """Shows steps, validations and remarks of one run."""

    def __init__(self, stream: TextIO | None = None) -> None:
        forgiving = cast(
            TextIO, Forgiving(stream or sys.stderr)
        )  # a closed terminal must not end a run
        self._console = Console(file=forgiving, highlight=False, soft_wrap=True)
        self._live: Progress | None = None
        self._bar: TaskID | None = None
        self._logged_at = 0.0
        self._first: tuple[int, float] | None = None

    @contextmanager
    def steps(self, num_steps: int, done: int) -> Iterator[None]:
        """Show the steps of a run while the body runs."""
        self._num_steps, self._first = num_steps, None
        if not self._console.is_terminal or not _live_line.acquire(blocking=False):
            yield
            return
        try:
            with self._shown_live(num_steps, done):
                yield
        finally:
            _live_line.release()

    @contextmanager
    def _shown_live(self, num_steps: int, done: int) -> Iterator[None]:
        columns = (BarColumn(bar_width=20), TextColumn("{task.description}"))
        with Progress(
            *columns, console=self._console, transient=True, refresh_per_second=4
        ) as self._live:
            self._bar = self._live.add_task("starting …", total=num_steps, completed=done)
            yield
        self._live = None

    def step(self, row: Mapping[str, Any]) -> None:
        """Show one row of the run's metrics."""
        step, now = int(row["step"]), time.monotonic()
        self._first = self._first or (step, now)
        text = self._line(row, now)
        if self._live is not None and self._bar is not None:
            self._live.update(self._bar, completed=step, description=text)
        elif now - self._logged_at >= LOG_EVERY_SECONDS or step == self._num_steps:
            self._logged_at = now
            self.say(text)

    def validation(self, step: int, values: Mapping[str, float | None]) -> None:
        """Show the metrics of one validation."""
        self.say(f"step {step}  validation  {format_values(values)}")

    @contextmanager
    def relaying(self) -> Iterator[Callable[[str], None]]:
        """Shows lines that a Display elsewhere has logged as that would show them here: steps move
        a live line on a terminal."""
        with ExitStack() as stack:

            def show(line: str) -> None:
                found = _LOGGED_STEP.match(line)
                if found is None or not self._console.is_terminal:
                    self.say(line)
                    return
                step, num_steps = int(found["step"]), int(found["num_steps"])
                if self._live is None:
                    stack.enter_context(self.steps(num_steps, step))
                if self._live is None or self._bar is None:  # another one is shown already
                    self.say(line)
                    return
                self._live.update(
                    self._bar,
                    total=num_steps,
                    completed=step,
                    description=_as_text(line),
                    refresh=True,
                )

            yield show

    def say(self, text: str) -> None:
        """Show one remark on a line of its own."""
        self._console.print(visible(redact(text)), markup=False)

    def _line(self, row: Mapping[str, Any], now: float) -> str:
        step = int(row["step"])
        first_step, first_time = self._first or (step, now)
        parts = [
            f"step {step}/{self._num_steps}",
            f"loss {format_loss(row['loss'])}",
            f"{row['tokens_per_second']:,.0f} tokens/s",
        ]
        if row.get("mfu") is not None:
            parts.append(f"MFU {row['mfu']:.0%}")
        if step > first_step:
            left = (now - first_time) / (step - first_step) * (self._num_steps - step)
            parts.append(f"ETA {format_seconds(left)}")
        parts.append(f"{format_bytes(row['memory_bytes_max'])} a rank")
        return "  ".join(parts)


def _as_text(line: str) -> str:
    """A line from elsewhere, without signs that steer a terminal or style a text."""
    return escape(visible(redact(line)))


def format_loss(loss: float | None) -> str:
    """A loss with four digits; none is one that was not finite."""
    return "not finite" if loss is None else f"{loss:.4f}"


def format_values(values: Mapping[str, float | None]) -> str:
    """Metrics by name on one line."""
    shown = {name: "undefined" if v is None else f"{v:.6g}" for name, v in values.items()}
    return "  ".join(f"{name.replace('_', ' ')} {text}" for name, text in shown.items())
