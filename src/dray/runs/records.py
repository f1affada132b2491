"""Records instead of loose fields: of attempts and their failures, and of what travels from the
ranks to the driver; pure, and safe to send.

A rank says what it is doing (`Beat`), reports each step (`StepReport`) and each validation
(`ValidationReport`), and tells what else happened (`Event`); the loop says at the end how it ended
(`Ended`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


def finite(value: object) -> float | None:
    """A number that says something; none where it is not finite, or not there. What is none ranks
    nothing and counts for nothing, and JSON has no other word for it."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True)
class AttemptRecord:
    """One start of the worker group, as its run keeps it."""

    number: int
    num_ranks: int
    start_step: int
    """Of the checkpoint that it goes on from; 0: from the initial weights. What earlier attempts
    did past it is undone."""
    started: str = ""
    driver: int = 0
    """The number of the driver that it belongs to."""
    checkpoint: str = ""
    """Path, below the storage, of the checkpoint that it goes on from."""
    left_out: tuple[int, ...] = ()
    """Batches that are never read (`order.LeftOut`): a rewind left them out."""
    micro_rows: int | None = None
    """The micro batch that memory allows by now, where it is smaller than the spec's."""
    ended: str = ""
    status: str = ""
    """How it ended; empty while it goes on, and for one that was killed with its driver."""
    end_step: int | None = None
    reason: str = ""

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> AttemptRecord:
        """From the two documents that a run keeps of it, merged. What only other versions write is
        not read. Raises KeyError, TypeError or ValueError for one that is none."""
        known = {item.name for item in fields(cls)} - {"number", "left_out"}
        return cls(
            number=int(document["attempt"]),
            left_out=tuple(document.get("left_out") or ()),
            **{name: value for name, value in document.items() if name in known},
        )

    def to_json(self) -> dict[str, Any]:
        """As `dray show --json` prints it: without what is not so, or not yet."""
        values = {"attempt": self.number, **asdict(self)}
        unset = {"number"} if self.status else {"number", "ended", "status", "reason"}
        return {
            name: value
            for name, value in values.items()
            if name not in unset and value is not None and value != ()
        }


@dataclass(frozen=True)
class RankFailure:
    """How one rank ended: what it said itself, or what others know of it."""

    rank: int | None
    """None: the driver."""
    attempt: int = 0
    step: int | None = None
    phase: str = ""
    node: str = ""
    pid: int | None = None
    time: float | None = None
    error_type: str = ""
    message: str = ""
    traceback: str = ""
    exit: str | int | None = None
    memory_share: float | None = None
    """Of its node's memory, in use when it was last heard of."""
    cause: str | None = None
    """Of a RankError: the rank ended the attempt on purpose."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Failure:
    """How an attempt failed. Its document is evidence, which `dray.doctor` reads as far as it
    goes: other versions may have written it, or a disk have damaged it."""

    attempt: int
    step: int
    committed_step: int
    """Of the newest checkpoint by then."""
    detected_by: str
    """hang, exception, or worker_exit."""
    ranks: tuple[RankFailure, ...]
    nodes_lost: tuple[str, ...] = ()
    preempted: bool = False
    time: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Beat:
    """A rank's present. `seconds` have passed since its phase began; `long`: it may be silent for
    long now."""

    rank: int
    attempt: int
    step: int
    phase: str
    long: bool
    seconds: float
    pid: int
    host: str
    stack_file: str = ""
    log_file: str = ""
    time: float = 0.0
    node_id: str = ""
    """Ray's name of the rank's node; empty without Ray."""
    node: str = ""
    """The node's address."""
    memory_share: float = 0.0
    """Of the node's memory, in use."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StepReport:
    """One rank's view of one optimiser update: what all agreed on before it, and what became of
    it."""

    rank: int
    attempt: int
    step: int
    num_ranks: int
    num_targets: int
    """Of the global batch."""
    learning_rate: float
    rows_digest: str
    tokens: int
    """That the run has trained on by then."""
    step_tokens: int
    data_wait_seconds: float
    loss_sum: float = math.nan
    """Over this rank's targets."""
    grad_norm: float = math.nan
    applied: bool = True
    """Whether the update was made: not where a loss or gradient was not finite."""
    seconds: float = 0.0
    forward_seconds: float = 0.0
    time: float = 0.0
    memory_bytes: int = 0


@dataclass(frozen=True)
class ValidationReport:
    """The metrics of a validation pass, merged over the ranks; none is one that is undefined."""

    attempt: int
    step: int
    values: Mapping[str, float | None]

    def to_row(self) -> dict[str, Any]:
        """As the run's log of validations keeps it."""
        return {"kind": "validation", "attempt": self.attempt, "step": self.step, **self.values}


@dataclass(frozen=True)
class Event:
    """Something that happened once, as the run's events keep it: its kind, and fields of its
    own."""

    kind: str
    attempt: int
    step: int
    fields: Mapping[str, Any] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        return {"kind": self.kind, "attempt": self.attempt, "step": self.step, **self.fields}


@dataclass(frozen=True)
class Ended:
    """How the loop ended on rank 0: completed, early_stopped or interrupted."""

    how: str


Report = StepReport | ValidationReport | Event | Ended
