"""A smaller model of the same architecture: another configuration, and the weights that it has a
place for.

What is built is what the configuration says, never a model with holes: it is exported, loaded and
trained as any other. Weights that do not fit the new configuration are refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dray.models.build import build_model, sizes_by
from dray.models.config import INTERMEDIATE_NAMES, make_kept_config
from dray.models.groups import find_blocks
from dray.release.compress.keeping import make_compressed_spec
from dray.release.compress.method import Candidate, Method


def rebuild(
    candidate: Candidate,
    method: Method,
    changes: Mapping[str, Any],
    weights: Mapping[str, Tensor],
) -> Any:
    """A model of the candidate's configuration with `changes`, filled with `weights` by name.
    Raises SpecError where transformers builds something that they do not fit."""
    trained = candidate.trained
    manifest = trained.manifest
    config = {**make_kept_config(candidate.model), **changes}
    model = build_model(
        make_compressed_spec(trained, trained.run.name.replace("/", "-")),
        **sizes_by(manifest, trained.task.num_labels),
        initial_weights=False,
        config=config,
    )
    with torch.no_grad():
        for name, place in (*model.named_parameters(), *_persistent(model)):
            if name not in weights or weights[name].shape != place.shape:
                found = list(weights[name].shape) if name in weights else "nothing"
                raise method.refused(
                    candidate,
                    f"its configuration wants {name} as {list(place.shape)}, and there is {found}",
                    "the smaller model is one that its configuration describes",
                )
            place.copy_(weights[name])
    return model.eval()


def state_of(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {
        name: tensor.detach() for name, tensor in (*model.named_parameters(), *_persistent(model))
    }


def _persistent(model: Any) -> list[tuple[str, Tensor]]:
    return [
        (name, buffer)
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[2]
        not in model.get_submodule(name.rpartition(".")[0])._non_persistent_buffers_set
    ]


def find_stack(candidate: Candidate, method: Method) -> list[tuple[str, nn.Module]]:
    """The blocks of a model with one stack of them, with their names, which end in their numbers.
    Raises SpecError."""
    model = candidate.model
    names = {id(module): name for name, module in model.named_modules()}
    blocks = [(names[id(block)], block) for block in find_blocks(model)]
    stems = {name.rpartition(".")[0] for name, _ in blocks}
    numbers = [name.rpartition(".")[2] for name, _ in blocks]
    if len(stems) != 1 or numbers != [str(number) for number in range(len(blocks))]:
        raise method.refused(
            candidate,
            "has not one stack of blocks" if blocks else "has no blocks that transformers knows",
            "blocks of one stack are taken out or made narrower together",
            "choose an encoder or a decoder by itself",
        )
    if getattr(model.config, "num_hidden_layers", None) != len(blocks):
        raise method.refused(
            candidate,
            f"has {len(blocks)} blocks, and its configuration does not say so",
            "the configuration decides what is built",
        )
    return blocks


def feed_forwards(
    candidate: Candidate, method: Method
) -> list[tuple[str, list[str], str, nn.Module]]:
    """Of each block: its name, the names of the matrices into its feed-forward and out of it, and
    the latter itself. Found by their sizes. Raises SpecError where they are not plain."""
    wide = intermediate_of(candidate, method)[1]
    found: list[tuple[str, list[str], str, nn.Module]] = []
    for name, block in find_stack(candidate, method):
        linears = {
            inner: module
            for inner, module in block.named_modules()
            if isinstance(module, nn.Linear)
        }
        into = [inner for inner, module in linears.items() if module.out_features == wide]
        out = [inner for inner, module in linears.items() if module.in_features == wide]
        if not into or len(out) != 1 or out[0] in into:
            raise method.refused(
                candidate,
                f"the feed-forward of {name} is not told by its width of {wide}: "
                f"{', '.join([*into, *out]) or 'no matrix'}",
                "one matrix leads out of it, and those that lead into it are matrices of their own",
            )
        found.append((name, into, out[0], linears[out[0]]))
    return found


def intermediate_of(candidate: Candidate, method: Method) -> tuple[str, int]:
    """The configuration's name of the feed-forward's width, and the width. Raises SpecError."""
    config = candidate.model.config
    for name in INTERMEDIATE_NAMES:
        width = getattr(config, name, None)
        if isinstance(width, int):
            return name, width
    raise method.refused(
        candidate,
        "its configuration has no width of a feed-forward",
        f"it is one of {', '.join(INTERMEDIATE_NAMES)}",
    )


def keep_places(weights: dict[str, Tensor], name: str, dim: int, places: Tensor) -> None:
    """Leave a weight, and a bias beside it where its outputs are cut, only these places."""
    weights[f"{name}.weight"] = weights[f"{name}.weight"].index_select(dim, places)
    if dim == 0 and f"{name}.bias" in weights:
        weights[f"{name}.bias"] = weights[f"{name}.bias"].index_select(0, places)


def best(scores: Tensor, keep: int) -> Tensor:
    """The places of the greatest scores, in their order."""
    return scores.topk(keep).indices.sort().values


def subset(values: Any, kept: Sequence[int], num: int) -> Any:
    """A configuration's list of one value a block, of the kept blocks; others as they are."""
    if isinstance(values, (list, tuple)) and len(values) == num:
        return [copy.copy(values[place]) for place in kept]
    return values
