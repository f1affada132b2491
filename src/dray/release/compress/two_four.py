"""2:4 sparsity: of each four neighbouring weights of a row two are zeros. Only GPUs with sparse
tensor cores are faster by it; on a CPU it costs as much as before, and it is stored as any weight
is.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dray.release.compress.calibrating import Judging, watch
from dray.release.compress.magnitude import block_weights
from dray.release.compress.method import Candidate, Method


class TwoFour(Method):
    """Two of four, by magnitude, or by what flows through them."""

    name = "two_four"

    class Settings(Judging):
        """Which of four stay."""

        by: Literal["weights", "activations"] = "weights"
        """`weights`: the two with the greatest magnitude; `activations`: those with the greatest
        magnitude times the norm of their input on rows of the corpus (Wanda)."""

    def check(self, candidate: Candidate) -> None:
        self._places(candidate)

    def _places(self, candidate: Candidate) -> dict[str, nn.Linear]:
        names = {id(module): name for name, module in candidate.model.named_modules()}
        found = {}
        for module, _ in block_weights(candidate.model):
            if not isinstance(module, nn.Linear) or module.in_features % 4:
                raise self.refused(
                    candidate,
                    f"{names[id(module)]} is no matrix of rows of fours",
                    "two of each four inputs stay",
                )
            found[names[id(module)]] = module
        return found

    @torch.no_grad()
    def apply(self, candidate: Candidate) -> None:
        places = self._places(candidate)
        norms: dict[str, Tensor] = {}
        if self.settings.by == "activations":
            norms = watch(
                candidate,
                dict(places),
                lambda module, value, gradient: value.flatten(0, -2).square().sum(dim=0),
                num_rows=self.settings.rows,
                gradients=False,
            )
        for name, module in places.items():
            score = module.weight.abs()
            if name in norms:
                score = score * norms[name].sqrt()
            module.weight.mul_(two_of_four(score))
        candidate.keeps_zeros = True
        with torch.enable_grad():
            self.recover(candidate)


def two_of_four(score: Tensor) -> Tensor:
    """1 for the two greatest of each four neighbours of a row, 0 for the others."""
    fours = score.reshape(*score.shape[:-1], -1, 4)
    mask = torch.zeros_like(fours).scatter_(-1, fours.topk(2, dim=-1).indices, 1.0)
    return mask.flatten(-2)
