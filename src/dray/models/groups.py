"""A model's parameters as an optimiser sees them: blocks, the matrices in them, and which of them
decay.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dray.errors import SpecError


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers that a model repeats, each of which transformers can checkpoint by itself; none
    where an architecture has no such layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[nn.Module] = []
    inner: set[nn.Module] = set()
    for module in model.modules():  # outer ones first
        if isinstance(module, GradientCheckpointingLayer) and module not in inner:
            found.append(module)
            inner.update(module.modules())
    return found


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters as the optimiser's groups: with weight decay, and (norms, biases,
    embeddings) without; `penalized` says so whatever the decay is.

    A head tied to the embedding counts as embedding. Works on partitioned parameters: it goes by
    the kind of the module and the full shape. Empty groups are left out.
    """
    spared: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in sorted(model.modules(), key=lambda module: not isinstance(module, nn.Embedding)):
        is_spared = isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            num_dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            flat = num_dimensions < 2 or name.endswith("bias") or "embedding" in name
            (spared if is_spared or flat else decayed).append(parameter)
    order = {id(parameter): place for place, parameter in enumerate(model.parameters())}
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "penalized": True},
        {"params": spared, "weight_decay": 0.0, "penalized": False},
    ]
    for group in groups:
        group["params"].sort(key=lambda parameter: order[id(parameter)])  # type: ignore[attr-defined]
    return [group for group in groups if group["params"]]


def part_hidden(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The optimiser's groups, each parted by `hidden`: the matrices of the model's blocks, and the
    rest. Raises SpecError for a model without such matrices."""
    hidden = hidden_matrices(model)
    parted = []
    for group in groups:
        for is_hidden in (True, False):
            parameters = [p for p in group["params"] if (id(p) in hidden) is is_hidden]
            if parameters:
                parted.append({**group, "params": parameters, "hidden": is_hidden})
    return parted


def hidden_matrices(model: nn.Module) -> set[int]:
    """The ids of the matrices of a model's blocks, tables that are looked up aside. Raises
    SpecError."""
    found = {
        id(parameter)
        for block in find_blocks(model)
        for module in block.modules()
        for parameter in module.parameters(recurse=False)
        if len(getattr(parameter, "ds_shape", parameter.shape)) == 2
        and not isinstance(module, nn.Embedding)
    }
    if not found:
        raise SpecError(
            "optimizer",
            f"{type(model).__name__} has no matrices in blocks that transformers knows",
            "which are updated otherwise than embeddings and heads",
            "give optimizer.name=adamw",
        )
    return found
