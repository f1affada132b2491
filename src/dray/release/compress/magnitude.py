"""Pruning by magnitude: the smallest weights of the blocks' matrices become zeros and stay so while
what is left is trained. The architecture stays as it is, so nothing is faster; zeros are stored as
any weight is.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field as Limits
from torch import nn
from torch.nn.utils import prune

from dray.models.groups import hidden_matrices
from dray.release.compress.method import Candidate, Method, Recovering
from dray.spec.sections import Float


class Magnitude(Method):
    """Zeros for the weights that are nearest to it."""

    name = "magnitude"

    class Settings(Recovering):
        """How many, and of what."""

        share: Annotated[Float, Limits(gt=0, lt=1)] = 0.5
        """Of the weights of the blocks' matrices."""
        over: Literal["all", "matrix"] = "all"
        """The smallest of `all` matrices together, or so many of each `matrix`."""

    def check(self, candidate: Candidate) -> None:
        hidden_matrices(candidate.model)

    def apply(self, candidate: Candidate) -> None:
        places = block_weights(candidate.model)
        if self.settings.over == "all":
            prune.global_unstructured(
                places, pruning_method=prune.L1Unstructured, amount=self.settings.share
            )
        for module, leaf in places:
            if self.settings.over == "matrix":
                prune.l1_unstructured(module, leaf, self.settings.share)  # type: ignore[no-untyped-call]
            settle(module, leaf)
        candidate.keeps_zeros = True
        self.recover(candidate)


def block_weights(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The matrices of a model's blocks, as a module and the name of its weight."""
    hidden = hidden_matrices(model)
    return [
        (module, leaf)
        for module in model.modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if id(parameter) in hidden
    ]


def settle(module: nn.Module, leaf: str) -> None:
    """Make a pruned weight an ordinary parameter again, at its own place among the others: names
    and order are those of checkpoints."""
    order = [name.removesuffix("_orig") for name in module._parameters]
    prune.remove(module, leaf)  # type: ignore[no-untyped-call]
    for name in order:
        module._parameters[name] = module._parameters.pop(name)
