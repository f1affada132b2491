"""Which parameters of a model are trained, from which step on, and how fast.

A model is a stack: what lies before the first block (depth 0), blocks 1 to L, and what follows them
(depth L + 1: the last norm, the head). A head that is tied to the embedding lies where that does.
What is never trained is marked: no checkpoint holds it, since it is made again from where it came.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from dray.errors import SpecError
from dray.models.groups import find_blocks
from dray.spec import Freezing, Spec

Groups = list[dict[str, Any]]
_MARK = "_dray_base"


def keep_as_base(parameters: Iterable[nn.Parameter]) -> None:
    """Train these never, and keep them in no checkpoint."""
    for parameter in parameters:
        parameter.requires_grad_(False)
        setattr(parameter, _MARK, True)


def is_base(parameter: nn.Parameter) -> bool:
    """Whether it stays as it came with the model, and stands in no checkpoint."""
    return bool(getattr(parameter, _MARK, False))


def is_in_body(model: Any, name: str) -> bool:
    """Whether a parameter belongs to the part of a model that all its tasks share. Poolers lie
    there by name, but come with a head."""
    return name.startswith(f"{model.base_model_prefix}.") and "pooler" not in name


def freeze(model: Any, freezing: Freezing) -> None:
    """Freeze for good what a spec says. Raises SpecError for a model without blocks, or with
    fewer than are to be frozen."""
    depths = find_depths(model, "freezing")
    num_blocks = max(depths.values(), default=1) - 1
    if freezing.blocks > num_blocks:
        raise SpecError(
            f"freezing.blocks = {freezing.blocks}",
            f"the model has {num_blocks}",
            "the first so many are frozen",
            f"give {num_blocks} or fewer",
        )
    head = getattr(model.get_output_embeddings(), "weight", None)
    for name, parameter in model.named_parameters():
        depth = depths[id(parameter)]
        if (
            (freezing.embeddings and depth == 0)
            or 1 <= depth <= freezing.blocks
            or (freezing.body and is_in_body(model, name) and parameter is not head)
        ):
            keep_as_base([parameter])
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SpecError("freezing", "nothing is left to train", way_out="freeze less")


def find_depths(model: Any, key: str) -> dict[int, int]:
    """The depths of all parameters by their ids. `key`: of the spec, that needs them. Raises
    SpecError for a model without blocks that transformers knows."""
    blocks = find_blocks(model)
    if not blocks:
        raise SpecError(
            key,
            f"{type(model).__name__} has no blocks that transformers knows",
            "layers are counted by them",
            "leave it out",
        )
    inside = {
        id(parameter): number
        for number, block in enumerate(blocks, start=1)
        for parameter in block.parameters()
    }
    found: dict[int, int] = {}
    depth = 0
    for name, parameter in model.named_parameters():
        if id(parameter) in inside:
            found[id(parameter)] = inside[id(parameter)]
            depth = len(blocks) + 1
        else:
            found[id(parameter)] = depth if is_in_body(model, name) else len(blocks) + 1
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = model.get_output_embeddings()
    if head is not None and id(head.weight) in tables:
        found[id(head.weight)] = 0
    return found


def with_depths(model: Any, groups: Groups, spec: Spec) -> Groups:
    """The optimiser's groups, parted by `rate_scale`, by which the engine multiplies the rate, and
    by `first_step`, before which the engine trains none of a group."""
    rate = spec.optimizer.block_rate
    every = spec.freezing.thaw_every_steps if spec.freezing is not None else None
    if rate is None and every is None:
        return groups
    key = "optimizer.block_rate" if every is None else "freezing.thaw_every_steps"
    depths = find_depths(model, key)
    top = max(depths.values())
    parted: Groups = []
    for group in groups:
        for depth in range(top, -1, -1):
            parameters = [p for p in group["params"] if depths[id(p)] == depth]
            if parameters:
                above = top - depth
                scale = group.get("rate_scale", 1.0) * (rate or 1.0) ** above
                first = 1 + above * (every or 0)
                parted.append(
                    {**group, "params": parameters, "rate_scale": scale, "first_step": first}
                )
    return parted
