"""From documents to rows: best-fit packing for language modelling, one document a row for tasks
with labels.

Pure numpy. A document longer than a row is cut into full rows and a remainder; remainders and short
documents are packed best-fit, longest first. Nothing is lost in packing; what is cut off in
one-document rows is counted.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Rows of tokens, padded at the end."""

    tokens: npt.NDArray[np.unsignedinteger]
    """[num_rows, sequence_tokens]"""
    num_tokens: npt.NDArray[np.int32]
    """[num_rows]: tokens before the padding."""
    aligned: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    """[num_rows, sequence_tokens] each: what goes along with the tokens."""
    num_cut_documents: int = 0
    num_truncated_documents: int = 0
    num_truncated_tokens: int = 0


@dataclass(frozen=True)
class Varying:
    """Numbers of rows that have as many as they like."""

    values: npt.NDArray[Any]
    """End to end."""
    lengths: Ints

    @classmethod
    def of(cls, lists: pa.Array, dtype: str) -> Varying:
        """Those of an array of lists."""
        values = lists.flatten().to_numpy(zero_copy_only=False).astype(dtype, copy=False)
        lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
        return cls(values, lengths.astype(np.int64))

    @classmethod
    def join(cls, pieces: Sequence[Varying], dtype: str) -> Varying:
        """Those of some rows after those of others."""
        values = [np.empty(0, dtype), *(piece.values for piece in pieces)]
        lengths = [np.empty(0, np.int64), *(piece.lengths for piece in pieces)]
        return cls(np.concatenate(values), np.concatenate(lengths))

    def __getitem__(self, rows: Ints) -> Varying:
        """Those of some rows, in their order."""
        starts, lengths = (np.cumsum(self.lengths) - self.lengths)[rows], self.lengths[rows]
        return Varying(gather(self.values, starts, lengths), lengths)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    @property
    def offsets(self) -> Ints:
        """Where each row's begin, and where the last's end."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])

    def lists(self) -> pa.LargeListArray:
        """An array of lists. Nothing is copied."""
        kind = pa.field("item", pa.from_numpy_dtype(self.values.dtype), nullable=False)
        return pa.LargeListArray.from_arrays(
            pa.array(self.offsets), pa.array(self.values), type=pa.large_list(kind)
        )


Values = npt.NDArray[Any] | Varying
"""A column of rows: [num_rows, …], or lists of numbers."""


def best_fit(lengths: Ints, capacity: int) -> tuple[Ints, int]:
    """The row of each piece and the number of rows: longest first, each into the fullest row that
    still has room.

    Pieces of one length are dealt together to rows of one fill: the work is at most O(n log n), and
    far less when many pieces have the same length. Lengths lie in 1..capacity.
    """
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    rows_of_sorted: list[int] = []
    free: dict[int, list[int]] = {}  # room left → rows that have it
    rooms: list[int] = []  # the keys of `free`, sorted
    num_rows = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            place = bisect_left(rooms, size)
            room = rooms[place] if place < len(rooms) else capacity
            # A row that took a piece is now the fullest that has room, so it takes as many as fit.
            each = room // size
            wanted = -(-count // each)
            if place < len(rooms):
                taken = free[room][-wanted:]
                del free[room][-wanted:]
                if not free[room]:
                    del free[room], rooms[place]
            else:
                taken = list(range(num_rows, num_rows + wanted))
                num_rows += wanted
            placed = min(count, len(taken) * each)
            # Mostly a few rows: a list is quicker than numpy there.
            rows_of_sorted += (
                taken if each == 1 else [row for row in taken for _ in range(each)][:placed]
            )
            count -= placed
            last = placed - (len(taken) - 1) * each
            for rows, left in ((taken[:-1], room - each * size), (taken[-1:], room - last * size)):
                if left and rows:
                    if left not in free:
                        free[left] = []
                        insort(rooms, left)
                    free[left] += rows
    rows_of_piece = np.empty(len(lengths), np.int64)
    rows_of_piece[order] = rows_of_sorted
    return rows_of_piece, num_rows


Aligned = Mapping[str, tuple[npt.NDArray[Any], int]]
"""By name: a value for each token, end to end, and what stands where there is no token."""


def pack(
    tokens: npt.NDArray[np.unsignedinteger],
    lengths: Ints,
    capacity: int,
    pad_token_id: int,
    aligned: Aligned | None = None,
) -> Rows:
    """Documents (`tokens` end to end, `lengths` each) in as few rows as best-fit finds."""
    full, rest = lengths // capacity, lengths % capacity
    starts = np.cumsum(lengths) - lengths
    num_full = int(full.sum())
    # Full rows first: row k of a document starts k rows into it.
    first = np.repeat(starts, full)
    nth = np.arange(num_full) - np.repeat(np.cumsum(full) - full, full)
    piece_starts = np.concatenate([first + nth * capacity, (starts + full * capacity)[rest > 0]])
    rests = rest[rest > 0]
    piece_lengths = np.concatenate([np.full(num_full, capacity), rests])
    packed, num_packed = best_fit(rests, capacity)
    row_of_piece = np.concatenate([np.arange(num_full), packed + num_full])
    order = np.argsort(row_of_piece, kind="stable")
    num_rows = num_full + num_packed
    num_tokens = np.bincount(row_of_piece, weights=piece_lengths, minlength=num_rows).astype(
        np.int32
    )
    starts, lengths_of_pieces = piece_starts[order], piece_lengths[order]
    along = {
        name: _fill(gather(values, starts, lengths_of_pieces), num_tokens, capacity, pad)
        for name, (values, pad) in (aligned or {}).items()
    }
    return Rows(
        _fill(gather(tokens, starts, lengths_of_pieces), num_tokens, capacity, pad_token_id),
        num_tokens,
        along,
        num_cut_documents=int((lengths > capacity).sum()),
    )


def one_a_row(
    tokens: npt.NDArray[np.unsignedinteger],
    lengths: Ints,
    capacity: int,
    pad_token_id: int,
    *,
    prefix: tuple[int, ...],
    suffix: tuple[int, ...],
    aligned: Aligned | None = None,
    extended: Collection[str] = (),
) -> Rows:
    """A document a row between `prefix` and `suffix`; the end of a longer document is cut off and
    counted. What is `extended` has its last value at the suffix, too."""
    room = capacity - len(prefix) - len(suffix)
    kept = np.minimum(lengths, room)
    starts = np.cumsum(lengths) - lengths
    content = _fill(gather(tokens, starts, kept), kept.astype(np.int32), capacity, pad_token_id)
    rows = np.full((len(lengths), capacity), pad_token_id, tokens.dtype)
    rows[:, : len(prefix)] = prefix
    rows[:, len(prefix) :] = content[:, : capacity - len(prefix)]
    for index, token in enumerate(suffix):
        rows[np.arange(len(rows)), len(prefix) + kept + index] = token
    along = {}
    for name, (values, pad) in (aligned or {}).items():
        inner = _fill(gather(values, starts, kept), kept.astype(np.int32), capacity, pad)
        along[name] = np.full((len(lengths), capacity), pad, values.dtype)
        along[name][:, len(prefix) :] = inner[:, : capacity - len(prefix)]
        ends = len(prefix) + kept
        for index in range(len(suffix) if name in extended else 0):
            every = np.arange(len(rows))
            along[name][every, ends + index] = along[name][every, np.maximum(ends - 1, 0)]
    return Rows(
        rows,
        (kept + len(prefix) + len(suffix)).astype(np.int32),
        along,
        num_truncated_documents=int((lengths > room).sum()),
        num_truncated_tokens=int((lengths - kept).sum()),
    )


def gather(tokens: npt.NDArray[Any], starts: Ints, lengths: Ints) -> npt.NDArray[Any]:
    """The pieces of `tokens` end to end."""
    if not len(starts):
        return tokens[:0]
    if lengths.sum() >= 32 * len(starts):  # long pieces: one copy each
        bounds = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
        return np.concatenate([tokens[start:stop] for start, stop in bounds])
    ends = np.cumsum(lengths)
    indices = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
    gathered: npt.NDArray[Any] = tokens.take(indices)
    return gathered


def _fill(
    tokens: npt.NDArray[Any],
    num_tokens: npt.NDArray[np.int32],
    capacity: int,
    pad_token_id: int,
) -> npt.NDArray[Any]:
    """Tokens end to end as a padded matrix."""
    rows = np.full((len(num_tokens), capacity), pad_token_id, tokens.dtype)
    rows[np.arange(capacity, dtype=np.int32) < num_tokens[:, None]] = tokens
    return rows


def order_by_length(
    num_tokens: npt.NDArray[np.int32], group_rows: int, window_groups: int, rng: np.random.Generator
) -> Ints:
    """An order of rows in which each group holds rows of like length, and groups come in random
    order.

    Rows are taken as they come (already shuffled), sorted by length inside windows of
    `window_groups` groups and cut into groups. What does not fill a group stays at the end.
    """
    num_full = len(num_tokens) // group_rows * group_rows
    order = np.arange(len(num_tokens))
    window = window_groups * group_rows
    for start in range(0, num_full, window):
        stop = min(start + window, num_full)
        order[start:stop] = start + np.argsort(num_tokens[start:stop], kind="stable")
    groups = order[:num_full].reshape(-1, group_rows)
    return np.concatenate([groups[rng.permutation(len(groups))].reshape(-1), order[num_full:]])
