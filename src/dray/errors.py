"""Every error that dray raises on purpose.

    DrayError                     exit code 1: never raised itself
    ├── UserError                 exit code 2: the user's mistake; nothing was written
    │   ├── SpecError             a spec that cannot be loaded, or contradicts itself
    │   ├── PlanError             a sound spec that does not fit the cluster
    │   ├── CorpusError           data that cannot become a corpus
    │   └── StoreError            a storage place, run or checkpoint that cannot be used
    ├── RunFailed                 exit code 3: a run that began and could not end
    └── Interrupted               exit code 130 (128 + the signal): stopped on request, state saved

A `UserError` says four things in one line: where, what, the rule, the way out.
"""

from __future__ import annotations

import signal


class DrayError(Exception):
    """The root of the tree."""

    exit_code = 1


class UserError(DrayError):
    """A mistake that its maker can mend: `where: what; rule; way out`.

    The parts are kept as attributes, so that a program can read them too.
    """

    exit_code = 2

    def __init__(self, where: str, what: str, rule: str = "", way_out: str = "") -> None:
        self.where, self.what, self.rule, self.way_out = where, what, rule, way_out
        tail = "; ".join(part for part in (what, rule, way_out) if part)
        super().__init__(f"{where}: {tail}".replace("\n", " "))

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str, str]]:
        # Crosses process borders (Ray) with its parts intact.
        return type(self), (self.where, self.what, self.rule, self.way_out)


class SpecError(UserError):
    """The spec is missing, malformed, out of range or contradictory."""


class PlanError(UserError):
    """The spec is sound but does not fit the cluster it was planned for."""


class CorpusError(UserError):
    """The data named by the spec cannot become a corpus."""


class StoreError(UserError):
    """A storage place, a run or a checkpoint cannot be used."""


class RunFailed(DrayError):
    """A run that began and could not end; `diagnosis` says why and what to do."""

    exit_code = 3

    def __init__(self, message: str, diagnosis: str = "") -> None:
        self.diagnosis = diagnosis
        super().__init__(message)

    def __reduce__(self) -> tuple[type[RunFailed], tuple[str, str]]:
        return type(self), (str(self), self.diagnosis)


class Interrupted(DrayError):
    """Stopped on request by a signal; `step` is the step of the newest checkpoint, 0 if there is none."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number, self.exit_code = step, number, 128 + number
        state = f"state saved at step {step}" if step else "nothing had been saved yet"
        super().__init__(f"interrupted by {signal.Signals(number).name}; {state}")

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int, int]]:
        return type(self), (self.step, self.number)
