"""What several models say of each record: votes, means, or a model over them, as `together.py` has
them, without knowing what is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from dray.errors import PlanError, SpecError
from dray.release.evaluate import measure_run
from dray.release.judging.judge import scores_of
from dray.release.predict import Counts, predict
from dray.release.together import Combine, Stack, combine, fit_stack
from dray.release.trained import Weights, open_trained
from dray.tasks import Task
from dray.tasks.parts.scores import Classes, LabelSets, Numbers, Scores
from dray.tasks.parts.tag_scores import Entities

RECORDS_AT_ONCE = 256

Place = tuple[str, str, str | int | None]
"""A storage, a run and a step."""


def predict_together(
    places: Sequence[Place],
    data: Sequence[str],
    how: Combine,
    weights: Weights = "trained",
    counts: Counts | None = None,
) -> Iterator[dict[str, Any]]:
    """A mapping for each record: its fields, `prediction` and, of classes, `scores`, and what each
    model says alone as `models`; records that cannot be read as `predict` tells them. `counts` are
    of records. Raises as `predict` does, and PlanError for models that cannot be combined."""
    if len(places) < 2:
        raise SpecError("dray predict", "is of one model", "together are two or more")
    tasks = [open_trained(*place[:2], place[2], weights).task for place in places]
    first = tasks[0]
    for task, (_, name, _) in zip(tasks, places, strict=True):
        if type(task) is not type(first) or task.labels != first.labels:
            raise PlanError(
                f"run {name!r}",
                f"learns another task, or has other classes, than {places[0][1]}",
                "together are models of one task and the same classes",
            )
    stack = _stack(places, weights) if how == "stacking" else None
    counts = counts or Counts()
    streams = [predict(*place[:2], data, step=place[2], weights=weights) for place in places]
    records = zip(*streams, strict=True)
    while some := list(islice(records, RECORDS_AT_ONCE)):
        yield from _together(first, some, how, stack, counts)


def _stack(places: Sequence[Place], weights: Weights) -> Stack:
    fitted = [
        measure_run(storage, name, step=step, weights=weights, by_row=True)
        for storage, name, step in places
    ]
    return fit_stack([scores_of(one) for one in fitted])


def _together(
    task: Task,
    records: Sequence[tuple[dict[str, Any], ...]],
    how: Combine,
    stack: Stack | None,
    counts: Counts,
) -> Iterator[dict[str, Any]]:
    """Some records, each as every model tells it, as one."""
    told = [own for own in records if all("prediction" in one for one in own)]
    found = iter(_combined(task, told, how, stack)) if told else iter(())
    for own in records:
        counts.add(own[0])
        if not all("prediction" in one for one in own):
            yield next(one for one in own if "prediction" not in one)
            continue
        given = {
            name: value for name, value in own[0].items() if name not in ("prediction", "scores")
        }
        yield {**given, **next(found), "models": [one["prediction"] for one in own]}


def _combined(
    task: Task, records: Sequence[tuple[dict[str, Any], ...]], how: Combine, stack: Stack | None
) -> Iterator[dict[str, Any]]:
    members = [_scores(task, own) for own in zip(*records, strict=True)]
    together = combine(members, how, stack)
    for row in range(len(together)):
        if isinstance(together, Classes):
            scores = dict(zip(together.labels, together.probabilities[row].tolist(), strict=True))
            yield {"prediction": together.labels[int(together.guesses[row])], "scores": scores}
        elif isinstance(together, LabelSets):
            scores = dict(zip(together.labels, together.probabilities[row].tolist(), strict=True))
            likely = [label for label, share in scores.items() if share > 0.5]
            yield {"prediction": likely, "scores": scores}
        elif isinstance(together, Numbers):
            yield {"prediction": float(together.found[row])}
        elif isinstance(together, Entities):
            yield {"prediction": list(together.found[row])}


def _scores(task: Task, records: Sequence[Mapping[str, Any]]) -> Scores:
    """What one model says of some records, in the form in which it is judged; what is right is not
    known, and stands as the first class, or 0. Raises PlanError for what has no such form."""
    first = records[0]["prediction"]
    num = len(records)
    if isinstance(records[0].get("scores"), dict):
        labels = tuple(task.labels)
        likely = np.array([[one["scores"][label] for label in labels] for one in records])
        if isinstance(first, list):
            return LabelSets(np.zeros((num, len(labels)), np.int64), likely, labels)
        guesses = np.array([labels.index(one["prediction"]) for one in records])
        return Classes(np.zeros(num, np.int64), guesses, likely, labels, task.ranks)
    if isinstance(first, int | float):
        found = np.array([one["prediction"] for one in records], np.float64)
        return Numbers(np.zeros(num), found)
    if isinstance(first, list) and all(isinstance(tag, str | None) for tag in first):
        tags = tuple(tuple(str(tag) for tag in one["prediction"]) for one in records)
        return Entities(tags, tags, has_entities=False)
    raise PlanError(
        "dray predict",
        f"predictions of {task.name} have no votes and no mean",
        "classes, labels, numbers and tags have",
        "name one run",
    )
