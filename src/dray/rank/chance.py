"""What is drawn for a row in a forward pass belongs to the row: dropout's masks, blocks that are
passed by, where a perturbation begins.

A draw is a hash of the seed, the step, the row's id, the place in the model and the element's
coordinates, and of nothing else. So it is the same on any number of ranks, in micro batches of any
size, beside rows of any length, after any restart, and when a block is computed a second time for
its gradients. Fused attention on GPUs and compiled models draw for themselves: theirs go by ranks.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dray.order import Ints

_ODD = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D)
"""What coordinates are multiplied by, from the last but one on (the primes of xxHash)."""


def _signed(value: int) -> int:
    """32 bits as torch's int32 has them."""
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)


def _mixed(bits: Tensor, second: Tensor | int) -> Tensor:
    """32 bits well mixed, in place: `lowbias32` of Wellons (2018), with a second key between its
    rounds. int32, whose products wrap around."""
    bits ^= (bits >> 16) & 0xFFFF
    bits *= 0x21F0AAAD
    bits ^= second
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= 0x735A2D97
    bits ^= (bits >> 15) & 0x1FFFF
    return bits


def shares(bits: Tensor) -> Tensor:
    """Random bits as numbers of [0, 1), of 24 bits each: fp32."""
    return ((bits >> 8) & 0xFFFFFF).float() * (1 / 2**24)


class Chance:
    """Draws of the rows of one micro batch after the other.

    `watch` a module first: its parts are the places. Within `rows(…)` `torch.nn.functional.dropout`
    and attention with dropout draw by row.
    """

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._place, self._count, self._pass = 0, 0, 0

    def watch(self, module: nn.Module) -> None:
        """Number the parts of a module, each of which begins a place as it is called."""
        for number, part in enumerate(module.modules()):
            part.register_forward_pre_hook(_Enter(self, number + 1))

    @contextmanager
    def rows(self, seed: int, step: int, row_ids: Ints, device: torch.device) -> Iterator[None]:
        """Draw for these rows until the block ends, backward pass included."""
        keys = [_row_key(seed, step, int(row)) for row in row_ids]
        self._keys = torch.tensor(keys, dtype=torch.int32).to(device)
        self._place, self._count, self._pass = 0, 0, 0
        own = F.dropout, F.scaled_dot_product_attention
        F.dropout, F.scaled_dot_product_attention = self._dropout, _attention(self, own[1])
        try:
            yield
        finally:
            F.dropout, F.scaled_dot_product_attention = own
            self._keys = None

    @contextmanager
    def another_pass(self, number: int) -> Iterator[None]:
        """Draw otherwise within the block, as often as the same rows pass through the model: the
        first pass is 0."""
        before, self._pass = self._pass, number
        try:
            yield
        finally:
            self._pass = before

    @contextmanager
    def only(self, place: int) -> Iterator[None]:
        """Draw for one of the rows alone within the block, which passes through the model by
        itself."""
        before = self._keys
        self._keys = None if before is None else before[place : place + 1]
        try:
            yield
        finally:
            self._keys = before

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What a block is computed in now, and once more for its gradients: of the same pass."""
        return nullcontext(), self.another_pass(self._pass)

    @property
    def is_open(self) -> bool:
        """Whether there are rows to draw for."""
        return self._keys is not None

    def enter(self, place: int) -> None:
        """A part of the model is called."""
        self._place, self._count = place, 0

    def draw(self, shape: Sequence[int], name: int | None = None) -> Tensor:
        """Random bits, int32, for a tensor whose first dimension counts rows, or the same number of
        something for each row. `name`: of what is drawn, in the place of the part that runs.

        Where the first dimension is another, nothing tells which elements belong to which row: they
        go by the first row then, and by how rows are cut into micro batches.
        """
        assert self._keys is not None, "drawn outside of a micro batch"
        if name is None:
            self._count += 1
            what = (self._place << 12) + (self._count << 4) + self._pass
        else:
            what = -(name << 4) - self._pass - 1
        first = _mixed(self._keys[:, 0] + _signed(what * _ODD[0]), _signed(what * _ODD[1]))
        second = _mixed(self._keys[:, 1] + _signed(what * _ODD[2]), _signed(what * _ODD[3]))
        num_rows = len(first)
        if shape[0] % num_rows:
            first, second, num_rows = first[:1], second[:1], 1
        inner = (shape[0] // num_rows, *shape[1:])
        place = torch.zeros((), dtype=torch.int32, device=first.device)
        for number, size in enumerate(reversed(inner)):
            axis = torch.arange(size, dtype=torch.int32, device=first.device)
            stride = 1 if number == 0 else _signed(_ODD[number - 1])
            place = (axis * stride).reshape(-1, *[1] * number) + place
        ones = [1] * len(inner)
        bits = place + first.reshape(-1, *ones)
        return _mixed(bits, second.reshape(-1, *ones)).reshape(tuple(shape))

    def _dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        """torch.nn.functional.dropout, by row."""
        if not training or p == 0.0 or self._keys is None:
            return input
        if p == 1.0:
            return input * 0.0
        kept = self.kept(input.shape, p).to(input.dtype).mul_(1 / (1 - p))
        return input.mul_(kept) if inplace else input * kept

    def kept(self, shape: Sequence[int], p: float, name: int | None = None) -> Tensor:
        """What stays where each is left out with probability p, to within 2^-32: bool."""
        return self.draw(shape, name) >= _signed(0x80000000 + round(p * 2**32))

    def uniform(self, shape: Sequence[int], name: int) -> Tensor:
        """Numbers of [0, 1): fp32."""
        return shares(self.draw(shape, name))

    def normal(self, shape: Sequence[int], name: int) -> Tensor:
        """Standard normal numbers, fp32 (Box and Muller 1958). It takes the next name, too."""
        return gaussian(self.draw(shape, name), self.draw(shape, name + 1))


def draw_normal(
    onto: Tensor, keys: Sequence[int], *, first: int, scale: float, at_once: int = 1 << 22
) -> None:
    """Add normal numbers of a standard deviation onto a 1-D tensor, in place. What is added to an
    element follows from four keys (32 bits) and its place, counted from `first`."""
    for begin in range(0, len(onto), at_once):
        some = onto[begin : begin + at_once]
        places = torch.arange(first + begin, first + begin + len(some), device=onto.device)
        low = (places & 0xFFFFFFFF).to(torch.int32)
        bits = [_mixed(low + key, other) for key, other in (keys[:2], keys[2:])]
        some.add_(gaussian(*bits), alpha=scale)


def gaussian(bits: Tensor, others: Tensor) -> Tensor:
    """Standard normal numbers of two independent sets of bits, fp32."""
    radius = (-2 * torch.log1p(-shares(bits))).sqrt()
    return radius * torch.cos(2 * torch.pi * shares(others))


class _Enter:
    """A hook before a part of the model is called."""

    def __init__(self, chance: Chance, place: int) -> None:
        self._chance, self._place = chance, place

    def __call__(self, module: nn.Module, given: Any) -> None:
        self._chance.enter(self._place)


def _row_key(seed: int, step: int, row: int) -> tuple[int, int]:
    place = struct.pack("<2Qq", seed, step, row)
    first, second = struct.unpack("<2i", hashlib.blake2b(place, digest_size=8).digest())
    return first, second


def _attention(chance: Chance, own: Any) -> Any:
    """Scaled dot product attention that drops by row on CPUs, where torch's own has its squares of
    scores, too."""

    def attention(  # noqa: PLR0917 - torch's own order
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if not dropout_p or query.device.type != "cpu":
            return own(
                query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal,
                scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip
        if enable_gqa:
            times = query.shape[-3] // key.shape[-3]
            key, value = (one.repeat_interleave(times, -3) for one in (key, value))
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = query @ key.transpose(-2, -1) * factor
        if is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
            scores = scores.masked_fill(~mask, float("-inf"))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # Who may look at nothing gets nothing, as of torch's own.
            alone = ~attn_mask.any(dim=-1, keepdim=True)
            scores = scores.masked_fill(~(attn_mask | alone), float("-inf"))
            found = torch.softmax(scores, dim=-1).masked_fill(alone, 0.0)
        else:
            found = torch.softmax(scores if attn_mask is None else scores + attn_mask, dim=-1)
        return chance._dropout(found, dropout_p) @ value

    return attention
