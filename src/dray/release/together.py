"""Several models as one, by what each gives for a row: votes, means of probabilities or numbers, or
a model over them.

`soft`: the mean of probabilities, or of numbers. `hard`: each model has one vote; of as many votes
the class wins that has more probability, of tags the one that the earlier model gives. `stacking`:
a logistic regression, or a ridge of numbers, over what all models give (Wolpert, 1992), fitted on
the held-out rows, which must not be those that are measured. Refuses models whose rows or classes
are not the same, and ones that give nothing which has a mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from dray.errors import PlanError, SpecError
from dray.release.evaluate import Measured
from dray.release.judging.intervals import LEVEL, compare, finite
from dray.release.judging.judge import DEFAULT_DRAWS, SEED, check_same_rows, scores_of
from dray.tasks.parts.scores import LEAST_PROBABILITY, Classes, Floats, LabelSets, Numbers, Scores
from dray.tasks.parts.tag_scores import Entities

Combine = Literal["soft", "hard", "stacking"]
S = TypeVar("S", bound=Scores)


@dataclass(frozen=True)
class Stack:
    """What was fitted over several models, and by how many rows."""

    predict: Callable[[Sequence[Scores]], Scores]
    num_fitted: int


def combine(members: Sequence[Scores], how: Combine, stack: Stack | None = None) -> Scores:
    """What several models give together for the same rows. Raises PlanError where it cannot be."""
    if how == "stacking":
        if stack is None:
            raise ValueError("stacking needs what was fitted")
        return stack.predict(members)
    first = members[0]
    if isinstance(first, Classes):
        return _combined_classes(_all(members, Classes), how)
    if isinstance(first, LabelSets):
        return _combined_sets(_all(members, LabelSets), how)
    if isinstance(first, Numbers) and how == "soft":
        found = np.mean([one.found for one in _all(members, Numbers)], axis=0)
        return replace(first, found=found)
    if isinstance(first, Entities) and how == "hard":
        return _voted_tags(_all(members, Entities))
    kind = {Numbers: "numbers have no votes", Entities: "tags have no probabilities here"}
    raise PlanError(
        f"--combine {how}",
        kind.get(type(first), "what these models give has no mean and no votes"),
        "soft is of classes, labels and numbers, hard of classes, labels and tags",
        "give --combine soft" if isinstance(first, Numbers) else "give --combine hard",
    )


def _all(members: Sequence[Scores], kind: type[S]) -> list[S]:
    """The members, which are of one kind."""
    return [one for one in members if isinstance(one, kind)]


def _combined_classes(members: Sequence[Classes], how: Combine) -> Classes:
    mean = np.mean([one.probabilities for one in members], axis=0)
    if how == "soft":
        return replace(members[0], probabilities=mean, guesses=_decide(members[0], mean))
    votes = np.zeros_like(mean)
    for one in members:
        votes[np.arange(len(one)), one.guesses] += 1
    # Votes are whole numbers: a share of one decides between equal ones alone.
    guesses = (votes + mean / 2).argmax(axis=1)
    return replace(members[0], probabilities=votes / len(members), guesses=guesses)


def _decide(like: Classes, probabilities: Floats) -> npt.NDArray[np.int64]:
    """The likeliest class; of classes in an order the one above which less than half lies."""
    found: npt.NDArray[np.int64]
    if like.ranks is None:
        found = probabilities.argmax(axis=1)
        return found
    order = np.argsort(like.ranks)
    below = probabilities[:, order].cumsum(axis=1)
    found = order[(below >= 0.5).argmax(axis=1)]
    return found


def _combined_sets(members: Sequence[LabelSets], how: Combine) -> LabelSets:
    if how == "soft":
        found = np.mean([one.probabilities for one in members], axis=0)
    else:
        votes = np.mean([one.probabilities > 0.5 for one in members], axis=0)
        mean = np.mean([one.probabilities for one in members], axis=0)
        found = np.where(votes == 0.5, np.where(mean > 0.5, 0.5 + 1e-9, 0.5), votes)
    return replace(members[0], probabilities=found)


def _voted_tags(members: Sequence[Entities]) -> Entities:
    found = tuple(
        tuple(Counter(tags).most_common(1)[0][0] for tags in zip(*sentences, strict=True))
        for sentences in zip(*(one.found for one in members), strict=True)
    )
    return Entities(members[0].wanted, found, members[0].has_entities)


def fit_stack(members: Sequence[Scores]) -> Stack:
    """A model over what several models give for rows that none of them has learnt. Raises PlanError
    for what cannot be stacked."""
    from sklearn.linear_model import LogisticRegression, RidgeCV

    first = members[0]
    if isinstance(first, Classes):
        if len(set(first.wanted.tolist())) < 2:
            raise PlanError(
                "--combine stacking", "the held-out rows have one class", "two are seen"
            )
        model = LogisticRegression(max_iter=2000).fit(_features(members), first.wanted)

        def classes(others: Sequence[Scores]) -> Scores:
            (own, *_) = _all(others, Classes)
            seen = model.predict_proba(_features(others))
            likely = np.full((len(own), len(own.labels)), LEAST_PROBABILITY)
            likely[:, model.classes_] = seen
            likely /= likely.sum(axis=1, keepdims=True)
            return replace(own, probabilities=likely, guesses=_decide(own, likely))

        return Stack(classes, len(first))
    if isinstance(first, Numbers):
        found = np.stack([one.found for one in _all(members, Numbers)], axis=1)
        ridge = RidgeCV(alphas=np.logspace(-4, 4, 17)).fit(found, first.wanted)

        def numbers(others: Sequence[Scores]) -> Scores:
            (own, *_) = _all(others, Numbers)
            given = np.stack([one.found for one in _all(others, Numbers)], axis=1)
            return replace(own, found=ridge.predict(given))

        return Stack(numbers, len(first))
    raise PlanError(
        "--combine stacking",
        "what these models give is neither one class nor a number",
        "a regression is fitted over these",
        "give --combine hard",
    )


def _features(members: Sequence[Scores]) -> Floats:
    """Logarithms of all models' probabilities, side by side."""
    likely = [one.probabilities for one in _all(members, Classes)]
    found: Floats = np.log(np.clip(np.concatenate(likely, axis=1), LEAST_PROBABILITY, 1.0))
    return found


def judge_together(
    members: Sequence[Measured],
    how: Combine,
    *,
    fitted: Sequence[Measured] = (),
    beside: Sequence[Measured] = (),
    metric: str | None = None,
    num_draws: int | None = None,
) -> dict[str, Any]:
    """Models alone and together, on the same rows: `models` (each `name` with its `metrics`: the
    members, `together`, and others `beside`), `best` (of the members, by `metric`, of which the
    direction is the task's), and `against_best`, by model and metric the difference from it with
    its interval and p-value. `fitted`: the members on the rows that stacking is fitted on.

    Raises PlanError for models that were not measured on the same rows, or cannot be combined.
    """
    if len(members) < 2:
        raise SpecError("dray evaluate", "is of one model", "together are two or more")
    for other in (*members[1:], *beside):
        check_same_rows(members[0], other)
    scores = [scores_of(one) for one in members]
    others = [scores_of(one) for one in beside]
    for one, measured in zip([*scores, *others], [*members, *beside], strict=True):
        if type(one) is not type(scores[0]) or not one.is_same_truth(scores[0]):
            raise PlanError(
                measured.trained.run.name,
                "has other classes or answers than the first run",
                "together are models of one task on the same rows",
            )
    stack = fit_stack([scores_of(one) for one in fitted]) if how == "stacking" else None
    together = combine(scores, how, stack)
    arms = [
        *((_name(one), own) for one, own in zip(members, scores, strict=True)),
        (f"together ({how})", together),
        *((_name(one), own) for one, own in zip(beside, others, strict=True)),
    ]
    values = {name: own.metrics() for name, own in arms}
    metric, sign = _choose(members[0], metric, values[arms[0][0]])
    best = max(arms[: len(members)], key=lambda arm: sign * values[arm[0]][metric])
    draws = num_draws or DEFAULT_DRAWS
    return {
        "combine": how,
        "num": len(together),
        "unit": together.unit,
        "metric": metric,
        "best": best[0],
        **({} if stack is None else {"num_fitted": stack.num_fitted}),
        "models": [
            {"name": name, "metrics": {key: finite(value) for key, value in values[name].items()}}
            for name, _ in arms
        ],
        "level": LEVEL,
        "num_draws": draws,
        "against_best": {
            name: compare(best[1], own, draws, SEED) for name, own in arms[len(members) :]
        },
    }


def _name(measured: Measured) -> str:
    return f"{measured.trained.run.name}@{measured.trained.checkpoint.step}"


def _choose(first: Measured, metric: str | None, known: dict[str, float]) -> tuple[str, int]:
    """The metric that tells the best member, and 1 where more of it is better. Raises SpecError."""
    task, wanted = first.task, metric or first.trained.spec.validation.metric
    if metric is None and wanted not in known:
        wanted = next((name for name in known if task.metrics.get(name) == "higher"), "mse")
    if wanted not in known or (wanted not in task.metrics and metric):
        raise SpecError(
            "--metric", f"{wanted} is not told of rows", f"there are {', '.join(known)}"
        )
    return wanted, 1 if task.metrics.get(wanted, "lower") == "higher" else -1
