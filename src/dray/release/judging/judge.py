"""A run judged: its metrics with what lies behind them, as one document that is JSON, and that
`show/judgement.py` makes a page of.

Rows go through the model once; the rest is arithmetic over what it gave for them. Refuses runs to
compare that have not measured the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dray.corpus.stream import read_rows
from dray.errors import PlanError, SpecError
from dray.release.evaluate import Measured
from dray.release.judging.calibration import calibrate, reliability
from dray.release.judging.curves import curves
from dray.release.judging.intervals import (
    FEWEST_DRAWS,
    LEVEL,
    MOST_DRAWS,
    compare,
    compare_right_answers,
    finite,
    intervals,
)
from dray.release.judging.slices import check_kinds, find_slices, slice_metrics
from dray.tasks.parts.scores import Classes, LabelSets, Numbers, Scores
from dray.tasks.parts.tag_scores import Entities

SEED = 0
NUM_WORST = 20
MOST_CLASSES = 60
"""Of a confusion matrix."""
MOST_POINTS = 400
DEFAULT_DRAWS = 1000


@dataclass(frozen=True)
class Asked:
    """What is asked of a judgement. `num_draws`: of each interval and test; None: no intervals."""

    num_draws: int | None = None
    slices: tuple[str, ...] = ()
    calibrates: bool = False
    texts: bool = False

    def check(self) -> None:
        """Raises PlanError for what cannot be asked, before a model is read."""
        if self.num_draws is not None and not FEWEST_DRAWS <= self.num_draws <= MOST_DRAWS:
            raise PlanError(
                "--intervals",
                f"is {self.num_draws:,}",
                f"{FEWEST_DRAWS} to {MOST_DRAWS:,} samples are drawn",
            )
        check_kinds(self.slices)


def judge(measured: Measured, asked: Asked) -> dict[str, Any]:
    """`unit` and `num`, `metrics` (by name `value` and, where intervals are asked for, `low` and
    `high`), and what this kind of scores has: `curves`, `confusion`, `reliability`, `calibration`,
    `residuals`, `slices`, `worst`. `missing` says in one line each what it has not.

    Raises SpecError for a task whose metrics keep sums alone, PlanError for a slice that cannot be
    known or too few rows to calibrate on.
    """
    scores = scores_of(measured)
    found: dict[str, Any] = {"unit": scores.unit, "num": len(scores), "seed": SEED}
    if asked.num_draws:
        found |= {
            "level": LEVEL,
            "num_draws": asked.num_draws,
            "metrics": intervals(scores, asked.num_draws, SEED),
        }
    else:
        found["metrics"] = {
            name: {"value": finite(value)} for name, value in scores.metrics().items()
        }
    parts, missing = _parts(scores, asked)
    found |= parts
    if asked.slices:
        lengths = _lengths(measured) if "length" in asked.slices else np.zeros(0, np.int64)
        found["slices"] = {
            kind: slice_metrics(
                find_slices(kind, scores, measured.split, lengths), scores, asked.num_draws, SEED
            )
            for kind in asked.slices
        }
    found["worst"] = _worst(measured, scores, asked.texts)
    return found | ({"missing": missing} if missing else {})


def _parts(scores: Scores, asked: Asked) -> tuple[dict[str, Any], list[str]]:
    """What scores of its kind have, and in words what they have not."""
    found: dict[str, Any] = {}
    missing: list[str] = []
    if isinstance(scores, Classes | LabelSets):
        found["curves"] = curves(scores)
        if not found["curves"]:
            missing.append("no ROC or precision-recall curve: no class is both there and not there")
        found["reliability"] = reliability(scores)
        if asked.calibrates:
            found["calibration"] = calibrate(scores, SEED)
    else:
        missing.append("no ROC, precision-recall or reliability curve: its answers are no classes")
        if asked.calibrates:
            raise PlanError(
                "--calibrate", "its answers have no probabilities of classes", "leave it out"
            )
    if isinstance(scores, Classes | Entities) and len(scores.labels) <= MOST_CLASSES:
        found["confusion"] = {"labels": list(scores.labels), "counts": scores.confusion()}
    elif isinstance(scores, Classes | Entities):
        missing.append(
            f"no confusion matrix: there are {len(scores.labels)} classes, and it shows "
            f"{MOST_CLASSES}"
        )
    else:
        missing.append("no confusion matrix: a row has not one class")
    if isinstance(scores, Numbers):
        places = np.unique(np.linspace(0, len(scores) - 1, MOST_POINTS).astype(int))
        found["residuals"] = {
            "wanted": scores.wanted[places].tolist(),
            "found": scores.found[places].tolist(),
        }
    return found, missing


def judge_against(first: Measured, second: Measured, num_draws: int | None) -> dict[str, Any]:
    """The second run beside the first, on the same rows: `metrics` with differences, intervals and
    p-values, and `right_answers`, McNemar's exact test. Raises PlanError for other rows."""
    check_same_rows(first, second)
    own, other = scores_of(first), scores_of(second)
    if type(own) is not type(other) or len(own) != len(other) or not own.is_same_truth(other):
        raise PlanError(
            f"--against {second.trained.run.name}",
            "was measured by other answers on these rows",
            "a paired test needs runs of one task",
        )
    num_draws = num_draws or DEFAULT_DRAWS
    right = compare_right_answers(own, other)
    return {
        "run": second.trained.run.name,
        "step": second.trained.checkpoint.step,
        "num": len(own),
        "unit": own.unit,
        "level": LEVEL,
        "num_draws": num_draws,
        "metrics": compare(own, other, num_draws, SEED),
        **({"right_answers": right} if right else {}),
    }


def check_same_rows(first: Measured, second: Measured) -> None:
    """Raises PlanError unless both runs' rows are the same bytes in the same order."""
    digests = [
        [(source.name, [shard.sha256 for shard in source.shards]) for source in one.split.sources]
        for one in (first, second)
    ]
    if digests[0] != digests[1]:
        raise PlanError(
            f"--against {second.trained.run.name}",
            "its rows are not those of the first run",
            "a paired test is of the same rows, in both runs by one tokeniser and one row length",
            "give both runs the same --data; runs with unlike tokenisers cannot be compared so",
        )


def scores_of(measured: Measured) -> Scores:
    """What the model gave for each row. Raises SpecError where the task's metrics do not keep it,
    and for no rows at all."""
    scores = measured.task.scores(measured.metrics)
    where = f"run {measured.trained.run.name!r}"
    if scores is None:
        raise SpecError(
            where,
            f"its task is {measured.task.name}, whose metrics keep sums alone",
            "intervals, slices, tests and pages are of what a model gives for each row",
            "evaluate it without them",
        )
    if not len(scores):
        raise SpecError(where, "has no rows to judge", "a judgement is of at least one")
    return scores


def _lengths(measured: Measured) -> npt.NDArray[np.int64]:
    """Tokens of each row."""
    tables = _tables(measured, np.arange(measured.split.num_rows))
    return np.concatenate(
        [table.column("num_tokens").to_numpy().astype(np.int64) for table in tables]
    )


def _tables(measured: Measured, ids: npt.NDArray[np.int64]) -> Any:
    corpus, split = measured.corpus, measured.split
    group = corpus.manifest.group_rows
    for start in range(0, len(ids), group):
        yield read_rows(corpus.folder, corpus.manifest, split, ids[start : start + group])


def _worst(measured: Measured, scores: Scores, texts: bool) -> list[dict[str, Any]]:
    """The rows of which the model is most wrong, the worst first; those that cost nothing are not
    among them. With `texts` what they say, where rows are what is measured and have tokens."""
    costs = scores.costs()
    order: Sequence[int] = np.argsort(-costs, kind="stable")[:NUM_WORST].tolist()
    right = scores.correct()
    chosen = [row for row in order if costs[row] > 0 and (right is None or not right[row])]
    found = [{scores.unit: row, "cost": float(costs[row]), **scores.told(row)} for row in chosen]
    if texts and found and scores.is_aligned and measured.task.tokenizes:
        for told, text in zip(found, _texts(measured, chosen), strict=True):
            told["text"] = text
    return found


def _texts(measured: Measured, rows: Sequence[int]) -> list[str]:
    """The texts of rows, as their tokens say them."""
    (table,) = _tables(measured, np.array(rows, dtype=np.int64))
    sizes = table.column("num_tokens").to_pylist()
    return [
        measured.trained.decode(ids[:size])
        for ids, size in zip(table.column("input_ids").to_pylist(), sizes, strict=True)
    ]
