"""Models of fewer blocks than their configuration had: thin copies for measurements, and the part
of a model that lies before a place in it."""

from __future__ import annotations

from typing import Any

from torch import nn

from dray.errors import SpecError
from dray.models.groups import find_blocks


def make_thin(config: Any, num_blocks: int) -> None:
    """Leave a configuration so many of its blocks; their kinds, where they differ, stay those of
    the first ones."""
    config.num_hidden_layers = num_blocks
    for name in ("decoder_layers", "num_decoder_layers"):  # behind an encoder
        if hasattr(config, name):
            setattr(config, name, num_blocks)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_blocks]


def leave_blocks(model: Any, num_blocks: int, where: str) -> None:
    """Leave a model its first so many blocks, and its configuration as many. Raises SpecError, of
    `where`, for a model that keeps them in more than one list."""
    blocks = find_blocks(model)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    rows = [one for one in lists if len(one) == len(blocks) and all(map(_same, one, blocks))]
    if len(rows) != 1:
        raise SpecError(
            where,
            f"{type(model).__name__} does not hold its blocks in one list",
            "those behind the block are taken away",
            "start from another model",
        )
    del rows[0][num_blocks:]
    make_thin(model.config.get_text_config(), num_blocks)


def _same(one: nn.Module, other: nn.Module) -> bool:
    return one is other
