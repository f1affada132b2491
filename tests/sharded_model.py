"""A small spec, a model's states as whole tensors, and the fragments that each of any number of
ranks would own."""

from __future__ import annotations

import math

import torch

from dray.runs import CheckpointInfo, CheckpointWriter, Run, make_fragment_key
from dray.spec import Spec, make_spec

PLAN = {"num_steps": 50, "num_ranks": 2}
SHAPES: dict[str, list[int]] = {
    "embedding.weight": [97, 16],
    "layers.0.weight": [16, 16],
    "layers.0.bias": [16],
    "norm": [1],
    "odd": [7, 3],
    "scale": [],
}
STATES = ("param", "exp_avg", "exp_avg_sq")


def make_test_spec(**sections: object) -> Spec:
    tree: dict[str, object] = {
        "name": "speeches",
        "data": {"train": "texts/*.jsonl"},
        "duration": {"steps": 50},
        "model": {"architecture": "llama", "hidden_size": 64, "num_layers": 2, "num_heads": 4},
    }
    return make_spec(tree | sections)


def make_whole(seed: int = 0) -> dict[tuple[str, str], torch.Tensor]:
    """(name, state) → the flattened tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (name, state): torch.randn(math.prod(shape), generator=generator)
        for name, shape in SHAPES.items()
        for state in STATES
    }


def make_fragments(
    whole: dict[tuple[str, str], torch.Tensor], rank: int, num_ranks: int, flat: bool = True
) -> dict[str, torch.Tensor]:
    """What one rank owns: an equal share of all elements in a row (flat, ZeRO-1/2) or of each
    tensor (ZeRO-3)."""
    tensors, at = {}, 0
    total = sum(math.prod(shape) for shape in SHAPES.values())
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        if flat:
            share = -(-total // num_ranks)
            low, high = rank * share - at, (rank + 1) * share - at
        else:
            share = -(-size // num_ranks)
            low, high = rank * share, (rank + 1) * share
        start, stop = min(size, max(0, low)), min(size, max(0, high))
        at += size
        if start < stop:
            tensors |= {
                make_fragment_key(name, state, start): whole[name, state][start:stop]
                for state in STATES
            }
    return tensors


def save(
    run: Run,
    step: int,
    num_ranks: int = 2,
    attempt: int = 1,
    flat: bool = True,
    seed: int | None = None,
    **metadata: object,
) -> CheckpointInfo:
    """Commit a checkpoint as `num_ranks` ranks would."""
    writer = CheckpointWriter(run, step, attempt)
    whole = make_whole(step if seed is None else seed)
    files = [
        writer.write_rank(rank, num_ranks, make_fragments(whole, rank, num_ranks, flat))
        for rank in range(num_ranks)
    ]
    return writer.commit(files, {"shapes": SHAPES, "step": step, **metadata})
