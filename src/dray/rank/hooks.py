"""What else happens at fixed places of a step, with named states of its own for every weight.

A hook's states lie beside the optimiser's, on the fp32 elements that this rank steps: no stage
gathers anything for them, and checkpoints hold and restore them like the optimiser's. `build_hooks`
gives those that a spec asks for.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dray.errors import SpecError
from dray.models.groups import find_blocks, hidden_matrices
from dray.rank.chance import Chance, draw_normal
from dray.spec import Ema, GradientNoise, Spec, Swa


@dataclass(frozen=True)
class Stepped:
    """A tensor that the optimiser steps (fp32: a parameter, its master copy, or a flat part of
    many), with what the hook keeps for it, of the same shape."""

    weights: Tensor
    states: Mapping[str, Tensor]


@dataclass(frozen=True)
class Whole:
    """A trained parameter, as all ranks know it."""

    shape: tuple[int, ...]
    is_penalized: bool
    """Whether it is what weight decay is for: a matrix, no norm, bias or embedding."""
    inputs_first: bool = False
    """Whether a matrix has a row for each input, not for each unit."""

    @property
    def num_units(self) -> int:
        """Of a matrix."""
        return self.shape[1 if self.inputs_first else 0]


@dataclass(frozen=True)
class Part:
    """The elements of a parameter from `start` on that this rank steps, as 1-D views: fp32. Where a
    parameter is not parted among ranks, each has all of it."""

    name: str
    start: int
    weights: Tensor
    gradient: Tensor
    whole: Whole

    def units(self) -> Tensor:
        """The unit that each element leads to, [elements] int64."""
        places = torch.arange(
            self.start, self.start + len(self.weights), device=self.weights.device
        )
        if self.whole.inputs_first:
            return places % self.whole.num_units
        return places // (math.prod(self.whole.shape) // self.whole.num_units)


class Hook:
    """Something that works at fixed places of a step; by itself it does nothing at any of them. All
    ranks call it at the same places."""

    states: Sequence[str] = ()
    """Names of what it keeps for every trained weight, in fp32."""

    @property
    def works_on_parts(self) -> bool:
        """Whether it does anything around the optimiser, for which every part is looked up."""
        own = type(self)
        return (
            own.before_update is not Hook.before_update
            or own.after_update_of is not Hook.after_update_of
        )

    def begin(self, stepped: Stepped) -> None:
        """Set the states, which are zeros, as they are before the first update. Also called after a
        checkpoint without them was restored."""

    def before_forward(self, module: nn.Module) -> None:
        """Before each forward pass of training. Under ZeRO 3 parameters are not whole here."""

    def after_backward(self, module: nn.Module) -> None:
        """After the last backward pass of a step. Gradients are whole at stage 0 alone."""

    def before_update(self, parts: Sequence[Part], step: int) -> None:
        """Before the optimiser, with gradients that are averaged over the ranks and clipped. Called
        for each group of parameters that the stage steps by itself."""

    def after_update_of(
        self, parts: Sequence[Part], wholes: Mapping[str, Whole], total: Callable[[Tensor], Tensor]
    ) -> None:
        """After the optimiser, before the weights that the passes use are copied from these.
        `wholes`: all trained parameters by name. `total` sums over the ranks what each has of its
        parts: all of them come here as often."""

    def after_update(
        self, stepped: Sequence[Stepped], num_updates: Tensor, applied: Tensor
    ) -> None:
        """After the optimiser. `num_updates`: those made by now (int64), `applied`: whether this
        one was (bool); both lie on the device, which should not be waited for."""


class Average(Hook):
    """An exponential moving average of the weights.

    At update n it keeps d = min(decay, (1 + n) / (10 + n)) of itself: a fixed decay would hold on
    to the initial weights for the whole of a short run. A step without an update leaves it as it
    is.
    """

    states = ("ema",)

    def __init__(self, settings: Ema) -> None:
        self._decay = settings.decay

    def begin(self, stepped: Stepped) -> None:
        """The initial weights."""
        stepped.states["ema"].copy_(stepped.weights)

    def after_update(
        self, stepped: Sequence[Stepped], num_updates: Tensor, applied: Tensor
    ) -> None:
        """Move towards the weights by 1 - d."""
        done = num_updates.double()
        share = (1 - ((1 + done) / (10 + done)).clamp(max=self._decay)) * applied
        for tensor in stepped:
            ema = tensor.states["ema"]
            ema.lerp_(tensor.weights, share.to(ema))


class EqualAverage(Hook):
    """The mean of the weights after every `every_steps` updates from `first_step` on (stochastic
    weight averaging: Izmailov et al. 2018); until then the weights themselves."""

    states = ("swa",)

    def __init__(self, settings: Swa) -> None:
        self._first, self._every = settings.first_step, settings.every_steps

    def begin(self, stepped: Stepped) -> None:
        """The initial weights."""
        stepped.states["swa"].copy_(stepped.weights)

    def after_update(
        self, stepped: Sequence[Stepped], num_updates: Tensor, applied: Tensor
    ) -> None:
        """Take the weights in as the n-th of n, where it is their turn."""
        since = num_updates - self._first
        number = since.clamp(min=0) // self._every + 1
        share = torch.where(since % self._every == 0, 1 / number.double(), 0.0)
        share = torch.where(since < 0, 1.0, share) * applied
        for tensor in stepped:
            swa = tensor.states["swa"]
            swa.lerp_(tensor.weights, share.to(swa))


class KeptZeros(Hook):
    """Weights of the blocks' matrices that are zero get no gradient, and so stay zero: nothing that
    an elementwise optimiser keeps of them or decays is anything else.

    A weight says itself whether it is held, so that nothing is kept: a resumed run holds the same.
    Gradients are silenced as they come, before any stage sums or cuts them.
    """

    def __init__(self) -> None:
        self._watched = False

    def before_forward(self, module: nn.Module) -> None:
        """Watch the matrices, once."""
        if self._watched:
            return
        self._watched = True
        hidden = hidden_matrices(module)
        for parameter in module.parameters():
            if id(parameter) in hidden and parameter.requires_grad:
                parameter.register_hook(partial(_silenced, parameter))  # type: ignore[no-untyped-call]


def _silenced(parameter: Tensor, gradient: Tensor) -> Tensor:
    return gradient * (parameter.detach() != 0)


class Penalty(Hook):
    """The gradients of l1 · Σ|w| + l2/2 · Σw² over what weight decay is for, added to those of the
    loss. As torch's own coupled decay they come after clipping, and no reported loss has them."""

    def __init__(self, l1: float, l2: float) -> None:
        self._l1, self._l2 = l1, l2

    def before_update(self, parts: Sequence[Part], step: int) -> None:
        """Add l1 · sign(w) + l2 · w."""
        for part in parts:
            if part.whole.is_penalized:
                part.gradient.add_(part.weights, alpha=self._l2)
                part.gradient.add_(part.weights.sign(), alpha=self._l1)


class Noise(Hook):
    """Normal noise on the gradients, of the variance eta / (1 + t)^gamma at step t from 0 on
    (Neelakantan et al. 2015), after clipping. It is drawn by the step, the parameter's name and the
    element's place in it, so that it is the same at any stage and on any number of ranks."""

    def __init__(self, settings: GradientNoise, seed: int) -> None:
        self._eta, self._gamma, self._seed = settings.eta, settings.gamma, seed

    def before_update(self, parts: Sequence[Part], step: int) -> None:
        """Add it."""
        deviation = (self._eta / step**self._gamma) ** 0.5
        for part in parts:
            what = struct.pack("<2Q", self._seed, step) + part.name.encode()
            keys = struct.unpack("<4i", hashlib.blake2b(what, digest_size=16).digest())
            draw_normal(part.gradient, keys, first=part.start, scale=deviation)


class MaxNorm(Hook):
    """The weights that lead to a unit are scaled down where their norm is greater (Srivastava et
    al. 2014), of what weight decay is for."""

    def __init__(self, greatest: float) -> None:
        self._greatest = greatest

    def after_update_of(
        self, parts: Sequence[Part], wholes: Mapping[str, Whole], total: Callable[[Tensor], Tensor]
    ) -> None:
        """Scale them. A unit's weights may lie on several ranks, so all of them are summed up."""
        first, num_units = {}, 0
        for name, whole in wholes.items():
            if whole.is_penalized and len(whole.shape) >= 2:
                first[name] = num_units
                num_units += whole.num_units
        mine = [part for part in parts if part.name in first]
        if not num_units:
            return
        device = parts[0].weights.device if parts else None
        squares = torch.zeros(num_units, dtype=torch.float32, device=device)
        units = [first[part.name] + part.units() for part in mine]
        for part, unit in zip(mine, units, strict=True):
            squares.index_add_(0, unit, part.weights.square())
        norms = total(squares).sqrt()
        scales = torch.where(norms > self._greatest, self._greatest / norms, 1.0)
        for part, unit in zip(mine, units, strict=True):
            part.weights.mul_(scales[unit])


class PassedBlocks(Hook):
    """Rows pass by whole blocks of the model, each by its own chance, which grows evenly up to
    `share` at the last one (LayerDrop: Fan, Grave and Joulin 2020, by the linear rule of Huang et
    al. 2016). What goes through is not scaled, and evaluation leaves no block out. Blocks whose
    output is of another shape than their input are never passed by."""

    def __init__(self, share: float, chance: Chance) -> None:
        self._share, self._chance = share, chance
        self._watched = False

    def before_forward(self, module: nn.Module) -> None:
        """Watch the blocks, once."""
        if self._watched:
            return
        self._watched = True
        blocks = find_blocks(module)
        for number, block in enumerate(blocks, start=1):
            share = self._share * number / len(blocks)
            block.register_forward_hook(partial(self._pass, number, share), with_kwargs=True)

    def _pass(  # noqa: PLR0917 - two are bound, four are torch's
        self, number: int, share: float, block: nn.Module, given: Any, named: Any, output: Any
    ) -> Any:
        before = given[0] if given else named.get("hidden_states")
        after = output[0] if isinstance(output, tuple) else output
        if not (block.training and torch.is_grad_enabled() and self._chance.is_open):
            return output
        if not isinstance(before, Tensor) or before.shape != after.shape:
            return output
        kept = self._chance.kept((len(after),), share, name=BLOCKS + number)
        after = torch.where(kept.reshape(-1, *[1] * (after.dim() - 1)), after, before)
        return (after, *output[1:]) if isinstance(output, tuple) else after


BLOCKS = 1 << 10
"""Names of draws from here on are of blocks."""


def check_blocks(model: nn.Module, spec: Spec) -> None:
    """Raise SpecError for a model that has no blocks to pass by."""
    if spec.regularization.stochastic_depth and not find_blocks(model):
        raise SpecError(
            "regularization.stochastic_depth",
            f"{type(model).__name__} has no blocks that transformers knows",
            "rows pass by blocks of the same shape",
            "leave it out",
        )


def build_hooks(spec: Spec, chance: Chance) -> list[Hook]:
    """The hooks that a spec asks for, in the order in which they work."""
    given, hooks = spec.regularization, list[Hook]()
    if given.l1 or given.l2:
        hooks.append(Penalty(given.l1, given.l2))
    if given.gradient_noise is not None:
        hooks.append(Noise(given.gradient_noise, spec.seed))
    if given.max_norm is not None:
        hooks.append(MaxNorm(given.max_norm))
    if given.stochastic_depth:
        hooks.append(PassedBlocks(given.stochastic_depth, chance))
    if given.ema is not None:
        hooks.append(Average(given.ema))
    if given.swa is not None:
        hooks.append(EqualAverage(given.swa))
    if given.keep_zeros:
        hooks.append(KeptZeros())
    return hooks
