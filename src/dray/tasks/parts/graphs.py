"""Trained models as functions of tensors, for runtimes that know neither transformers nor tasks.

What goes in and out is asked of the task and of the model, not looked up: what a model is given of
tokens, or of rows that are none, and which of its axes grow with rows and with their length.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dray.tasks.rows import SEGMENT

if TYPE_CHECKING:
    from dray.tasks.task import Batch, Task

ROWS, TOKENS, ANSWER = "rows", "tokens", "answer_tokens"
"""Names of axes that have any length."""

Axes = tuple[str | int, ...]


@dataclass(frozen=True)
class Graph:
    """A model as a function of tensors."""

    module: nn.Module
    """Its forward pass takes the inputs in their order and gives one tensor."""
    inputs: Mapping[str, Axes]
    """By name, in order: each axis by its name, or by the only length that it has."""
    output: str
    """What it gives, in a word."""
    draw: Callable[[int, int, torch.Generator], Batch]
    """Inputs by name of so many rows of so many tokens, some of them padding, at random."""


class Called(nn.Module):
    """A function of named tensors as a module of ordered ones, beside the module that it computes
    with."""

    def __init__(
        self, module: nn.Module, names: tuple[str, ...], function: Callable[..., Tensor]
    ) -> None:
        super().__init__()
        self.module, self.names, self.function = module, names, function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(**dict(zip(self.names, inputs, strict=True)))


def make_graph(
    module: nn.Module,
    function: Callable[..., Tensor],
    output: str,
    draw: Callable[[int, int, torch.Generator], Batch],
) -> Graph:
    """The graph of a function of what `draw` draws. Axes are found by drawing other sizes: what
    grows with the rows, what with their length."""
    generator = torch.Generator().manual_seed(0)
    sizes = [draw(rows, tokens, generator) for rows, tokens in ((2, 7), (3, 7), (2, 9))]
    inputs = {name: _axes(*(size[name].shape for size in sizes)) for name in sizes[0]}
    if ANSWER_IDS in inputs:  # as long as it likes, whatever the length of what is answered
        inputs[ANSWER_IDS] = (ROWS, ANSWER)
    return Graph(Called(module, tuple(inputs), function).eval(), inputs, output, draw)


def _axes(usual: torch.Size, more_rows: torch.Size, longer: torch.Size) -> Axes:
    return tuple(
        ROWS if size != others else TOKENS if size != long else size
        for size, others, long in zip(usual, more_rows, longer, strict=True)
    )


ANSWER_IDS = "decoder_input_ids"


def logits_graph(task: Task, model: Any, *, masked: bool = False) -> Graph:
    """A model's own logits. `masked`: rows that are no tokens come with a mask of their padding."""
    takes = inspect.signature(model.forward).parameters
    segments = takes_segments(model) and any(column.name == SEGMENT for column in task.columns)
    vocab_size = int(getattr(model.config.get_text_config(), "vocab_size", 0) or 0)
    filler = int(task.pad_token_id or 0)

    def draw(rows: int, tokens: int, generator: torch.Generator) -> Batch:
        if not task.tokenizes:
            return _draw_numbers(task.model_inputs(rows, tokens), generator, masked=masked)
        mask = padding_mask(rows, tokens)
        ids = draw_ids((rows, tokens), vocab_size, filler, generator)
        batch = {"input_ids": ids.where(mask == 1, filler)}
        if "attention_mask" in takes:
            batch["attention_mask"] = mask
        if segments:
            second = torch.arange(tokens) >= (tokens + 1) // 2
            batch["token_type_ids"] = second.long().expand(rows, -1).contiguous() * mask
        if task.head.behind_encoder:
            shape = (rows, max(2, tokens - 2))
            batch[ANSWER_IDS] = draw_ids(shape, vocab_size, filler, generator)
        return batch

    def logits(**inputs: Tensor) -> Tensor:
        found: Tensor = model(**inputs, **({"use_cache": False} if "use_cache" in takes else {}))[
            "logits"
        ]
        return found

    return make_graph(model, logits, "logits", draw)


def takes_segments(model: Any) -> bool:
    """Whether a model tells the two texts of a row apart by their segments."""
    takes = "token_type_ids" in inspect.signature(model.forward).parameters
    return takes and getattr(model.config, "type_vocab_size", 1) > 1


def draw_ids(
    shape: tuple[int, ...], vocab_size: int, filler: int, generator: torch.Generator
) -> Tensor:
    """Tokens at random, none of them padding."""
    ids = torch.randint(0, max(2, vocab_size - 1), shape, generator=generator)
    return ids + (ids >= filler).long() if vocab_size > 2 else ids


def padding_mask(rows: int, tokens: int) -> Tensor:
    """[rows, tokens], int64: 1 but at the end of the last of several rows."""
    mask = torch.ones(rows, tokens, dtype=torch.int64)
    if rows > 1:
        mask[-1, max(1, tokens - tokens // 3) :] = 0
    return mask


def _draw_numbers(zeros: Batch, generator: torch.Generator, *, masked: bool) -> Batch:
    values = {
        name: torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in zeros.items()
    }
    if not masked:
        return values
    first = next(iter(values.values()))
    mask = padding_mask(*first.shape[:2])
    padded = first * mask.reshape(*mask.shape, *([1] * (first.dim() - 2)))
    return {**values, next(iter(values)): padded, "attention_mask": mask}
