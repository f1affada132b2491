"""What a classifier gives at other thresholds: ROC and precision-recall curves by scikit-learn, of
each class against the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dray.tasks.parts.scores import Classes, LabelSets

MOST_POINTS = 200
"""Of a curve: others between them are left out, evenly."""
MOST_CURVES = 5
"""As many as a plot names beside its line of chance."""


def curves(scores: Classes | LabelSets) -> dict[str, dict[str, Any]]:
    """By class: `num` (rows of it), `auc`, `average_precision`, and the points of both curves.

    With two classes it is the second one alone, since the other's are its mirror image; of many
    classes the most frequent ones. A class that all rows have, or none, has no curves.
    """
    from sklearn.metrics import (
        average_precision_score,
        precision_recall_curve,
        roc_auc_score,
        roc_curve,
    )

    found: dict[str, dict[str, Any]] = {}
    for place, truth in _chosen(scores):
        likely = scores.probabilities[:, place]
        false_rate, true_rate, _ = roc_curve(truth, likely)
        precision, recall, thresholds = precision_recall_curve(truth, likely)
        found[scores.labels[place]] = {
            "num": int(truth.sum()),
            "auc": float(roc_auc_score(truth, likely)),
            "average_precision": float(average_precision_score(truth, likely)),
            "roc": _thin({"false_positive_rate": false_rate, "true_positive_rate": true_rate}),
            "precision_recall": _thin(
                {
                    "recall": recall[:-1],
                    "precision": precision[:-1],
                    "threshold": thresholds,
                }
            ),
        }
    return found


def _chosen(scores: Classes | LabelSets) -> list[tuple[int, npt.NDArray[np.int64]]]:
    """The classes that have curves, and which rows are of them."""
    if isinstance(scores, Classes):
        truths = np.eye(len(scores.labels), dtype=np.int64)[scores.wanted]
        places: Sequence[int] = [1] if len(scores.labels) == 2 else range(len(scores.labels))
    else:
        truths, places = scores.wanted, range(len(scores.labels))
    counts = truths.sum(axis=0)
    frequent = sorted(places, key=lambda place: -counts[place])
    mixed = [place for place in frequent if 0 < counts[place] < len(truths)]
    return [(place, truths[:, place]) for place in sorted(mixed[:MOST_CURVES])]


def _thin(columns: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, list[float]]:
    size = len(next(iter(columns.values())))
    places = np.unique(np.linspace(0, size - 1, min(size, MOST_POINTS)).astype(int))
    return {name: values[places].tolist() for name, values in columns.items()}
