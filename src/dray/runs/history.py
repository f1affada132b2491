"""The one history that the rows of all attempts make, read without holding it: in order, from its
end, or in outline.

What an attempt did past the start of a later one was undone, and is left out. Memory does not grow
with the run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dray.runs.compaction import summarize
from dray.runs.row_log import RowLog, make_history, make_limits

MAX_LOSSES = 480
"""So many means of an outline's losses are kept; neighbours are joined beyond that."""

Row = dict[str, Any]


@dataclass
class Outline:
    """A run's metrics on a page."""

    num_steps: int = 0
    first_loss: float | None = None
    losses: list[float | None] = field(default_factory=list)
    """Means of the loss over equal stretches, about; none where no loss was finite."""
    seconds: float = 0.0
    memory_bytes_max: float = 0.0
    tokens: int | None = None

    def add(self, summary: Mapping[str, Any]) -> None:
        """Go on with the next steps, as `compaction.summarize` has them."""
        if not summary.get("rows"):
            return
        self.first_loss = summary["first_loss"] if not self.num_steps else self.first_loss
        self.num_steps += summary["rows"]
        self.seconds += summary["seconds"]
        self.memory_bytes_max = max(self.memory_bytes_max, summary["memory_bytes_max"])
        self.tokens = summary["tokens"]
        self.losses += summary["losses"]
        while len(self.losses) > MAX_LOSSES:
            self.losses = [_mean(self.losses[at : at + 2]) for at in range(0, len(self.losses), 2)]


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def iterate_history(
    log: RowLog, start_steps: Mapping[int, int], columns: Sequence[str] | None = None
) -> Iterator[Row]:
    """One row a step, by step, one after another, with the keys in `columns` or all.

    `start_steps`: attempt → the step it started from. Rows that were logged twice or out of order,
    which only a foreign writer leaves, are put right in memory.
    """
    wanted = None if columns is None else list(dict.fromkeys(("step", "attempt", *columns)))
    last, in_order = -math.inf, True
    for row in _rows_by_attempt(log, start_steps, ("step", "attempt")):
        in_order, last = in_order and row["step"] > last, row["step"]
    rows = _rows_by_attempt(log, start_steps, wanted)
    yield from rows if in_order else make_history(rows, start_steps)


def _rows_by_attempt(
    log: RowLog, start_steps: Mapping[int, int], columns: Sequence[str] | None
) -> Iterator[Row]:
    limits = make_limits(start_steps)
    for _, name in sorted((_attempt_of(name), name) for name in log.names()):
        for row in log.iterate(name, columns):
            if row["step"] <= limits.get(row["attempt"], math.inf):
                yield row


def last_rows(
    log: RowLog, start_steps: Mapping[int, int], count: int | None = None, since: int = 0
) -> list[Row]:
    """The last `count` rows of the history, by step, and none of a step before `since`; read from
    its end."""
    while True:
        try:
            return _last_rows(log, start_steps, count, since)
        except FileNotFoundError:
            continue  # it was compacted meanwhile


def _last_rows(
    log: RowLog, start_steps: Mapping[int, int], count: int | None, since: int
) -> list[Row]:
    limits, found = make_limits(start_steps), dict[int, Row]()
    for attempt, name in sorted(((_attempt_of(name), name) for name in log.names()), reverse=True):
        for rows in log.newest_first(name):
            for row in reversed(rows):
                if since <= row["step"] <= limits.get(row["attempt"], math.inf):
                    found.setdefault(int(row["step"]), row)
            # What is older is of lower steps, but for rows that a later attempt logged again.
            if (count is not None and len(found) >= count) or (
                rows and min(row["step"] for row in rows) < since
            ):
                break
        if (count is not None and len(found) >= count) or start_steps.get(attempt, since) < since:
            break
    steps = sorted(found)
    return [found[step] for step in (steps if count is None else steps[-count:])]


def make_outline(log: RowLog, start_steps: Mapping[int, int]) -> Outline:
    """The history in outline: of what was compacted only the footers are read, where they tell
    enough."""
    while True:
        try:
            return _make_outline(log, start_steps)
        except FileNotFoundError:
            continue


def _make_outline(log: RowLog, start_steps: Mapping[int, int]) -> Outline:
    limits, outline, last = make_limits(start_steps), Outline(), -math.inf
    for attempt, name in sorted((_attempt_of(name), name) for name in log.names()):
        limit = limits.get(attempt, math.inf)
        for summary, read in log.summaries(name):
            if not (
                summary.get("ordered")
                and summary["first_step"] > last
                and summary["last_step"] <= limit
            ):
                found = {int(row["step"]): row for row in read() if last < row["step"] <= limit}
                rows = [found[step] for step in sorted(found)]
                summary = summarize(rows)
                if len(rows) <= MAX_LOSSES:
                    summary["losses"] = [row.get("loss") for row in rows]
            if summary.get("rows"):
                outline.add(summary)
                last = summary["last_step"]
    return outline


def _attempt_of(name: str) -> int:
    match = re.fullmatch(r"a(\d+)", name)
    return int(match[1]) if match else 0
