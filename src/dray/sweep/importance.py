"""How much each parameter mattered in a sweep, and how sure that is.

PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255) by Optuna: how far the values of the better
quarter of the trials differ from those of all, as shares that add up to 1. Trials are drawn again
with replacement for the uncertainty.
"""

from __future__ import annotations

import random
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from dray.sweep.search import Known, remember
from dray.sweep.space import Space

LEAST_TRIALS = 8
"""Fewer tell nothing."""
RESAMPLINGS = 50


@dataclass(frozen=True)
class Importance:
    """Of one parameter."""

    path: str
    share: float
    deviation: float
    """Standard deviation over trials drawn again."""


def measure_importance(space: Space, known: Sequence[Known], mode: str) -> list[Importance]:
    """The parameters' importance, the greatest first; empty for too few trials with a value."""
    sound = [item for item in known if item.value is not None and not item.is_lost]
    paths = {path for item in sound for path in item.drawn}
    if len(sound) < LEAST_TRIALS or len(paths) < 2:
        return []
    chance = random.Random(0)
    whole = _measure(space, sound, mode)
    samples = (
        _measure(space, chance.choices(sound, k=len(sound)), mode) for _ in range(RESAMPLINGS)
    )
    again = [sample for sample in samples if sample]
    found = [
        Importance(
            path, share, statistics.pstdev([sample.get(path, 0.0) for sample in again] or [share])
        )
        for path, share in whole.items()
    ]
    return sorted(found, key=lambda item: -item.share)


def _measure(space: Space, known: Sequence[Known], mode: str) -> dict[str, float]:
    """Path → share. Of parameters that count in some trials only, those trials tell."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize" if mode == "min" else "maximize")
    for item in known:
        study.add_trial(remember(space, Known(item.drawn, item.value, True)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental; and of parameters that do not vary
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
        try:
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        except (ValueError, RuntimeError):  # of trials that are all the same
            return {}
    return {path: float(share) for path, share in found.items()}
