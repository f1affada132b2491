"""Models of several widths that learn best at one learning rate: maximal update parametrisation.

With a width m times that of a base, Adam's rate and the initial weights of a matrix are scaled, so
that every layer's outputs change as much in a step as they did at the base (Yang et al. 2022,
Tensor Programs V, arXiv 2203.03466; the decay as in Dey et al. 2025, CompleteP, arXiv 2505.01618):

    hidden matrices   initial deviation × m^-½   rate × 1/m   decay × m
    output matrix     initial deviation × 1/m    rate × 1/m   decay × m
    everything else   as at the base

Of the output matrix this is the form without a multiplier in the forward pass, equal under Adam, so
that an exported model is like any other. Heads of attention keep their size: a wider model has more
of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from dray.models.groups import hidden_matrices
from dray.models.initialize import Gathering, draws_here, no_gathering
from dray.spec import Spec

Groups = list[dict[str, Any]]


def width_factor(spec: Spec) -> float:
    """How many times as wide as its base a spec's model is; 1 without a base."""
    base = spec.optimizer.base_hidden_size
    return 1.0 if base is None else (spec.model.hidden_size or base) / base


def scale_initial_weights(model: Any, factor: float, gathering: Gathering = no_gathering) -> None:
    """Scale the weights of a model that have just been drawn."""
    if factor == 1.0:
        return
    inner, outer = _roles(model)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = (
                1 / math.sqrt(factor)
                if id(parameter) in inner
                else 1 / factor
                if id(parameter) in outer
                else 1.0
            )
            if scale == 1.0:
                continue
            with gathering([parameter]):
                if draws_here(parameter):
                    parameter.mul_(scale)


def with_rates(model: nn.Module, groups: Groups, factor: float) -> Groups:
    """The optimiser's groups, parted by `rate_scale`, by which the engine multiplies the rate."""
    if factor == 1.0:
        return groups
    inner, outer = _roles(model)
    parted: Groups = []
    for group in groups:
        for scale, chosen in ((1 / factor, True), (1.0, False)):
            parameters = [p for p in group["params"] if (id(p) in inner | outer) is chosen]
            if parameters:
                decay = group["weight_decay"] / scale
                parted.append(
                    {**group, "params": parameters, "weight_decay": decay, "rate_scale": scale}
                )
    return parted


def _roles(model: Any) -> tuple[set[int], set[int]]:
    """The ids of the matrices both of whose sides grow with the width, and of those with one such
    side that put out what the loss sees."""
    inner, outer = set(hidden_matrices(model)), set[int]()
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    head = model.get_output_embeddings()
    heads = {id(head.weight)} if head is not None else set()
    body = set(map(id, model.base_model.parameters()))
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if len(shape) != 2 or id(parameter) in inner | tables:
            continue
        # Outside of the blocks: a pooler or a head's transform is square, what puts out is not.
        is_square = shape[0] == shape[1]
        is_head = id(parameter) in heads or (id(parameter) not in body and not is_square)
        (outer if is_head else inner).add(id(parameter))
    return inner, outer
