"""Narrower feed-forwards: the same number of places is left in each block, those that matter most
there. The model has a smaller configuration, and is faster by what they took.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field as Limits
from torch import Tensor, nn

from dray.release.compress.calibrating import Judging, watch
from dray.release.compress.method import Candidate, Method
from dray.release.compress.shrinking import (
    best,
    feed_forwards,
    intermediate_of,
    keep_places,
    rebuild,
    state_of,
)
from dray.spec.sections import Float


class Width(Method):
    """Fewer places between the matrices of a feed-forward."""

    name = "width"

    class Settings(Judging):
        """How many."""

        share: Annotated[Float, Limits(gt=0, lt=1)] = 0.5
        """Of the places that are left; their number is rounded down to a multiple of 8."""

    def check(self, candidate: Candidate) -> None:
        feed_forwards(candidate, self)

    def apply(self, candidate: Candidate) -> None:
        found = feed_forwards(candidate, self)
        field, wide = intermediate_of(candidate, self)
        keep = max(8, int(wide * self.settings.share) // 8 * 8)
        outs = {f"{name}.{out}": module for name, _, out, module in found}
        scores = _scores(candidate, outs, self.settings)
        weights = state_of(candidate.model)
        for name, into, out, _ in found:
            places = best(scores[f"{name}.{out}"], keep)
            for inner in into:
                keep_places(weights, f"{name}.{inner}", 0, places)
            keep_places(weights, f"{name}.{out}", 1, places)
        candidate.say(f"width: {keep} of {wide} places of each feed-forward stay")
        candidate.model = rebuild(candidate, self, {field: keep}, weights)
        self.recover(candidate)


def _scores(
    candidate: Candidate, outs: dict[str, nn.Module], settings: Judging
) -> dict[str, Tensor]:
    """How much each input of the matrices matters, [inputs]."""
    if settings.by == "weights":
        return {name: module.weight.detach().norm(dim=0) for name, module in outs.items()}  # type: ignore[operator]
    gradients = settings.by == "gradients"
    return watch(
        candidate,
        outs,
        _taylor if gradients else _of_places,
        num_rows=settings.rows,
        gradients=gradients,
    )


def _of_places(module: nn.Module, value: Tensor, gradient: Tensor | None) -> Tensor:
    """Σ |activation| times the norm of what it is given on by (Sun et al., 2023: Wanda)."""
    norm: Tensor = module.weight.detach().norm(dim=0)  # type: ignore[operator]
    return value.flatten(0, -2).abs().sum(dim=0) * norm


def _taylor(module: nn.Module, value: Tensor, gradient: Tensor | None) -> Tensor:
    """Σ |activation · gradient| (Molchanov et al., 2019)."""
    assert gradient is not None
    return (value * gradient).flatten(0, -2).abs().sum(dim=0)
