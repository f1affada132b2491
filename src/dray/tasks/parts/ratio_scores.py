"""What a model gave for each row whose metrics are sums by sums: losses of tokens, errors of texts,
places in a ranking."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from dray.tasks.parts.scores import Floats, Ints, Scores

Derive = Callable[[Mapping[str, float]], dict[str, float]]


@dataclass(frozen=True)
class Ratios(Scores):
    """Metrics that are one sum by another, each a number a row: a loss by targets, or a mean, by
    1. `derive` makes others of them. `cost` is the one whose rows say how wrong the model is; of it
    less is better, if `is_loss`."""

    sums: Mapping[str, tuple[Floats, Floats]]
    """By name: numerators and denominators, each [rows]."""
    cost: str
    is_loss: bool = True
    derive: Derive | None = None
    of: str = "row"
    aligned: bool = True

    @property
    def unit(self) -> str:
        return self.of

    @property
    def is_aligned(self) -> bool:
        return self.aligned

    def __len__(self) -> int:
        return len(self.sums[self.cost][0])

    def take(self, rows: Ints) -> Self:
        return replace(
            self, sums={name: (top[rows], low[rows]) for name, (top, low) in self.sums.items()}
        )

    def join(self, other: Self) -> Self:
        joined = {
            name: (np.concatenate([top, other.sums[name][0]]),
                   np.concatenate([low, other.sums[name][1]]))
            for name, (top, low) in self.sums.items()
        }  # fmt: skip
        return replace(self, sums=joined)

    def is_same_truth(self, other: Self) -> bool:
        return len(self) == len(other) and all(
            name in other.sums and np.array_equal(low, other.sums[name][1])
            for name, (_, low) in self.sums.items()
            if name == self.cost
        )

    def metrics(self) -> dict[str, float]:
        found = {
            name: float(top.sum() / low.sum()) if low.sum() else math.nan
            for name, (top, low) in self.sums.items()
        }
        return found | (self.derive(found) if self.derive else {})

    def costs(self) -> Floats:
        top, low = self.sums[self.cost]
        costs = np.divide(top, low, out=np.zeros_like(top), where=low > 0)
        return costs if self.is_loss else -costs

    def told(self, row: int) -> dict[str, Any]:
        return {
            name: float(top[row] / low[row]) if low[row] else None
            for name, (top, low) in self.sums.items()
        }


def perplexity(found: Mapping[str, float]) -> dict[str, float]:
    """The exponential of the mean loss."""
    return {"perplexity": math.exp(min(found["loss"], 700.0))}
