"""What the next trial tries: values drawn by what is known of the trials before it.

The draws are a pure function of the space, the number of the drawing and what is known, so that a
sweep whose driver was killed goes on as if nothing had happened. Optuna's samplers draw; they keep
no state between two calls.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dray.sweep.space import Parameter, Space, Value, rounded

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Known:
    """A drawing as the search sees it."""

    drawn: Mapping[str, Value]
    """Path → what was drawn for it."""
    value: float | None
    """Of the metric, once all of its trials have ended."""
    is_over: bool
    was_stopped: bool = False
    """Before its end, since it fell behind; or its loss was not finite."""
    reports: Mapping[int, float] | None = None
    """Of one that was stopped: how far it had come → the metric then."""
    is_lost: bool = False
    """It failed: nothing is known of these values."""


def draw(
    space: Space, number: int, known: Sequence[Known], mode: str, tree: Mapping[str, Any]
) -> dict[str, Value]:
    """The values of the drawing `number`, counted from 0, where `known` are those before it.
    `tree`: the spec, which conditions may ask."""
    if space.search.name == "grid":
        cell = _cell(space, number)
        if space.points:
            return cell
        return space.choose(lambda path, given: cell[path], tree)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of `group`
        return _draw(space, number, known, mode, tree)


def _cell(space: Space, number: int) -> dict[str, Value]:
    """The combination of a grid's values that a drawing has: each in turn."""
    cells = space.cells()
    return cells[number % len(cells)]


def _draw(
    space: Space, number: int, known: Sequence[Known], mode: str, tree: Mapping[str, Any]
) -> dict[str, Value]:
    import optuna

    sampler = _build_sampler(space, number)
    study = optuna.create_study(
        direction="minimize" if mode == "min" else "maximize", sampler=sampler
    )
    if space.search.name == "cmaes":  # its state lies in the trials that it drew itself
        _replay(study, space, known, tree)
    else:
        study.add_trials([remember(space, item) for item in known])
    if fixed := _cell(space, number):
        study.enqueue_trial(
            {path: _code(space.parameters[path], value) for path, value in fixed.items()}
        )
    study.sampler = sampler
    return _suggest(study.ask(), space, tree)


def _build_sampler(space: Space, number: int) -> optuna.samplers.BaseSampler:
    import optuna

    word = f"{space.search.seed}/{number}".encode()
    seed = int.from_bytes(hashlib.sha256(word).digest()[:4])
    if space.search.name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if space.search.name == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    # Conditions part the space into groups; trials at work count as bad ones, so that those that
    # begin together do not try the same.
    return optuna.samplers.TPESampler(
        seed=seed,
        n_startup_trials=space.search.startup_trials,
        multivariate=True,
        group=True,
        constant_liar=True,
    )


def _suggest(trial: optuna.Trial, space: Space, tree: Mapping[str, Any]) -> dict[str, Value]:
    return space.choose(
        lambda path, given: _decode(given, trial._suggest(path, _distribution(given))), tree
    )


def remember(space: Space, known: Known) -> optuna.trial.FrozenTrial:
    """A drawing as Optuna keeps it."""
    import optuna

    states = optuna.trial.TrialState
    state = states.RUNNING
    if known.is_over:
        state = states.COMPLETE if known.value is not None else states.PRUNED
        state = states.PRUNED if known.was_stopped else state
        state = states.FAIL if known.is_lost else state
    reports = {step: value for step, value in (known.reports or {}).items() if math.isfinite(value)}
    return optuna.trial.create_trial(
        state=state,
        params={path: _code(space.parameters[path], value) for path, value in known.drawn.items()},
        distributions={path: _distribution(space.parameters[path]) for path in known.drawn},
        value=known.value if state == states.COMPLETE else None,
        intermediate_values=reports if state == states.PRUNED else {},
    )


def _replay(
    study: optuna.Study, space: Space, known: Iterable[Known], tree: Mapping[str, Any]
) -> None:
    """Have the sampler draw again what is known, in order, and tell it how that ended."""
    import optuna

    for number, item in enumerate(known):
        study.sampler = _build_sampler(space, number)
        study.enqueue_trial(
            {path: _code(space.parameters[path], value) for path, value in item.drawn.items()}
        )
        trial = study.ask()
        _suggest(trial, space, tree)
        if not item.is_over:
            continue
        if item.is_lost or item.value is None or not math.isfinite(item.value):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:  # of one that was stopped, what it had reached
            study.tell(trial, item.value)


# ---- values and Optuna's numbers ---------------------------------------------------------------


def _distribution(given: Parameter) -> BaseDistribution:
    from optuna import distributions

    if given.listed is not None:
        count = len(given.listed)
        if given.is_ordered:
            return distributions.IntDistribution(0, count - 1)
        return distributions.CategoricalDistribution(tuple(range(count)))
    if given.randint is not None:
        return distributions.IntDistribution(given.randint[0], given.randint[1] - 1)
    if given.quniform is not None:
        low, high, step = given.quniform
        return distributions.IntDistribution(0, int((high - low) / step + 1e-9))
    low, high = given.loguniform or given.uniform or (0.0, 1.0)
    return distributions.FloatDistribution(low, high, log=given.loguniform is not None)


def _decode(given: Parameter, number: float) -> Value:
    """A value by the number that Optuna has for it."""
    if given.listed is not None:
        return given.listed[int(number)]
    if given.randint is not None:
        return int(number)
    if given.quniform is not None:
        return rounded(given.quniform[0] + int(number) * given.quniform[2])
    return rounded(number)


def _code(given: Parameter, value: Value) -> float:
    """The number that Optuna has for a value."""
    if given.listed is not None:
        return float(given.listed.index(value))
    if given.quniform is not None:
        return float(round((value - given.quniform[0]) / given.quniform[2]))
    low, high = given.ends()
    return float(min(max(value, low), high))  # six digits may lie past an end that has more
