"""What a row costs a model of no tokens, measured on the model itself: on the meta device, where
nothing is computed and nothing takes memory.

torch counts the multiplications of a forward pass, and what autograd keeps of it is looked at as it
is kept. So an architecture needs no formula, whatever it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dray.plan import RowCost

ROWS = 2
"""As many are measured at once: some architectures ask for more than one."""


def measure_row(model: nn.Module, inputs: Mapping[str, Tensor], num_tokens: int) -> RowCost:
    """The cost of a row of so many tokens. `model` is on the meta device; `inputs` are of ROWS
    rows, with whatever in them.

    The backward pass is taken to multiply twice what the forward pass does.
    """
    return _measure(model, lambda given: model(**given), inputs, num_tokens)


def measure_added(objective: Any, inputs: Mapping[str, Tensor], num_tokens: int) -> RowCost:
    """The same of what a task has added to a model, by its objective around that: the model itself
    computes without gradients."""

    def terms(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found, _ = objective(given)
        return {name: total for name, (total, _) in found.items()}

    return _measure(objective, terms, inputs, num_tokens, spared="model")


def _measure(
    model: nn.Module,
    compute: Callable[[Mapping[str, Tensor]], Mapping[str, Any]],
    inputs: Mapping[str, Tensor],
    num_tokens: int,
    *,
    spared: str = "",
) -> RowCost:
    """`spared`: the part of the model, by name, that has no backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    kept: dict[Any, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:  # weights are there anyway
            place = storage, tensor.storage_offset()
            kept[place] = max(kept.get(place, 0), tensor.numel())
            alive.append(tensor)  # or another one might be told by the same place
        return tensor

    alive: list[Tensor] = []
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    model.eval()  # what some architectures draw in training is drawn on the CPU
    counter: Any = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = compute({name: value.to("meta") for name, value in inputs.items()})
    outputs = sum(value.numel() for value in output.values() if isinstance(value, Tensor))
    own_counts = counter.get_flop_counts().get(f"{type(model).__name__}.{spared}", {})
    once = sum(own_counts.values())
    return RowCost(
        tokens=num_tokens,
        flops=(3.0 * counter.get_total_flops() - 2.0 * once) / ROWS,
        elements=(sum(kept.values()) + outputs) // ROWS,
        largest=max(kept.values(), default=0) // ROWS,
        shares_statistics=any(isinstance(module, _BatchNorm) for module in model.modules()),
    )
