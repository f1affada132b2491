"""Which row is read at which step by which rank: pure arithmetic on the corpus' counts and a seed.

Training reads an endless sequence of *positions*, cut into batches of global_rows each; step s
reads the s-th batch of those that are not left out. Every function here maps positions to row ids
in O(1) each, at any position: seeking costs nothing and no state is saved. The number of ranks
enters only when the rows of a step are dealt out. Nothing here reads a file.

Rows lie on disk in groups of `group_rows`, shuffled once. An epoch permutes the groups and, in
each, the rows: reads stay sequential within a group while every epoch and seed has an order of its
own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

PADDING = -1
"""Row id of a slot that holds no row: it fills up a rank's share and has no targets."""

_MIX_RESOLUTION = 4096  # positions in one cycle of weighted sources: shares are exact to 1/4096
_FEISTEL_ROUNDS = 6


@dataclass(frozen=True)
class SourceCount:
    """One source as the order sees it: how many rows it has, and its weight against the others."""

    num_rows: int
    weight: float | None = None


class Order:
    """The order of a corpus under one seed.

    Without weights the sources are one pool, and each epoch reads every row once. With weights each
    position is dealt to a source in proportion, evenly spread, and each source goes through epochs
    of its own.
    """

    def __init__(self, sources: Sequence[SourceCount], group_rows: int, seed: int) -> None:
        if not sources or any(source.num_rows < 1 for source in sources):
            raise ValueError(
                "every source needs at least one row; they have "
                f"{[source.num_rows for source in sources]}"
            )
        self.num_rows = sum(source.num_rows for source in sources)
        counts = [source.num_rows for source in sources]
        self._offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        weights = [source.weight for source in sources if source.weight is not None]
        self._mix = _Mix(weights) if len(weights) == len(sources) and len(sources) > 1 else None
        pools = [[count] for count in counts] if self._mix else [counts]
        self._pools = [_Pool(pool, group_rows, seed, stream) for stream, pool in enumerate(pools)]
        ends = np.cumsum([sum(pool) for pool in pools]).tolist()
        self.pools = tuple(range(start, stop) for start, stop in pairwise([0, *ends]))
        """Row ids that go through epochs together: of each weighted source, or of all sources."""

    def rows(self, start: int, stop: int) -> Ints:
        """Row ids of the positions [start, stop): shape (stop - start,), each in [0, num_rows)."""
        return self.rows_at(np.arange(start, stop, dtype=np.int64))

    def rows_at(self, positions: Ints) -> Ints:
        """Row ids of any positions, in their order: shape (len(positions),), each in [0,
        num_rows)."""
        if self._mix is None:
            return self._pools[0].rows(positions)
        ids = np.empty_like(positions)
        of_source, nth = self._mix.deal(positions)
        for source, pool in enumerate(self._pools):
            chosen = of_source == source
            ids[chosen] = self._offsets[source] + pool.rows(nth[chosen])
        return ids

    def epochs_at(self, positions: Ints) -> tuple[Ints, Ints]:
        """For each position the pool that it is dealt to (an index of `pools`), and which of its
        epochs it lies in."""
        if self._mix is None:
            return np.zeros_like(positions), positions // self.num_rows
        pool, nth = self._mix.deal(positions)
        return pool, nth // np.asarray([len(rows) for rows in self.pools])[pool]


class _Pool:
    """Sources that share their epochs: each epoch permutes the groups of all of them, and the rows
    inside a group.

    A group never spans two sources, so the last group of each may be short.
    """

    def __init__(self, counts: Sequence[int], group_rows: int, seed: int, stream: int) -> None:
        self._group_rows, self._seed, self._stream = group_rows, seed, stream
        self._num_rows = sum(counts)
        sizes = np.asarray(counts, dtype=np.int64)
        num_groups = -(-sizes // group_rows)
        self._first_rows = np.cumsum(sizes) - sizes
        self._group_ends = np.cumsum(num_groups)
        self._first_groups = self._group_ends - num_groups
        self._lacking = num_groups * group_rows - sizes

    def rows(self, nth: Ints) -> Ints:
        """Row ids at the pool's own positions `nth`, which run through its epochs one after
        another."""
        epochs, within = np.divmod(nth, self._num_rows)
        distinct, nth_epoch = np.unique(epochs, return_inverse=True)
        keys = _key(self._seed, self._stream, distinct)
        slot, inner = np.divmod(within + self._shifts(keys, nth_epoch, within), self._group_rows)
        of_epoch = keys[nth_epoch]
        group = _permute(slot, np.full_like(slot, self._group_ends[-1]), of_epoch)
        source = np.searchsorted(self._group_ends, group, side="right")
        size = self._group_rows - np.where(
            group == self._group_ends[source] - 1, self._lacking[source], 0
        )
        row = _permute(inner, size, _remix(of_epoch, group))
        ids: Ints = (
            self._first_rows[source] + (group - self._first_groups[source]) * self._group_rows + row
        )
        return ids

    def _shifts(self, keys: Words, nth_epoch: Ints, within: Ints) -> Ints:
        """How many places lie empty before each position: those that the short groups before it
        lack.

        keys: one an epoch; nth_epoch: which of them a position lies in; within: its place there.
        Needs room for [positions] and [epochs, sources], never for their product.
        """
        ends, lacking = self._short_groups(keys)
        num_epochs, num_sources = ends.shape
        # The ends of an epoch ascend and lie in 1..num_rows: one after the other, the epochs' ends
        # ascend too.
        stride = self._num_rows + 1
        line = (ends + np.arange(num_epochs, dtype=np.int64)[:, None] * stride).reshape(-1)
        before = (
            np.searchsorted(line, within + nth_epoch * stride, side="right")
            - nth_epoch * num_sources
        )
        shifts = np.concatenate(
            [np.zeros((num_epochs, 1), np.int64), np.cumsum(lacking, axis=1)], axis=1
        )
        found: Ints = shifts[nth_epoch, before]
        return found

    def _short_groups(self, keys: Words) -> tuple[Ints, Ints]:
        """For each epoch where its short groups end, by place, and how many rows each lacks: two
        [epochs, sources]."""
        shape = len(keys), len(self._lacking)
        lasts = np.broadcast_to(self._group_ends - 1, shape).reshape(-1)
        places = _unpermute(
            lasts, np.full_like(lasts, self._group_ends[-1]), np.repeat(keys, shape[1])
        ).reshape(shape)
        by_place = np.argsort(places, axis=1)
        lacking = self._lacking[by_place]
        ends = (np.take_along_axis(places, by_place, axis=1) + 1) * self._group_rows - np.cumsum(
            lacking, axis=1
        )
        return ends, lacking


class _Mix:
    """Deals positions to weighted sources: the k-th of c places of a source lies at (k +
    ½)·cycle/c."""

    def __init__(self, weights: Sequence[float]) -> None:
        shares = np.asarray(weights, dtype=np.float64) / sum(weights) * _MIX_RESOLUTION
        counts = np.maximum(1, np.floor(shares)).astype(np.int64)
        for index in np.argsort(counts - shares, kind="stable")[
            : max(0, _MIX_RESOLUTION - counts.sum())
        ]:
            counts[index] += 1
        self._cycle = int(counts.sum())
        self._counts = counts
        sources = np.repeat(np.arange(len(counts)), counts)
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
        self._pattern = sources[np.lexsort((sources, places))]
        by_source = np.argsort(self._pattern, kind="stable")
        self._before = np.empty(self._cycle, np.int64)
        self._before[by_source] = np.arange(self._cycle) - np.repeat(
            np.cumsum(counts) - counts, counts
        )

    def deal(self, positions: Ints) -> tuple[Ints, Ints]:
        """For each position its source, and how many positions that source had before it."""
        cycles, within = np.divmod(positions, self._cycle)
        source = self._pattern[within]
        return source, cycles * self._counts[source] + self._before[within]


@dataclass(frozen=True)
class LeftOut:
    """Batches of the endless sequence that no step reads; the others are dealt to the steps in
    order.

    `batches`: their indices, ascending; batch b is the positions [b·global_rows, (b +
    1)·global_rows). Leaving out what lies past the batch of step s changes nothing up to step s.
    Raises ValueError for indices that are negative or do not ascend.
    """

    batches: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(batch < 0 for batch in self.batches[:1]) or any(
            a >= b for a, b in pairwise(self.batches)
        ):
            raise ValueError(
                f"batches that are left out are counted from 0 and ascend: {list(self.batches)[:8]}"
            )

    @cached_property
    def _read_before(self) -> Ints:
        """How many batches are read before each one that is left out: never descending."""
        return np.asarray(self.batches, dtype=np.int64) - np.arange(len(self.batches))

    def batches_at(self, steps: Ints) -> Ints:
        """The batch that each step reads: of those not left out the s-th for step s, counted from
        1. O(log n) each."""
        return steps - 1 + np.searchsorted(self._read_before, steps - 1, side="right")

    def with_steps(self, first: int, last: int) -> LeftOut:
        """What else is left out once the batches of the steps [first, last] are: step `first` then
        reads what step last + 1 read, and so on; the steps before are as they were."""
        found: list[int] = self.batches_at(np.arange(first, last + 1, dtype=np.int64)).tolist()
        return LeftOut(tuple(sorted({*self.batches, *found})))


def batch_positions(batches: Ints, global_rows: int) -> Ints:
    """Positions of some batches, one batch after the other: shape (len(batches) · global_rows,)."""
    return (batches[:, None] * global_rows + np.arange(global_rows, dtype=np.int64)).reshape(-1)


def deal_to_ranks(rows: Ints, num_ranks: int, rows_per_rank: int) -> Ints:
    """The rows of one step, shape (global_rows,), as (num_ranks, rows_per_rank), filled up with
    PADDING."""
    slots = np.full(num_ranks * rows_per_rank, PADDING, dtype=np.int64)
    slots[: len(rows)] = rows
    return slots.reshape(num_ranks, rows_per_rank)


def row_digest(rows: Ints) -> int:
    """Order-independent digest of row ids: the sum of their hashes modulo 2^64; padding counts
    nothing.

    Digests of parts add up (modulo 2^64) to the digest of the whole.
    """
    return int(row_digests(rows))


def row_digests(rows: Ints) -> Words:
    """`row_digest` along the last axis: shape rows.shape[:-1]."""
    hashes = np.where(rows >= 0, _hash(rows.astype(np.uint64) + np.uint64(1)), np.uint64(0))
    digests: Words = np.add.reduce(hashes, axis=-1, dtype=np.uint64)
    return digests


def format_digest(digest: int) -> str:
    """A digest as records carry it: 16 hexadecimal digits."""
    return f"{digest % 2**64:016x}"


NO_STEPS = "0" * 32
"""The chained digest of no steps at all."""


def chain_digest(before: str, digest: int) -> str:
    """Digest of a history that is one step longer: 32 hexadecimal digits.

    `before`: that of the steps so far (`NO_STEPS` at the start); `digest`: the row digest of the
    next one. Histories have the same one only if each step of theirs read the same rows.
    """
    return hashlib.blake2b(
        bytes.fromhex(before + format_digest(digest)), digest_size=16
    ).hexdigest()


@dataclass(frozen=True)
class Segment:
    """What one block carries for every rank: the rows of some consecutive steps, or a part of a
    validation pass.

    Training: steps [first, last], counted from 1. Validation after step `first`: rows [start_row,
    stop_row).
    """

    kind: str
    first: int
    last: int
    start_row: int = 0
    stop_row: int = 0


def make_segments(
    *,
    start_step: int,
    num_steps: int,
    steps_per_block: int,
    validate_every: int | None,
    num_validation_rows: int,
    validation_rows_per_block: int,
) -> Iterator[Segment]:
    """The blocks of a run from `start_step` (done) to `num_steps`, one by one, in the order in
    which they are consumed.

    Validated are the last step and every `validate_every`-th, if there are validation rows.
    """
    step = start_step
    while step < num_steps:
        stop = num_steps
        if validate_every and num_validation_rows:
            stop = min(stop, (step // validate_every + 1) * validate_every)
        last = min(step + steps_per_block, stop)
        yield Segment("train", step + 1, last)
        step = last
        if step == stop:
            for start in range(0, num_validation_rows, validation_rows_per_block):
                yield Segment(
                    "validation",
                    step,
                    step,
                    start,
                    min(start + validation_rows_per_block, num_validation_rows),
                )


def _hash(words: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), elementwise."""
    with np.errstate(over="ignore"):
        words = words + np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _key(seed: int, stream: int, epochs: Ints) -> Words:
    start = _hash(np.asarray([seed], dtype=np.uint64))
    return _remix(_remix(start, np.asarray([stream], dtype=np.int64)), epochs)


def _remix(keys: Words, values: Ints) -> Words:
    return _hash(keys ^ _hash(values.astype(np.uint64)))


def _permute(values: Ints, sizes: Ints, keys: Words) -> Ints:
    """A keyed permutation of [0, size) elementwise: a Feistel network on the next even power of
    two, cycle-walked."""
    return _walk(values, sizes, keys, range(_FEISTEL_ROUNDS), inverse=False)


def _unpermute(values: Ints, sizes: Ints, keys: Words) -> Ints:
    return _walk(values, sizes, keys, range(_FEISTEL_ROUNDS - 1, -1, -1), inverse=True)


def _walk(values: Ints, sizes: Ints, keys: Words, rounds: range, *, inverse: bool) -> Ints:
    if not len(values):
        return values
    half = np.maximum(1, (np.ceil(np.log2(np.maximum(2, sizes))).astype(np.int64) + 1) // 2).astype(
        np.uint64
    )
    words, bounds = values.astype(np.uint64), sizes.astype(np.uint64)
    pending = np.arange(len(words))
    while len(pending):
        words[pending] = _feistel(
            words[pending], half[pending], keys[pending], rounds, inverse=inverse
        )
        pending = pending[np.flatnonzero(words[pending] >= bounds[pending])]
    return words.astype(np.int64)


def _feistel(words: Words, half: Words, keys: Words, rounds: range, *, inverse: bool) -> Words:
    mask: Words = (np.uint64(1) << half) - np.uint64(1)
    left: Words = words >> half
    right: Words = words & mask
    for number in rounds:
        salt = keys ^ np.uint64(number + 1)
        if inverse:
            left, right = right ^ (_hash(left ^ _hash(salt)) & mask), left
        else:
            left, right = right, left ^ (_hash(right ^ _hash(salt)) & mask)
    return (left << half) | right
