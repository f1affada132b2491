"""How sure metrics are: intervals by rows that are drawn again, and tests of whether two runs
differ on the same rows.

Rows are taken as independent draws. Every draw is seeded, so the same rows give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt

from dray.tasks.parts.scores import Scores

LEVEL = 0.95
FEWEST_DRAWS, MOST_DRAWS = 20, 100_000
Ints = npt.NDArray[np.int64]


def draw_again(num_rows: int, num_draws: int, seed: int) -> Iterator[Ints]:
    """So many samples of as many rows as there are, with replacement."""
    generator = np.random.default_rng(seed)
    for _ in range(num_draws):
        yield generator.integers(0, num_rows, num_rows)


def intervals(scores: Scores, num_draws: int, seed: int) -> dict[str, dict[str, Any]]:
    """By metric `value`, and `low` and `high`: the percentiles of the bootstrap (Efron, 1979) that
    hold LEVEL of its draws. None where it stands for nothing; `num_undefined`: draws in which it
    does, which are left out."""
    with _unchecked():
        drawn = [scores.take(rows).metrics() for rows in draw_again(len(scores), num_draws, seed)]
    return {
        name: {"value": finite(value)} | _between([values[name] for values in drawn])
        for name, value in scores.metrics().items()
    }


def _between(values: Sequence[float]) -> dict[str, Any]:
    array = np.array(values, dtype=np.float64)
    sound = array[np.isfinite(array)]
    left_out = {"num_undefined": int(len(array) - len(sound))} if len(sound) < len(array) else {}
    if not len(sound):
        return {"low": None, "high": None, **left_out}
    low, high = np.quantile(sound, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return {"low": low, "high": high, **left_out}


def compare(first: Scores, second: Scores, num_draws: int, seed: int) -> dict[str, dict[str, Any]]:
    """By metric how much greater it is in the second run than in the first, on the same rows:
    `difference`, its interval (the paired bootstrap: both of the rows drawn), and `p_value`.

    The p-value is of a paired permutation test, two-sided: in each draw, both runs exchange what
    they gave for a random half of the rows, and (1 + the draws that differ at least as much) /
    (1 + draws) is told, so that it is never 0. It is of one metric; who looks at many will find
    some that are small by chance.
    """
    num_rows, both = len(first), first.join(second)
    own, other = first.metrics(), second.metrics()
    observed = {name: other[name] - own[name] for name in own}
    with _unchecked():
        resampled = [
            _difference(first.take(rows), second.take(rows))
            for rows in draw_again(num_rows, num_draws, seed)
        ]
        swapped = _exchanged(both, num_draws, seed)
    return {
        name: {
            "first": finite(own[name]),
            "second": finite(other[name]),
            "difference": finite(value),
            **_between([values[name] for values in resampled]),
            "p_value": _p_value(value, [values[name] for values in swapped]),
        }
        for name, value in observed.items()
    }


def _exchanged(both: Scores, num_draws: int, seed: int) -> list[dict[str, float]]:
    """Differences between two runs, one after the other in `both`, that exchange rows at random."""
    num_rows = len(both) // 2
    generator, places = np.random.default_rng([seed, 1]), np.arange(num_rows)
    found = []
    for _ in range(num_draws):
        shift = np.where(generator.random(num_rows) < 0.5, num_rows, 0)
        one, two = places + shift, places + (num_rows - shift)
        found.append(_difference(both.take(one), both.take(two)))
    return found


def _unchecked() -> AbstractContextManager[None]:
    """scikit-learn without its checks of arguments: these are the same each time."""
    from sklearn import config_context

    found: AbstractContextManager[None] = config_context(
        assume_finite=True, skip_parameter_validation=True
    )
    return found


def _difference(first: Scores, second: Scores) -> dict[str, float]:
    own, other = first.metrics(), second.metrics()
    return {name: other[name] - own[name] for name in own}


def _p_value(observed: float, drawn: Sequence[float]) -> float | None:
    array = np.array(drawn, dtype=np.float64)
    sound = array[np.isfinite(array)]
    if not np.isfinite(observed) or not len(sound):
        return None
    # What differs by rounding alone is the same.
    extreme = int((np.abs(sound) >= abs(observed) * (1 - 1e-9) - 1e-15).sum())
    return (1 + extreme) / (1 + len(sound))


def compare_right_answers(first: Scores, second: Scores) -> Mapping[str, Any] | None:
    """McNemar's exact test of answers that are right or wrong: `only_first` and `only_second`, rows
    that one of the runs alone has right, and `p_value`, that of a fair coin for these; None where
    answers are not right or wrong."""
    from scipy.stats import binomtest

    own, other = first.correct(), second.correct()
    if own is None or other is None:
        return None
    alone = int((own & ~other).sum()), int((other & ~own).sum())
    p_value = float(binomtest(alone[1], sum(alone), 0.5).pvalue) if sum(alone) else 1.0
    return {"only_first": alone[0], "only_second": alone[1], "p_value": p_value}


def finite(value: float) -> float | None:
    """A number as JSON has it; None for one that is none."""
    return float(value) if np.isfinite(value) else None
