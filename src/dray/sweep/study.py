"""The state of a sweep, made of its events alone: which trials there are, what comes next, what is
to stop, what was best. Nothing here reads or writes.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dray.errors import Cause
from dray.spec import Spec
from dray.sweep.events import (
    COMPLETED,
    DIVERGED,
    FAILED,
    PRUNED,
    STOPPED,
    Begun,
    Ended,
    Event,
    Reported,
)
from dray.sweep.policies import Policy
from dray.sweep.population import Population
from dray.sweep.search import Known, draw
from dray.sweep.space import Space, Value, settle

RUNNING, WAITING = "running", "waiting"
STATUSES = (RUNNING, WAITING, COMPLETED, PRUNED, DIVERGED, FAILED, STOPPED)
"""A trial that has no end yet: at work, or to be taken up again."""
HOPELESS = frozenset({Cause.CONFIGURATION, Cause.DATA, Cause.NUMERICS, Cause.SPIKE})
"""Causes that come back whoever tries again."""


@dataclass
class Trial:
    """One run of a sweep."""

    number: int
    drawing: int
    repeat: int
    drawn: Mapping[str, Value]
    parameters: Mapping[str, Value]
    parent: int = 0
    """The trial from whose checkpoint it went on; 0: none."""
    parent_step: int = 0
    status: str = RUNNING
    starts: int = 1
    reports: list[Reported] = field(default_factory=list)
    """By step; until it was judged to stop."""
    is_judged: bool = False
    """It has fallen behind, or its loss is not finite: it stops, and what it still says does not
    count."""
    failures: list[str] = field(default_factory=list)
    """Causes, of one start after the other."""
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cause: str = ""
    reason: str = ""

    @property
    def is_over(self) -> bool:
        return self.status not in (RUNNING, WAITING)

    @property
    def is_waiting(self) -> bool:
        return self.status == WAITING

    def begun_again(self, until_step: int | None = None) -> Begun:
        """The event of its next start."""
        return Begun(
            self.number,
            self.drawing,
            self.repeat,
            self.starts + 1,
            dict(self.drawn),
            dict(self.parameters),
            until_step=until_step,
            parent=self.parent,
            parent_step=self.parent_step,
        )

    def best(self, sign: int) -> Reported | None:
        """Its best report; `sign` is -1 where higher is better."""
        finite = [report for report in self.reports if report.value is not None]
        return min(
            finite, key=lambda report: (sign * (report.value or 0.0), report.step), default=None
        )


@dataclass(frozen=True)
class Best:
    """What a sweep has found."""

    trial: Trial
    """Of the best drawing, the best of its repeats."""
    value: float
    """The mean over the repeats."""
    deviation: float | None
    """Standard deviation between them; none for one."""
    is_complete: bool
    """Whether its trials went to their end."""


@dataclass(frozen=True)
class Cost:
    """What trials took."""

    hours: float
    gpu_hours: float
    money: float
    """At the budget's price of an hour of a worker; 0 without one."""


@dataclass(frozen=True)
class Scale:
    """How trials are measured."""

    mode: str
    """Of the metric: `min` or `max`."""
    total_steps: int
    """Of a run by the spec as it is."""
    global_rows: int
    """Of its batch."""
    seed: int
    """Of the spec."""
    gpus: float = 0.0
    """That a trial holds."""
    workers: int = 1
    counts_steps: bool = False
    """Whether a step is a step whatever its batch, as in a population."""

    @property
    def sign(self) -> int:
        return 1 if self.mode == "min" else -1

    def progress(self, step: int, global_rows: int) -> float:
        """How far a trial with another batch has come after a step, in steps of the spec's own."""
        return float(step) if self.counts_steps else step * global_rows / self.global_rows


class Study:
    """All that is known of a sweep."""

    def __init__(
        self, space: Space, tree: Mapping[str, Any], spec: Spec, scale: Scale, policy: Policy
    ) -> None:
        self.space, self.scale = space, scale
        self.trials: dict[int, Trial] = {}
        self.tree, self.spec, self._policy = tree, spec, policy
        self._population = Population(self) if space.scheduler.name == "pbt" else None

    # ---- what happened --------------------------------------------------------------------------

    def apply(self, event: Event) -> None:
        """Take an event in. They count in the order in which they are recorded."""
        if isinstance(event, Begun):
            self._begin(event)
        elif isinstance(event, Reported):
            self._report(event)
        else:
            self._end(event)

    def _begin(self, event: Begun) -> None:
        trial = self.trials.get(event.trial)
        if trial is None:
            self.trials[event.trial] = Trial(
                event.trial,
                event.drawing,
                event.repeat,
                event.drawn,
                event.parameters,
                event.parent,
                event.parent_step,
            )
            return
        trial.status, trial.starts = RUNNING, event.start

    def _report(self, event: Reported) -> None:
        trial = self.trials[event.trial]
        if not self.counts(event):
            return
        trial.reports.append(event)
        trial.step, trial.tokens, trial.seconds = event.step, event.tokens, event.seconds
        value = math.nan if event.value is None else event.value
        fell_behind = self._policy.judge(event.trial, event.progress, value)
        trial.is_judged = event.value is None or (
            fell_behind and event.progress < self.scale.total_steps
        )

    def counts(self, event: Reported) -> bool:
        """Whether a report is news: not of a trial that is stopping, nor said again by one that
        goes on from a checkpoint before."""
        trial = self.trials[event.trial]
        return not trial.is_judged and (not trial.reports or event.step > trial.reports[-1].step)

    def _end(self, event: Ended) -> None:
        trial = self.trials[event.trial]
        if trial.is_over:
            return
        trial.status = event.status
        trial.step = max(trial.step, event.step)
        trial.tokens, trial.seconds = (
            max(trial.tokens, event.tokens),
            max(trial.seconds, event.seconds),
        )
        trial.cause, trial.reason = event.cause, event.reason
        if event.status == STOPPED:
            trial.status = WAITING
        if event.status == FAILED:
            trial.failures.append(event.cause)
            if event.cause not in HOPELESS and len(trial.failures) <= self.space.retries:
                trial.status = WAITING
        if trial.is_over:
            self._policy.end(event.trial)

    def interrupt(self) -> None:
        """The driver that ran them is gone: its trials are to be taken up again."""
        for trial in self.trials.values():
            if trial.status == RUNNING:
                trial.status = WAITING

    # ---- what comes next ------------------------------------------------------------------------

    def next(self) -> Begun | Ended | None:
        """What is to be recorded next so that a trial can begin: its beginning, or, for one whose
        driver ended before it had been stopped, its end. None: nothing can begin now."""
        if self.ruin():
            return None
        for trial in self.trials.values():
            if not trial.is_waiting:
                continue
            if verdict := self.verdict(trial.number):
                return Ended(trial.number, verdict, trial.step, trial.tokens, trial.seconds)
            if self._population is None:
                return trial.begun_again()
        if self._population is not None:
            return self._population.next()
        if not self._may_draw():
            return None
        number = self.next_number
        drawing, repeat = divmod(number - 1, self.space.repeats)
        if repeat:
            drawn = dict(self.trials[number - 1].drawn)
        else:
            drawn = draw(self.space, drawing, self.known(), self.scale.mode, self.tree)
        parameters = settle(self.space, drawn, self.spec)
        if self.space.repeats > 1:
            parameters["seed"] = self.scale.seed + repeat
        return Begun(number, drawing, repeat, 1, drawn, parameters)

    @property
    def next_number(self) -> int:
        """Of a trial that is new."""
        return len(self.trials) + 1

    @property
    def can_begin(self) -> bool:
        """Whether `next` has something, without a draw."""
        if self.ruin():
            return False
        waiting = [trial for trial in self.trials.values() if trial.is_waiting]
        if self._population is not None:
            judged = any(trial.is_judged for trial in waiting)
            return judged or self._population.next() is not None
        if waiting:
            return True
        return self._may_draw()

    def _may_draw(self) -> bool:
        """Whether neither the budget nor the combinations of a grid are used up."""
        wanted = self.num_wanted
        return not self.spent() and (wanted is None or len(self.trials) < wanted)

    def verdict(self, number: int) -> str:
        """How a trial ends that the sweep has stop: `pruned` or `diverged`; empty: it goes on."""
        trial = self.trials[number]
        if not trial.is_judged:
            return ""
        return DIVERGED if trial.reports[-1].value is None else PRUNED

    def spent(self) -> str:
        """Which limit of the budget is used up; empty: none. The driver looks at the clock."""
        budget, cost = self.space.budget, self.cost()
        used = {
            "trials": (budget.trials, float(len(self.trials))),
            "steps": (budget.steps, float(sum(trial.step for trial in self.trials.values()))),
            "tokens": (budget.tokens, float(sum(trial.tokens for trial in self.trials.values()))),
            "gpu_hours": (budget.gpu_hours, cost.gpu_hours),
            "money": (budget.money, cost.money),
        }
        return next(
            (name for name, (limit, has) in used.items() if limit is not None and has >= limit), ""
        )

    def cost(self) -> Cost:
        """What the trials' steps took so far."""
        hours = sum(trial.seconds for trial in self.trials.values()) / 3600
        price = self.space.budget.price_per_hour or 0.0
        return Cost(hours, hours * self.scale.gpus, hours * self.scale.workers * price)

    def ruin(self) -> str:
        """The cause by which too many trials were lost for the sweep to go on; empty: none."""
        lost = Counter(trial.cause for trial in self.trials.values() if trial.status == FAILED)
        cause, count = (lost.most_common(1) or [("", 0)])[0]
        return cause if count >= self.space.max_failures else ""

    @property
    def num_wanted(self) -> int | None:
        """How many trials there will be, as far as that is known."""
        return self.space.num_trials

    # ---- what was found -------------------------------------------------------------------------

    def best(self) -> Best | None:
        """The drawing with the best mean: of those whose trials all went to their end, else of
        those that reported anything."""
        sign, found = self.scale.sign, list[tuple[bool, float, Best]]()
        is_bred = self._population is not None
        groups = [[trial] for trial in self.trials.values()] if is_bred else self._drawings()
        for trials in groups:
            reports = [(trial, report) for trial in trials if (report := trial.best(sign))]
            if not reports or any(trial.status in (DIVERGED, FAILED) for trial in trials):
                continue
            values = [float(report.value or 0.0) for _, report in reports]
            complete = len(trials) == self.space.repeats and all(
                trial.status == COMPLETED for trial in trials
            )
            leader = min(reports, key=lambda pair: sign * float(pair[1].value or 0.0))[0]
            mean = statistics.fmean(values)
            deviation = statistics.stdev(values) if len(values) > 1 else None
            found.append((not complete, sign * mean, Best(leader, mean, deviation, complete)))
        return min(found, key=lambda item: item[:2])[2] if found else None

    def known(self) -> list[Known]:
        """Each drawing as the search sees it."""
        return [self._known(trials) for trials in self._drawings()]

    def _drawings(self) -> list[list[Trial]]:
        """The trials of each drawing."""
        found: dict[int, list[Trial]] = {}
        for trial in self.trials.values():
            found.setdefault(trial.drawing, []).append(trial)
        return [found[drawing] for drawing in sorted(found)]

    def _known(self, trials: Sequence[Trial]) -> Known:
        """A drawing as the search sees it: the mean of its repeats."""
        drawn = trials[0].drawn
        if not all(trial.is_over for trial in trials):
            return Known(drawn, None, False)
        sound = [trial for trial in trials if trial.status != FAILED]
        if not sound:
            return Known(drawn, None, True, is_lost=True)
        if any(trial.status == DIVERGED for trial in sound):
            return Known(drawn, None, True, was_stopped=True)
        values = [report.value for trial in sound if (report := trial.best(self.scale.sign))]
        value = statistics.fmean(float(item or 0.0) for item in values) if values else None
        if all(trial.status == COMPLETED for trial in sound):
            return Known(drawn, value, True, is_lost=value is None)
        reports = _mean_reports(sound)
        return Known(drawn, value, True, was_stopped=True, reports=reports)


def _mean_reports(trials: Sequence[Trial]) -> dict[int, float]:
    """Progress → the mean of the metric over the trials that reported there."""
    found: dict[int, list[float]] = {}
    for trial in trials:
        for report in trial.reports:
            if report.value is not None:
                found.setdefault(round(report.progress), []).append(report.value)
    return {progress: statistics.fmean(values) for progress, values in found.items()}
