"""Every error that dray raises on purpose, and the one vocabulary of causes.

    DrayError                     exit code 1: never raised itself
    ├── UserError                 exit code 2: the user's mistake; nothing was written
    │   ├── SpecError             a spec that cannot be loaded, or contradicts itself
    │   ├── PlanError             a sound spec that does not fit the cluster
    │   │   └── ServerGone        a server of jobs does not answer, or broke off
    │   ├── CorpusError           data that cannot become a corpus
    │   └── StoreError            a storage place, run or checkpoint that cannot be used
    │       ├── StorageFailed     the storage failed for good, or longer than is waited for
    │       ├── StorageNotShared  a node sees another storage than the driver
    │       └── CheckpointsLost   a run had committed steps, and none of its checkpoints can be used
    ├── RankError                 what a rank ends an attempt with, on purpose
    │   ├── CheckpointDamaged     a committed checkpoint is no longer what it was
    │   ├── ReadsDiffer           a rank reads a checkpoint otherwise than another
    │   ├── GroupDissolved        a machine is taken away, or the group gets another size
    │   ├── SaveFailed            checkpoints can no longer be committed
    │   ├── BadNumbers            losses or gradients are not finite
    │   └── LossSpike             the loss leapt, and its rows are to be left out
    ├── RunFailed                 exit code 3: a run that began and could not end
    │   ├── JobLost               its job is lost: nobody knows how it ended
    │   └── StoppedWaiting        it was told to stop before it had a place to begin in
    └── Interrupted               exit code 130 (128 + the signal): stopped on request, state saved

A `UserError` says four things in one line: where, what, the rule, the way out. Exceptions that a
room both raises and catches stay in that room.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import ClassVar, TypeVar

T = TypeVar("T")

_STEERING = re.compile(
    "[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]|\r(?!\n)"
)


def visible(text: str) -> str:
    """The text with those signs escaped that would steer a terminal, break a line where nobody sees
    it, or turn round what stands there: names and documents come from anybody."""
    return _STEERING.sub(lambda sign: f"\\u{ord(sign[0]):04x}", text)


class Cause(StrEnum):
    """Why a run or an attempt ended. Records, recovery, doctor and docs use these words and no
    others."""

    HEALTHY = "healthy"
    GPU_MEMORY = "gpu_memory"
    HOST_MEMORY = "host_memory"
    HANG = "hang"
    STRAGGLER = "straggler"
    DATA = "data"
    STORAGE = "storage"
    CHECKPOINT = "checkpoint"
    """A committed checkpoint is damaged."""
    NUMERICS = "numerics"
    SPIKE = "spike"
    """The loss leapt; the run goes back and leaves those rows out."""
    PREEMPTION = "preemption"
    NODE_LOSS = "node_loss"
    KILLED = "killed"
    CONFIGURATION = "configuration"
    CODE = "code"
    INTERRUPTED = "interrupted"
    UNKNOWN = "unknown"


class DrayError(Exception):
    """The root of the tree."""

    exit_code = 1


class UserError(DrayError):
    """A mistake that its maker can mend: `where: what; rule; way out`.

    The parts are kept as they are given, so that a program can read them too.
    """

    exit_code = 2

    def __init__(self, where: str, what: str, rule: str = "", way_out: str = "") -> None:
        self.where, self.what, self.rule, self.way_out = where, what, rule, way_out
        tail = "; ".join(part for part in (what, rule, way_out) if part)
        super().__init__(visible(f"{where}: {tail}".replace("\n", " ")))

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str, str]]:
        # Crosses process borders (Ray) with its parts intact.
        return type(self), (self.where, self.what, self.rule, self.way_out)


class SpecError(UserError):
    """The spec is missing, malformed, out of range or contradictory."""


class PlanError(UserError):
    """The spec is sound but does not fit the cluster it was planned for."""


class ServerGone(PlanError):
    """A server of jobs does not answer, or broke off while it did."""


class CorpusError(UserError):
    """The data named by the spec cannot become a corpus."""


class StoreError(UserError):
    """A storage place, a run or a checkpoint cannot be used."""


class StorageFailed(StoreError, OSError):
    """The storage failed for good, or longer than is waited for: one line for a person, an OSError
    for a program."""

    def __init__(
        self, where: str, what: str, rule: str = "", way_out: str = "", number: int | None = None
    ) -> None:
        super().__init__(where, what, rule, way_out)
        self.errno = number

    def __reduce__(self) -> tuple[type[StorageFailed], tuple[str, str, str, str, int | None]]:  # type: ignore[override]
        return type(self), (self.where, self.what, self.rule, self.way_out, self.errno)


class StorageNotShared(StoreError):
    """A node sees another storage than the driver does."""


class CheckpointsLost(StoreError):
    """A run had committed steps, and none of its checkpoints can be used."""


class RankError(DrayError):
    """What a rank ends an attempt with, on purpose. Whatever else failed beside it, `cause` is the
    attempt's."""

    cause: ClassVar[Cause]


class CheckpointDamaged(RankError):
    """A checkpoint was committed and is no longer what it was; it is set aside by now."""

    cause = Cause.CHECKPOINT


class ReadsDiffer(RankError):
    """A rank reads a checkpoint otherwise than another rank does, who reads what was committed."""

    cause = Cause.STORAGE


class GroupDissolved(RankError):
    """A machine is about to be taken away, or the group is to have another size; what was reached
    is saved."""

    cause = Cause.PREEMPTION


class SaveFailed(RankError):
    """Checkpoints can no longer be committed."""

    cause = Cause.STORAGE


class BadNumbers(RankError):
    """Training cannot go on: its losses or gradients are not finite."""

    cause = Cause.NUMERICS


class LossSpike(RankError):
    """The loss leapt at `step`, and the run wants to go back and leave those rows out."""

    cause = Cause.SPIKE

    def __init__(self, step: int, message: str) -> None:
        self.step = step
        super().__init__(message)

    def __reduce__(self) -> tuple[type[LossSpike], tuple[int, str]]:
        return type(self), (self.step, str(self))


class RunFailed(DrayError):
    """A run that began and could not end; `diagnosis` says why and what to do."""

    exit_code = 3

    def __init__(self, message: str, diagnosis: str = "") -> None:
        self.diagnosis = diagnosis
        super().__init__(message)

    def __reduce__(self) -> tuple[type[RunFailed], tuple[str, str]]:
        return type(self), (str(self), self.diagnosis)


class JobLost(RunFailed):
    """The server of jobs knows a job no more, or is gone: how it ended is not known."""


class StoppedWaiting(RunFailed):
    """A run that was told to stop before it had a place to begin in."""


class Interrupted(DrayError):
    """Stopped on request by a signal; `step` is the step of the newest checkpoint, 0 if there is
    none. `state` says in words what is saved of something else than a run."""

    def __init__(self, step: int, number: int = signal.SIGINT, state: str = "") -> None:
        self.step, self.number, self.exit_code, self.state = step, number, 128 + number, state
        saved = f"state saved at step {step}" if step else "nothing had been saved yet"
        super().__init__(f"interrupted by {signal.Signals(number).name}; {state or saved}")

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int, int, str]]:
        return type(self), (self.step, self.number, self.state)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type; at most 200 characters."""
    return next(iter(str(error).strip().splitlines()), "")[:200] or type(error).__name__


def one_line(error: BaseException | str) -> str:
    """An error's whole message on one line, or the name of its type; at most 400 characters. The
    same of a text."""
    return " ".join(str(error).split())[:400] or type(error).__name__


def caught(
    work: Callable[[], T], kind: type[BaseException] = Exception
) -> tuple[T | None, BaseException | None]:
    """What the work gives, or the error that it ends with: for work whose failure must not end the
    one who asks, whatever it is, or is to be raised in another thread."""
    try:
        return work(), None
    except kind as error:
        return None, error


@contextmanager
def translated(make: Callable[[Exception], DrayError]) -> Iterator[None]:
    """Turn foreign errors of the block into those of dray's that `make` gives for them.

    For calls into libraries that raise whatever their authors chose. dray's own errors pass.
    """
    try:
        yield
    except DrayError:
        raise
    except Exception as error:
        raise make(error) from error
