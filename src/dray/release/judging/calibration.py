"""Whether a classifier's probabilities are what they say: reliability, the expected calibration
error, and one temperature that mends it (Guo et al., 2017).

The temperature is fitted on one half of the rows and measured on the other half, never on the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dray.errors import PlanError
from dray.tasks.parts.scores import LEAST_PROBABILITY, Classes, Floats, LabelSets

NUM_BINS = 15
FEWEST_ROWS = 20
TEMPERATURES = (0.02, 50.0)
Judged = Classes | LabelSets


def calibrate(scores: Judged, seed: int) -> dict[str, Any]:
    """`temperature`, fitted on `num_fitted` rows; on the other `num_measured` rows `before` and
    `after` it. Halves are drawn by the seed. Raises PlanError for too few rows."""
    if len(scores) < FEWEST_ROWS:
        raise PlanError(
            "--calibrate",
            f"there are {len(scores)} rows",
            f"at least {FEWEST_ROWS} are needed: a half to fit on, a half to measure",
            "give more --data",
        )
    order = np.random.default_rng([seed, 2]).permutation(len(scores))
    fitted, measured = (np.sort(part) for part in np.array_split(order, 2))
    temperature = fit_temperature(scores.take(fitted))
    rest = scores.take(measured)
    return {
        "temperature": temperature,
        "num_fitted": len(fitted),
        "num_measured": len(measured),
        "before": reliability(rest),
        "after": reliability(at_temperature(rest, temperature)),
    }


def reliability(scores: Judged) -> dict[str, Any]:
    """`ece` over NUM_BINS bins of equal width (as it is usually told), `ece_equal_mass` over as
    many of equally many rows, `mce` (the worst bin of equal width), `log_loss`, `brier`, and
    `bins`.

    Of classes it is about the guess' probability, and whether that is right; of labels about each
    label of each row.
    """
    confidence, right = confidences(scores)
    bins = make_bins(confidence, right)
    gaps = [abs(one["confidence"] - one["accuracy"]) for one in bins]
    return {
        "ece": weighted_gap(bins),
        "ece_equal_mass": weighted_gap(make_bins(confidence, right, equal_mass=True)),
        "mce": max(gaps),
        "log_loss": float(np.mean(scores.costs())),
        "brier": scores.metrics()["brier"],
        "bins": bins,
    }


def confidences(scores: Judged) -> tuple[Floats, Floats]:
    """Probabilities, and 1 where what they are of is so, else 0."""
    if isinstance(scores, LabelSets):
        return scores.probabilities.ravel(), scores.wanted.ravel().astype(np.float64)
    own = scores.probabilities[np.arange(len(scores)), scores.guesses]
    return own, scores.correct().astype(np.float64)


def make_bins(
    confidence: Floats, right: Floats, *, equal_mass: bool = False
) -> list[dict[str, float]]:
    """Bins that are not empty: `num`, and the means `confidence` and `accuracy`. A probability on
    the edge of two bins of equal width is in the lower one."""
    if equal_mass:
        parts = np.array_split(np.argsort(confidence, kind="stable"), NUM_BINS)
    else:
        edges = np.linspace(0, 1, NUM_BINS + 1)[1:-1]
        places = np.searchsorted(edges, confidence, side="left")
        parts = [np.flatnonzero(places == place) for place in range(NUM_BINS)]
    return [
        {
            "num": len(rows),
            "confidence": float(confidence[rows].mean()),
            "accuracy": float(right[rows].mean()),
        }
        for rows in parts
        if len(rows)
    ]


def weighted_gap(bins: list[dict[str, float]]) -> float:
    """The expected calibration error: the mean gap of bins, weighted by their rows."""
    total = sum(one["num"] for one in bins)
    return sum(one["num"] * abs(one["confidence"] - one["accuracy"]) for one in bins) / total


def fit_temperature(scores: Judged) -> float:
    """What logits are divided by so that the log loss is least, within TEMPERATURES."""
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        return float(np.mean(at_temperature(scores, float(np.exp(log_temperature))).costs()))

    bounds = tuple(np.log(TEMPERATURES).tolist())
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def at_temperature(scores: Judged, temperature: float) -> Judged:
    """The same rows with the probabilities that their logits give at a temperature. Guesses stay as
    they are."""
    if isinstance(scores, LabelSets):
        likely = np.clip(scores.probabilities, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
        logits = (np.log(likely) - np.log1p(-likely)) / temperature
        return replace(scores, probabilities=1 / (1 + np.exp(-logits)))
    # Logarithms of probabilities are logits, but for a number that a row's have in common.
    logits = np.log(np.clip(scores.probabilities, LEAST_PROBABILITY, 1.0)) / temperature
    return replace(scores, probabilities=_softmax(logits))


def _softmax(logits: Floats) -> npt.NDArray[np.float64]:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: npt.NDArray[np.float64] = raised / raised.sum(axis=1, keepdims=True)
    return shares
