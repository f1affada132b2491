"""What happens to the trials of a sweep, as its log keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from dray.errors import StoreError
from dray.sweep.space import Value

COMPLETED, PRUNED, DIVERGED, FAILED, STOPPED = (
    "completed",
    "pruned",
    "diverged",
    "failed",
    "stopped",
)
"""How a start of a trial ends: at its own end; by the scheduler; with a loss that is not finite; by
an error; with the sweep, which may go on."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A trial starts, or starts again."""

    kind: ClassVar[str] = "begun"
    trial: int
    """From 1 on."""
    drawing: int
    """Which of the search's drawings it tries, from 0 on."""
    repeat: int
    """Which repetition of it, from 0 on; each has a seed of its own."""
    start: int
    """Which start of the trial, from 1 on."""
    drawn: dict[str, Value]
    """Path → what the search drew."""
    parameters: dict[str, Value]
    """Path → what the trial's spec has."""
    until_step: int | None = None
    """It pauses there; none: it goes to its end."""
    parent: int = 0
    """The trial from whose checkpoint it goes on; 0: none."""
    parent_step: int = 0
    """That checkpoint's step."""


@dataclass(frozen=True, slots=True)
class Reported:
    """A trial was validated."""

    kind: ClassVar[str] = "reported"
    trial: int
    step: int
    progress: float
    """How far that is, in steps of the sweep's own batch."""
    value: float | None
    """Of the sweep's metric; none: not finite."""
    tokens: int = 0
    """That it has trained on so far."""
    seconds: float = 0.0
    """That its steps took so far."""
    metrics: dict[str, float] = field(default_factory=dict)
    """All that the validation measured, as far as it is finite."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A start of a trial is over."""

    kind: ClassVar[str] = "ended"
    trial: int
    status: str
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cause: str = ""
    """Of a failure, as `dray doctor` names it."""
    reason: str = ""


Event = Begun | Reported | Ended
_KINDS: dict[str, type[Begun] | type[Reported] | type[Ended]] = {
    kind.kind: kind for kind in (Begun, Reported, Ended)
}


def to_json(event: Event) -> dict[str, Any]:
    """An event as a row of the log."""
    return {"kind": event.kind, **asdict(event)}


def from_json(row: Mapping[str, Any], where: str) -> Event:
    """An event from a row of the log. Raises StoreError for one that is none."""
    try:
        kind = _KINDS[row["kind"]]
        known = {item.name for item in fields(kind)}
        return kind(**{name: value for name, value in row.items() if name in known})
    except (KeyError, TypeError) as error:
        raise StoreError(
            where,
            f"holds a row that is no event of a sweep ({type(error).__name__}: {error})",
            way_out="put the file back from a copy of the sweep",
        ) from error
