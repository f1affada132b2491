"""Packing loses nothing, wastes little and is the same every time."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dray.corpus.packing import best_fit, gather, one_a_row, order_by_length, pack

PAD = 7


def naive_best_fit(lengths: list[int], capacity: int) -> int:
    """Rows that textbook best-fit decreasing needs."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    return len(rooms)


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
@settings(max_examples=200, deadline=None)
def test_best_fit_fits_and_equals_the_textbook(lengths: list[int], capacity: int) -> None:
    rows, num_rows = best_fit(np.array(lengths, np.int64), capacity)
    filled = np.bincount(rows, weights=lengths, minlength=num_rows)
    assert (filled <= capacity).all()
    assert (filled > 0).all()
    assert num_rows == naive_best_fit(lengths, capacity)


@given(st.lists(st.integers(0, 70), max_size=40), st.integers(2, 24))
@settings(max_examples=200, deadline=None)
def test_packing_keeps_every_token_in_document_order(sizes: list[int], capacity: int) -> None:
    lengths = np.array(sizes, np.int64)
    tokens = (np.arange(lengths.sum()) + 100).astype(np.uint16)
    rows = pack(tokens, lengths, capacity, PAD)
    assert rows.tokens.shape == (len(rows.num_tokens), capacity)
    valid = np.arange(capacity) < rows.num_tokens[:, None]
    assert sorted(rows.tokens[valid].tolist()) == tokens.tolist()
    assert (rows.tokens[~valid] == PAD).all()
    assert rows.num_cut_documents == (lengths > capacity).sum()
    owner = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    for row, count in zip(rows.tokens, rows.num_tokens, strict=True):
        places = row[:count].astype(np.int64) - 100
        # A row is made of runs, each of one document; a run begins at a multiple of the row's
        # length.
        breaks = np.flatnonzero(np.diff(places) != 1) + 1
        for run in np.split(places, breaks):
            assert len(run) == 0 or (run[0] - starts[owner[run[0]]]) % capacity == 0


def test_utilization_is_high_and_packing_fast_on_many_documents() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1.0, 50_000).astype(np.int64) + 1
    tokens = np.zeros(lengths.sum(), np.uint16)
    began = time.process_time()
    rows = pack(tokens, lengths, 512, PAD)
    assert time.process_time() - began < 5
    assert rows.num_tokens.sum() == lengths.sum()
    assert rows.num_tokens.sum() / rows.tokens.size > 0.99


def test_wide_rows_and_few_documents() -> None:
    lengths = np.array([1_000_000, 3, 999_999, 1], np.int64)
    rows = pack(np.ones(lengths.sum(), np.uint32), lengths, 1_000_000, PAD)
    assert rows.num_tokens.tolist() == [1_000_000, 1_000_000, 3]


def test_nothing_packs_to_nothing() -> None:
    rows = pack(np.empty(0, np.uint16), np.empty(0, np.int64), 8, PAD)
    assert rows.tokens.shape == (0, 8)


def test_one_document_a_row_between_prefix_and_suffix() -> None:
    tokens = np.array([11, 12, 21, 31, 32, 33, 34, 35], np.uint16)
    rows = one_a_row(tokens, np.array([2, 1, 5, 0]), 5, PAD, prefix=(1,), suffix=(2,))
    assert rows.tokens.tolist() == [
        [1, 11, 12, 2, 7],
        [1, 21, 2, 7, 7],
        [1, 31, 32, 33, 2],
        [1, 2, 7, 7, 7],
    ]
    assert rows.num_tokens.tolist() == [4, 3, 5, 2]
    assert (rows.num_truncated_documents, rows.num_truncated_tokens) == (1, 2)


@pytest.mark.parametrize("size", [3, 100])
def test_gather_copies_pieces_in_order(size: int) -> None:
    tokens = np.arange(1000, dtype=np.uint32)
    starts, lengths = np.array([500, 0, 900]), np.array([size, size, size])
    expected = [*range(500, 500 + size), *range(size), *range(900, 900 + size)]
    assert gather(tokens, starts, lengths).tolist() == expected


@given(st.integers(0, 400), st.integers(1, 16), st.integers(1, 4), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_length_buckets_are_a_permutation_with_like_lengths(
    num: int, group: int, window: int, seed: int
) -> None:
    lengths = np.random.default_rng(seed).integers(1, 100, num).astype(np.int32)
    order = order_by_length(lengths, group, window, np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(num))
    rest = num % group
    assert order[num - rest :].tolist() == list(range(num - rest, num))
    if num >= 8 * group and window == 4 and group >= 4:
        groups = lengths[order[: num - rest]].reshape(-1, group)
        unsorted = lengths[: num - rest].reshape(-1, group)
        assert np.ptp(groups, axis=1).mean() < np.ptp(unsorted, axis=1).mean()
