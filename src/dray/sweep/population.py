"""Population based training: lines of trials that go on from each other's checkpoints.

All lines go on to the same step; there the worst ones are replaced. What takes a line over is a
trial of its own, a fork of a better line's checkpoint with parameters changed a little: a run stays
a run, and its ledger says which steps were whose. Decisions follow from the record and the seed
alone, so a sweep that is taken up again decides as it would have.

Source: Jaderberg et al., Population Based Training of Neural Networks (arXiv 1711.09846).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dray.sweep.events import PRUNED, Begun, Ended
from dray.sweep.search import draw
from dray.sweep.space import Parameter, Space, Value, settle

if TYPE_CHECKING:
    from dray.sweep.study import Study, Trial


class Population:
    """What comes next in a sweep whose scheduler is `pbt`."""

    def __init__(self, study: Study) -> None:
        self._study = study
        scheduler, total = study.space.scheduler, study.scale.total_steps
        self._size = scheduler.population
        every = scheduler.first_look(total)
        self._bounds = [*range(every, total, every), total]
        """The steps at which lines are compared."""

    def next(self) -> Begun | Ended | None:
        """What is to be recorded next; none while all lines are waited for, and at the end."""
        for index, bound in enumerate(self._bounds):
            holders = [self._holder(line, bound) for line in range(self._size)]
            behind = [
                line
                for line, trial in enumerate(holders)
                if trial is None or not (trial.is_over or self._stands_at(trial, bound))
            ]
            for line in behind:
                trial = holders[line]
                if trial is None:
                    return self._begin(line, bound)
                if trial.is_waiting and not self._has_unborn(trial):
                    return trial.begun_again(until_step=bound)
            if behind:
                return None
            if bound == self._bounds[-1]:
                return None
            event = self._replace(
                [trial for trial in holders if trial is not None], bound, self._bounds[index + 1]
            )
            if event is not None:
                return event
        return None

    # ---- lines ----------------------------------------------------------------------------------

    def _holder(self, line: int, bound: int) -> Trial | None:
        """The trial of a line that is to reach this step: the last one born before it."""
        trials = self._study.trials.values()
        found = [item for item in trials if item.drawing == line and item.parent_step < bound]
        return found[-1] if found else None

    @staticmethod
    def _has_reached(trial: Trial, bound: int) -> bool:
        return any(report.step >= bound for report in trial.reports)

    def _stands_at(self, trial: Trial, bound: int) -> bool:
        """Whether it has reached a step, and its checkpoint there is committed."""
        return trial.is_waiting and self._has_reached(trial, bound)

    def _has_unborn(self, trial: Trial) -> bool:
        """Whether another trial still has to fork from where this one stands: it must not go on
        before, or that checkpoint could be gone."""
        return any(
            child.parent == trial.number and not child.reports and not child.is_over
            for child in self._study.trials.values()
        )

    # ---- beginnings -----------------------------------------------------------------------------

    def _begin(self, line: int, bound: int) -> Begun:
        study = self._study
        drawn = draw(study.space, line, [], study.scale.mode, study.tree)
        parameters = settle(study.space, drawn, study.spec)
        return Begun(study.next_number, line, 0, 1, drawn, parameters, until_step=bound)

    def _replace(self, holders: list[Trial], bound: int, until: int) -> Begun | Ended | None:
        """The next trial of those that take lines over at this step."""
        study = self._study
        for trial, parent in self._decide(holders, bound):
            children = [
                item
                for item in study.trials.values()
                if item.drawing == trial.drawing and item.parent_step == bound
            ]
            if children:
                continue
            if not trial.is_over:
                return Ended(
                    trial.number,
                    PRUNED,
                    trial.step,
                    trial.tokens,
                    trial.seconds,
                    reason=f"trial {parent.number:04d} takes its line over at step {bound}",
                )
            chance = random.Random(f"{study.space.search.seed}/{trial.drawing}/{bound}")
            drawn = explore(study.space, parent.drawn, chance, study.tree)
            return Begun(
                study.next_number,
                trial.drawing,
                0,
                1,
                drawn,
                settle(study.space, drawn, study.spec),
                until_step=until,
                parent=parent.number,
                parent_step=bound,
            )
        return None

    def _decide(self, holders: list[Trial], bound: int) -> list[tuple[Trial, Trial]]:
        """Pairs of a trial that is replaced at this step and the one whose checkpoint goes on."""
        sign = self._study.scale.sign

        def rank(trial: Trial) -> tuple[float, int]:
            found = [report.value for report in trial.reports if report.step <= bound]
            reached = self._has_reached(trial, bound)
            value = found[-1] if found and reached else None
            return (math.inf if value is None else sign * value), trial.number

        ranked = sorted(holders, key=rank)
        count = max(1, int(len(ranked) * self._study.space.scheduler.quantile))
        best = [trial for trial in ranked[:count] if rank(trial)[0] < math.inf]
        worst = [
            trial
            for place, trial in enumerate(ranked)
            if trial not in best and (place >= len(ranked) - count or rank(trial)[0] == math.inf)
        ]
        if not best:
            return []
        pairs = []
        for trial in sorted(worst, key=lambda item: item.drawing):
            chance = random.Random(
                f"{self._study.space.search.seed}/{trial.drawing}/{bound}/parent"
            )
            pairs.append((trial, chance.choice(best)))
        return pairs


def explore(
    space: Space, drawn: Mapping[str, Value], chance: random.Random, tree: Mapping[str, Value]
) -> dict[str, Value]:
    """Parameters near those of a better trial, some of them drawn anew."""

    def choose(path: str, given: Parameter) -> Value:
        if path not in drawn or chance.random() < space.scheduler.resample:
            return given.draw(chance)
        return _near(given, drawn[path], chance, space.scheduler.factors)

    return space.choose(choose, tree)


def _near(
    given: Parameter, value: Value, chance: random.Random, factors: tuple[float, float]
) -> Value:
    """A neighbour of a listed value, or a number times one of the factors, within its range."""
    if given.listed is not None:
        place = given.listed.index(value) + chance.choice((-1, 1))
        return given.listed[min(max(place, 0), len(given.listed) - 1)]
    return given.nearest(float(value) * chance.choice(factors))
