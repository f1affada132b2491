"""Forward passes of a causal model for many requests at once, each at a place of its own.

`Slots` keeps keys and values of every request in a slot of tensors that are made once: their
memory is bounded and known before the first request. Requests that write lie in the first slots,
so that a step reads them without a copy. `check` proves on the model itself that it gives the same
logits as its own forward pass; a model that keeps something else than keys and values (a window, a
state, places of its own) does not, and `Alone` serves it one request at a time by its own cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

CHUNK_TOKENS = 256
"""Of a prompt that are computed in one pass: whoever writes waits for no more of it."""
WIDTH = 64
"""Passes see slots up to a multiple of this."""
TOLERANCE = 2e-3
"""By which logits may differ from the model's own forward pass, relative to their spread."""


@dataclass(frozen=True)
class Piece:
    """Tokens of a prompt that are to be computed: the slot, where they begin in it, and which."""

    slot: int
    start: int
    ids: Sequence[int]


class Steps(Protocol):
    """What an engine asks of a model. Logits are fp32, on the CPU."""

    num_slots: int
    row_tokens: int
    """Of a prompt and its answer together."""

    def prefill(self, pieces: Sequence[Piece]) -> Tensor:
        """Compute pieces of like lengths; logits behind the last token of each,
        [pieces, vocabulary]."""

    def decode(self, tokens: Sequence[int], places: Sequence[int]) -> Tensor:
        """One token for each of the first slots, at its place; logits [slots, vocabulary]."""

    def swap(self, one: int, other: int, num_tokens: int) -> None:
        """Exchange the first tokens of two slots."""


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer's keys and values, [slots, heads, tokens, size]."""

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self._slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self._slots.num_slots, key_states.shape[1], self._slots.room)
        self.keys = key_states.new_zeros((*shape, key_states.shape[-1]))
        self.values = value_states.new_zeros((*shape, value_states.shape[-1]))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots = self._slots
        rows, places = slots.rows[:, None], slots.places
        self.keys[rows, :, places] = key_states.transpose(1, 2)
        self.values[rows, :, places] = value_states.transpose(1, 2)
        if slots.decodes:
            seen = slice(len(slots.rows))
            return self.keys[seen, :, : slots.width], self.values[seen, :, : slots.width]
        return self.keys[slots.rows, :, : slots.width], self.values[slots.rows, :, : slots.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._slots.width, 0

    def get_seq_length(self) -> int:
        return int(self._slots.places[0, 0]) if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self._slots.room


class Slots:
    """A model with so many slots of so many tokens."""

    def __init__(self, model: Any, num_slots: int, row_tokens: int) -> None:
        self.model, self.num_slots, self.row_tokens = model, num_slots, row_tokens
        # A piece is padded, and what it is padded with lies behind its row.
        self.room = -(-(row_tokens + CHUNK_TOKENS) // WIDTH) * WIDTH
        self._device = next(model.parameters()).device
        self._cache = Cache(layers=[_SlotLayer(self) for _ in range(num_layers(model))])
        self.rows = torch.zeros(1, dtype=torch.int64)
        self.places = torch.zeros(1, 1, dtype=torch.int64)
        self.width, self.decodes = 0, False

    def prefill(self, pieces: Sequence[Piece]) -> Tensor:
        longest = max(len(piece.ids) for piece in pieces)
        ids = torch.zeros(len(pieces), longest, dtype=torch.int64)
        for row, piece in enumerate(pieces):
            ids[row, : len(piece.ids)] = torch.tensor(piece.ids)
        starts = torch.tensor([[piece.start] for piece in pieces])
        last = torch.tensor([len(piece.ids) - 1 for piece in pieces])
        self.rows = torch.tensor([piece.slot for piece in pieces], device=self._device)
        return self._forward(ids, starts + torch.arange(longest), last, decodes=False)

    def decode(self, tokens: Sequence[int], places: Sequence[int]) -> Tensor:
        self.rows = torch.arange(len(tokens), device=self._device)
        ids, at = torch.tensor(tokens)[:, None], torch.tensor(places)[:, None]
        return self._forward(ids, at, torch.zeros(len(tokens), dtype=torch.int64), decodes=True)

    @torch.inference_mode()
    def swap(self, one: int, other: int, num_tokens: int) -> None:
        if one == other:
            return
        for layer in self._cache.layers:
            if layer.is_initialized:
                for kept in (layer.keys, layer.values):
                    both = kept[[other, one], :, :num_tokens]
                    kept[[one, other], :, :num_tokens] = both

    @torch.inference_mode()
    def _forward(self, ids: Tensor, places: Tensor, last: Tensor, *, decodes: bool) -> Tensor:
        self.places, self.decodes = places.to(self._device), decodes
        self.width = min(self.room, -(-(int(places.max()) + 1) // WIDTH) * WIDTH)
        seen = torch.arange(self.width, device=self._device) <= self.places[:, :, None]
        kept, which = torch.unique(last, return_inverse=True)
        output = self.model(
            input_ids=ids.to(self._device),
            attention_mask=seen[:, None],
            position_ids=self.places,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=kept.to(self._device),
        )
        found: Tensor = output.logits[torch.arange(len(ids)), which.to(self._device)]
        return found.float().cpu()


class Alone:
    """A model by its own forward pass and cache, one request at a time."""

    num_slots = 1

    def __init__(self, model: Any, row_tokens: int) -> None:
        self.model, self.row_tokens = model, row_tokens
        self._device = next(model.parameters()).device
        self._cache: Any = None

    def prefill(self, pieces: Sequence[Piece]) -> Tensor:
        (piece,) = pieces
        if piece.start == 0:
            self._cache = None
        return self._forward(piece.ids)

    def decode(self, tokens: Sequence[int], places: Sequence[int]) -> Tensor:
        return self._forward(tokens)

    def swap(self, one: int, other: int, num_tokens: int) -> None:
        pass

    @torch.inference_mode()
    def _forward(self, ids: Sequence[int]) -> Tensor:
        output = self.model(
            input_ids=torch.tensor([list(ids)], device=self._device),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = output.past_key_values
        found: Tensor = output.logits[:, -1].float().cpu()
        return found


def num_layers(model: Any) -> int:
    """Layers that keep keys and values."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def bytes_per_token(model: Any) -> int:
    """What a slot takes for each token of its room, by the configuration: keys and values of all
    layers."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = next(model.parameters()).element_size()
    return int(2 * num_layers(model) * heads * size * width)


def check(model: Any, vocab_size: int) -> bool:
    """Whether `Slots` gives what the model's own forward pass does: of prompts of two lengths, in
    pieces, and of a step behind both."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return False
    own = DynamicCache(config=model.config)
    if any(type(layer) is not DynamicLayer for layer in own.layers):
        return False  # a window, or a state
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, vocab_size, (size,), generator=generator).tolist() for size in (9, 17)]
    slots = Slots(model, 2, 32)
    try:
        slots.prefill([Piece(1, 0, rows[1][:5])])
        found = [slots.prefill([Piece(0, 0, rows[0][:-1]), Piece(1, 5, rows[1][5:-1])])]
        found.append(slots.decode([row[-1] for row in rows], [len(row) - 1 for row in rows]))
        expected = [_plain(model, [row[:end] for row in rows]) for end in (-1, None)]
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError):
        return False  # as models refuse a mask or a cache that is not theirs
    return all(_agree(one, other) for one, other in zip(found, expected, strict=True))


@torch.inference_mode()
def _plain(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    device = next(model.parameters()).device
    logits = [model(input_ids=torch.tensor([row], device=device)).logits[0, -1] for row in rows]
    return torch.stack(logits).float().cpu()


def _agree(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE * expected.std().clamp(min=1e-3))
