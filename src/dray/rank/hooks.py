"""What else happens at fixed places of a step, with named states of its own for every weight.

A hook's states lie beside the optimiser's, on the fp32 elements that this rank steps: no stage
gathers anything for them, and checkpoints hold and restore them like the optimiser's. `build_hooks`
gives those that a spec asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from dray.models.groups import hidden_matrices
from dray.spec import Ema, Spec


@dataclass(frozen=True)
class Stepped:
    """A tensor that the optimiser steps (fp32: a parameter, its master copy, or a flat part of
    many), with what the hook keeps for it, of the same shape."""

    weights: Tensor
    states: Mapping[str, Tensor]


class Hook(Protocol):
    """Something that works at fixed places of a step. All ranks call it at the same places."""

    states: Sequence[str]
    """Names of what it keeps for every trained weight, in fp32."""

    def begin(self, stepped: Stepped) -> None:
        """Set the states, which are zeros, as they are before the first update. Also called after a
        checkpoint without them was restored."""

    def before_forward(self, module: nn.Module) -> None:
        """Before each forward pass of training. Under ZeRO 3 parameters are not whole here."""

    def after_backward(self, module: nn.Module) -> None:
        """After the last backward pass of a step. Gradients are whole at stage 0 alone."""

    def after_update(
        self, stepped: Sequence[Stepped], num_updates: Tensor, applied: Tensor
    ) -> None:
        """After the optimiser. `num_updates`: those made by now (int64), `applied`: whether this
        one was (bool); both lie on the device, which should not be waited for."""


class Average:
    """An exponential moving average of the weights.

    At update n it keeps d = min(decay, (1 + n) / (10 + n)) of itself: a fixed decay would hold on
    to the initial weights for the whole of a short run. A step without an update leaves it as it
    is.
    """

    states: Sequence[str] = ("ema",)

    def __init__(self, settings: Ema) -> None:
        self._decay = settings.decay

    def begin(self, stepped: Stepped) -> None:
        """The initial weights."""
        stepped.states["ema"].copy_(stepped.weights)

    def before_forward(self, module: nn.Module) -> None:
        """Nothing."""

    def after_backward(self, module: nn.Module) -> None:
        """Nothing."""

    def after_update(
        self, stepped: Sequence[Stepped], num_updates: Tensor, applied: Tensor
    ) -> None:
        """Move towards the weights by 1 - d."""
        done = num_updates.double()
        share = (1 - ((1 + done) / (10 + done)).clamp(max=self._decay)) * applied
        for tensor in stepped:
            ema = tensor.states["ema"]
            ema.lerp_(tensor.weights, share.to(ema))


class KeptZeros:
    """Weights of the blocks' matrices that are zero get no gradient, and so stay zero: nothing that
    an elementwise optimiser keeps of them or decays is anything else.

    A weight says itself whether it is held, so that nothing is kept: a resumed run holds the same.
    Gradients are silenced as they come, before any stage sums or cuts them.
    """

    states: Sequence[str] = ()

    def __init__(self) -> None:
        self._watched = False

    def begin(self, stepped: Stepped) -> None:
        """Nothing."""

    def before_forward(self, module: nn.Module) -> None:
        """Watch the matrices, once."""
        if self._watched:
            return
        self._watched = True
        hidden = hidden_matrices(module)
        for parameter in module.parameters():
            if id(parameter) in hidden and parameter.requires_grad:
                parameter.register_hook(partial(_silenced, parameter))  # type: ignore[no-untyped-call]

    def after_backward(self, module: nn.Module) -> None:
        """Nothing."""

    def after_update(
        self, stepped: Sequence[Stepped], num_updates: Tensor, applied: Tensor
    ) -> None:
        """Nothing."""


def _silenced(parameter: Tensor, gradient: Tensor) -> Tensor:
    return gradient * (parameter.detach() != 0)


def build_hooks(spec: Spec) -> list[Hook]:
    """The hooks that a spec asks for."""
    given = spec.regularization
    hooks: list[Hook] = [] if given.ema is None else [Average(given.ema)]
    return [*hooks, KeptZeros()] if given.keep_zeros else hooks
