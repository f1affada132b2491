"""One trial: a run of its own, by `train`, that tells the sweep how it does and is told to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from dray.cluster.placement import Placement
from dray.corpus.prepare import Corpus
from dray.doctor import diagnose
from dray.errors import (
    Cause,
    RunFailed,
    StoppedWaiting,
    StorageFailed,
    UserError,
    caught,
    one_line,
)
from dray.redaction import redact
from dray.runs import Run, find_resume_checkpoint
from dray.runs.layout import make_trial_name
from dray.runs.records import finite
from dray.show.progress import Display
from dray.spec import Spec, make_spec
from dray.sweep.events import (
    COMPLETED,
    DIVERGED,
    FAILED,
    STOPPED,
    Begun,
    Ended,
    Reported,
)
from dray.sweep.space import Space, with_values
from dray.sweep.study import Scale
from dray.train import train

BAD_NUMBERS = frozenset({Cause.NUMERICS, Cause.SPIKE})
"""Causes of a trial that is a result, and a bad one."""


@dataclass(frozen=True)
class Cadence:
    """When trials are validated, in steps of the sweep's own batch; none: as the spec says."""

    every_steps: int | None

    def steps(self, spec: Spec, scale: Scale) -> int | None:
        """The same for a trial, whose batch may be another one."""
        if self.every_steps is None:
            return spec.validation.every_steps
        if scale.counts_steps:
            return self.every_steps
        own = self.every_steps * scale.global_rows / spec.batch.global_rows
        return max(1, round(own))


def make_trial_spec(
    tree: Mapping[str, Any], space: Space, begun: Begun, scale: Scale, cadence: Cadence
) -> Spec:
    """The spec of a trial. Raises SpecError for values that do not go together."""
    spec = make_spec(with_values(tree, begun.parameters), make_trial_name("trial", begun.trial))
    validation: dict[str, Any] = {"every_steps": cadence.steps(spec, scale)}
    if space.metric is not None:
        validation["metric"] = space.metric
    return spec.model_copy(update={"validation": spec.validation.model_copy(update=validation)})


class Tally:
    """What a trial has trained on itself, whichever of its starts did it."""

    def __init__(self, run: Run | None, tokens_before: int = 0) -> None:
        self._before = tokens_before
        self.tokens, self.seconds, self.step = 0, 0.0, 0
        newest = find_resume_checkpoint(run) if run is not None else None
        if run is None or newest is None:
            return
        for row in run.iterate_history(["step", "tokens", "seconds"]):
            if int(row["step"]) <= newest.step:
                self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in a row of the run's metrics."""
        self.step = int(row["step"])
        self.tokens = int(row.get("tokens") or 0) - self._before  # rows count from the first step
        self.seconds += float(row.get("seconds") or 0.0)


def run_trial(
    spec: Spec,
    begun: Begun,
    *,
    sweep: str,
    storage: str,
    corpus: Corpus,
    placement: Placement,
    metric: str,
    scale: Scale,
    report: Callable[[Reported], None],
    stop: Callable[[], str],
    judged: Callable[[], str],
    display: Display,
) -> Ended:
    """Train a trial, or go on with it, and tell how it ended; whatever happens in it ends it alone.

    `report` gets each validation, of earlier starts too. `stop()` says why it is to stop, if it is.
    `judged()` says how it ends if the sweep itself had it stop: fallen behind or diverged.
    """
    name, number = make_trial_name(sweep, begun.trial), begun.trial
    run = Run.find(storage, name)
    tally = Tally(run, _tokens_of(storage, sweep, begun))

    def tell(row: Mapping[str, Any]) -> None:
        step = int(row["step"])
        if finite(row.get(metric)) is None and finite(row.get("loss")) is not None:
            return  # the held-out rows do not define the metric: the run itself has said so
        report(
            Reported(
                number,
                step,
                scale.progress(step, spec.batch.global_rows),
                finite(row.get(metric)),
                tally.tokens,
                tally.seconds,
                {
                    key: value
                    for key in spec.task.metrics
                    if (value := finite(row.get(key))) is not None
                },
            )
        )

    def observe(row: Mapping[str, Any]) -> None:
        if row.get("kind") == "validation":
            tell(row)
        else:
            tally.add(row)

    def ended(status: str, cause: str = "", reason: str = "") -> Ended:
        return Ended(number, status, tally.step, tally.tokens, tally.seconds, cause, reason)

    for row in run.validations() if run is not None else ():
        if int(row["step"]) <= tally.step:  # stored, but its driver was gone before it told of it
            tell(row)
    if how := judged():
        return ended(how)
    done, error = caught(
        partial(
            train,
            spec,
            storage=storage,
            run_name=make_trial_name(sweep, begun.parent) if begun.parent else name,
            fork=name if begun.parent else None,
            until_step=begun.until_step,
            corpus=corpus,
            placement=placement,
            observer=observe,
            stop=stop,
            display=display,
        )
    )
    if error is not None:  # also a mistake of dray's own ends one trial, not the sweep
        if isinstance(error, StoppedWaiting):  # it has not begun
            return ended(STOPPED, reason=str(error))
        cause, why = _explain(error, storage, name)
        status = DIVERGED if cause in BAD_NUMBERS else judged() or FAILED
        return ended(status, cause, redact(why))
    if how := judged():  # also of one that came to its end before it heard of it
        return ended(how)
    if done is not None and done.status == "stopped":
        return ended(STOPPED, reason=done.reason)
    return ended(COMPLETED)


def _explain(error: BaseException, storage: str, name: str) -> tuple[str, str]:
    """The cause of a failure, in the words of `dray doctor`, and a sentence about it."""
    if isinstance(error, RunFailed):
        run = Run.find(storage, name)
        found = caught(partial(diagnose, run))[0] if run is not None else None
        if found is not None:
            return found.fault, found.cause
        return Cause.UNKNOWN, one_line(error)
    if isinstance(error, StorageFailed):
        return Cause.STORAGE, one_line(error)
    if isinstance(error, UserError):
        return Cause.CONFIGURATION, one_line(error)
    return Cause.CODE, f"{type(error).__name__}: {one_line(error)}"


def _tokens_of(storage: str, sweep: str, begun: Begun) -> int:
    """What the trial from whose checkpoint this one goes on had trained on by then."""
    parent = Run.find(storage, make_trial_name(sweep, begun.parent)) if begun.parent else None
    if parent is None:
        return 0
    rows = parent.iterate_history(["step", "tokens"])
    before = [int(row["tokens"]) for row in rows if int(row["step"]) <= begun.parent_step]
    return max(before, default=0)
