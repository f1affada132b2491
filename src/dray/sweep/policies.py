"""When a trial is stopped because it falls behind: Ray Tune's schedulers, asked report by report.

Tune's own loop would run the trials, too; here its schedulers are only asked. They are told each
report in the order in which the sweep has recorded it, so that one that is built anew from the
record decides as the one before it did, and nothing of theirs is pickled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from dray.sweep.space import Scheduler

WORST = 1e30
"""In place of what is not finite, of which Tune's percentiles make nothing."""


class Policy(Protocol):
    """Judges trials by how they do beside each other."""

    def judge(self, trial: int, progress: float, value: float) -> bool:
        """Whether a trial is to stop that has come so far (in steps of the spec's own batch) and
        has this value of the metric."""

    def end(self, trial: int) -> None:
        """The trial reports no more."""


class NoPolicy:
    """Every trial goes to its end."""

    def judge(self, trial: int, progress: float, value: float) -> bool:
        return False

    def end(self, trial: int) -> None:
        pass


@dataclass(frozen=True)
class _Trial:
    """What Tune's schedulers ask of a trial."""

    trial_id: str


class _Nobody:
    """Tune's controller, as far as its schedulers ask it: no trial waits."""

    def get_live_trials(self) -> list[Any]:
        return []


class TunePolicy:
    """One of Ray Tune's schedulers that stop trials."""

    def __init__(self, scheduler: Any, mode: str, seed: int) -> None:
        self._scheduler = scheduler
        self._worst = WORST if mode == "min" else -WORST
        self._seed = seed
        self._trials: dict[int, _Trial] = {}
        self._last: dict[int, dict[str, float]] = {}

    def judge(self, trial: int, progress: float, value: float) -> bool:
        from ray.tune.schedulers import TrialScheduler

        result = {"progress": progress, "value": value if math.isfinite(value) else self._worst}
        self._last[trial] = result
        answer = self._scheduler.on_trial_result(_Nobody(), self._add(trial), dict(result))
        return bool(answer == TrialScheduler.STOP)

    def end(self, trial: int) -> None:
        if trial in self._last:
            self._scheduler.on_trial_complete(_Nobody(), self._add(trial), self._last.pop(trial))

    def _add(self, number: int) -> _Trial:
        if number in self._trials:
            return self._trials[number]
        import numpy as np

        trial = self._trials[number] = _Trial(f"{number:04d}")
        # Tune draws a trial's bracket from numpy's global generator.
        state = np.random.get_state()
        np.random.seed((self._seed * 1_000_003 + number) % 2**32)
        self._scheduler.on_trial_add(_Nobody(), trial)
        np.random.set_state(state)
        return trial


def make_policy(
    scheduler: Scheduler, mode: str, total_steps: float, grace_steps: int, seed: int
) -> Policy:
    """The policy of a space, for runs of so many steps of the spec's own batch."""
    if scheduler.name in ("none", "pbt"):
        return NoPolicy()
    from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule

    told = {"time_attr": "progress", "metric": "value", "mode": mode}
    if scheduler.name == "median":
        rule = MedianStoppingRule(
            grace_period=grace_steps, min_samples_required=scheduler.least_trials, **told
        )
        return TunePolicy(rule, mode, seed)
    halving = AsyncHyperBandScheduler(
        max_t=max(total_steps, grace_steps),
        grace_period=grace_steps,
        reduction_factor=scheduler.reduction_factor,
        brackets=1 if scheduler.name == "asha" else scheduler.brackets,
        stop_last_trials=False,
        **told,
    )
    return TunePolicy(halving, mode, seed)
