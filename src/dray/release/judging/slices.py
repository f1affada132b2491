"""Metrics of parts of the rows: by label, by length, by the source that they came from. A slice is
what a corpus knows of its rows; other columns of raw data it does not keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dray.corpus.manifest import Split
from dray.errors import PlanError
from dray.release.judging.intervals import finite, intervals
from dray.tasks.parts.scores import Scores, quarters

Masks = Mapping[str, npt.NDArray[np.bool_]]
KINDS = ("label", "length", "source")
MOST_SLICES = 50
"""Of one kind: the largest ones; how many others there are is told."""


def check_kinds(kinds: Sequence[str]) -> None:
    """Raises PlanError for a kind that no corpus knows."""
    if other := [kind for kind in kinds if kind not in KINDS]:
        raise PlanError(
            f"--slices {other[0]}",
            "a corpus does not keep that of its rows",
            f"it knows {', '.join(KINDS)}",
            "for a column of your data, give the rows of each of its values as a --data of their "
            "own, and --slices source",
        )


def find_slices(kind: str, scores: Scores, split: Split, lengths: npt.NDArray[np.int64]) -> Masks:
    """Which rows are of which slice. Raises PlanError where that cannot be known."""
    if kind == "label":
        masks = scores.by_label()
        if not masks:
            raise PlanError("--slices label", "its rows have no labels", "leave it out")
        return masks
    if not scores.is_aligned or len(scores) != split.num_rows:
        raise PlanError(
            f"--slices {kind}",
            f"what is measured is of each {scores.unit}, which is not a row of the corpus",
            "only rows have a length and a source",
            "leave it out",
        )
    if kind == "length":
        return {f"{name} tokens": rows for name, rows in quarters(lengths).items()}
    sizes = [source.num_rows for source in split.sources]
    places = np.repeat(np.arange(len(sizes)), sizes)
    masks = {}
    for place, source in enumerate(split.sources):
        rows = places == place
        masks[source.name] = masks[source.name] | rows if source.name in masks else rows
    return masks


def slice_metrics(
    masks: Masks, scores: Scores, num_draws: int | None, seed: int
) -> dict[str, dict[str, Any]]:
    """By slice `num`, and its metrics, each a value or, where draws are wanted, an interval."""
    shown = sorted(masks.items(), key=lambda item: -int(item[1].sum()))[:MOST_SLICES]
    found = {}
    for name, mask in masks.items():
        if not mask.any() or name not in dict(shown):
            continue
        part = scores.take(np.flatnonzero(mask))
        values: dict[str, Any] = (
            intervals(part, num_draws, seed)
            if num_draws
            else {name: {"value": finite(value)} for name, value in part.metrics().items()}
        )
        found[name] = {"num": len(part), "metrics": values}
    return found
