"""The order is a pure function: every row once an epoch, the same global batches at any number of ranks, O(1) seek."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dray.order import PADDING, Order, SourceCount, deal_to_ranks, make_segments, row_digest


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(st.integers(1, 700), min_size=1, max_size=4),
    group_rows=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 10**6),
)
def test_every_row_once_an_epoch(counts, group_rows, seed, epoch):
    order = Order([SourceCount(n) for n in counts], group_rows, seed)
    total = sum(counts)
    rows = order.rows(epoch * total, (epoch + 1) * total)
    assert np.array_equal(np.sort(rows), np.arange(total))


@settings(max_examples=100, deadline=None)
@given(
    num_rows=st.integers(1, 5000),
    group_rows=st.integers(1, 600),
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(0, 3000), min_size=0, max_size=6),
    start=st.integers(0, 10**12),
)
def test_rows_do_not_depend_on_how_they_are_asked_for(num_rows, group_rows, seed, cuts, start):
    order = Order([SourceCount(num_rows)], group_rows, seed)
    whole = order.rows(start, start + 3000)
    edges = sorted({0, 3000, *cuts})
    parts = [order.rows(start + a, start + b) for a, b in itertools.pairwise(edges)]
    assert np.array_equal(whole, np.concatenate(parts))


@settings(max_examples=60, deadline=None)
@given(global_rows=st.integers(1, 200), num_ranks=st.integers(1, 64), step=st.integers(0, 10**6))
def test_the_same_global_batch_at_any_number_of_ranks(global_rows, num_ranks, step):
    order = Order([SourceCount(1234), SourceCount(77)], 32, seed=5)
    rows = order.rows(step * global_rows, (step + 1) * global_rows)
    dealt = deal_to_ranks(rows, num_ranks, -(-global_rows // num_ranks))
    assert np.array_equal(np.sort(dealt[dealt != PADDING]), np.sort(rows))
    assert sum(row_digest(part) for part in dealt) % 2**64 == row_digest(rows)


def test_seeds_and_epochs_have_orders_of_their_own():
    first, second = (Order([SourceCount(10_000)], 256, seed).rows(0, 20_000) for seed in (0, 1))
    assert (first[:10_000] == second[:10_000]).mean() < 0.01
    assert (first[:10_000] == first[10_000:]).mean() < 0.01


def test_rows_are_spread_evenly():
    # Each row's mean place over many epochs is the middle, and neighbours on disk do not stay together.
    order = Order([SourceCount(1000)], 10, seed=3)
    places = np.stack([np.argsort(order.rows(e * 1000, (e + 1) * 1000)) for e in range(400)])
    assert abs(places.mean(axis=0) - 499.5).max() < 5 * 1000 / np.sqrt(12 * 400)
    assert 0.05 < (np.abs(np.diff(places, axis=1)) < 10).mean() * 10 < 9.5


def test_weighted_sources_are_mixed_in_proportion_everywhere():
    order = Order([SourceCount(1000, 3.0), SourceCount(50, 1.0), SourceCount(9000, 0.001)], 64, seed=1)
    for start in (0, 10**9):
        rows = order.rows(start, start + 8192)
        shares = [((rows >= a) & (rows < b)).mean() for a, b in ((0, 1000), (1000, 1050), (1050, 10050))]
        assert shares == pytest.approx([0.75, 0.25, 0.001], abs=1e-3)
        for window in rows.reshape(-1, 64):
            assert abs((window < 1000).sum() - 48) <= 2
    # The small source goes through whole epochs of its own.
    rows = order.rows(0, 100_000)
    small = rows[(rows >= 1000) & (rows < 1050)]
    whole = small[: len(small) // 50 * 50].reshape(-1, 50)
    assert (np.sort(whole, axis=1) == np.arange(1000, 1050)).all()


def test_seeking_to_a_billionth_step_needs_no_replay():
    order = Order([SourceCount(10_000_019)], 256, seed=0)
    far = order.rows(10**9 * 512, 10**9 * 512 + 512)  # a replay would read 5·10¹¹ positions first
    assert len(np.unique(far)) == 512
    assert np.array_equal(far[100:200], order.rows(10**9 * 512 + 100, 10**9 * 512 + 200))


def test_the_digest_forgets_order_and_padding_but_not_rows():
    rows = np.array([5, 1, 9, 9])
    assert row_digest(rows) == row_digest(rows[::-1]) == row_digest(np.array([9, PADDING, 5, 9, 1]))
    assert row_digest(rows) != row_digest(np.array([5, 1, 9]))
    assert row_digest(rows) != row_digest(np.array([5, 1, 9, 8]))
    assert row_digest(np.array([], dtype=np.int64)) == 0


@given(
    start=st.integers(0, 50),
    extra=st.integers(1, 60),
    steps_per_block=st.integers(1, 20),
    every=st.integers(1, 30),
    val_rows=st.integers(1, 90),
)
def test_segments_cover_each_step_and_validation_row_once(start, extra, steps_per_block, every, val_rows):
    end = start + extra
    due = [*range(every, end + 1, every), end]
    segments = make_segments(
        start_step=start, num_steps=end, steps_per_block=steps_per_block, validation_steps=due,
        num_validation_rows=val_rows, validation_rows_per_block=32,
    )
    trained = [s for seg in segments if seg.kind == "train" for s in range(seg.first, seg.last + 1)]
    assert trained == list(range(start + 1, end + 1))
    for step in {d for d in due if d > start}:
        parts = [seg for seg in segments if seg.kind == "validation" and seg.first == step]
        assert [r for seg in parts for r in range(seg.start_row, seg.stop_row)] == list(range(val_rows))
        at = segments.index(parts[0])
        assert segments[at - 1].kind == "train"
        assert segments[at - 1].last == step


def test_a_source_without_rows_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        Order([SourceCount(0)], 8, 0)


def test_an_epoch_of_several_sources_reads_group_by_group():
    """Sources without weights are one pool: a group's rows come one after another, whichever source it lies in."""
    counts, group_rows = [1000, 333, 70], 32
    rows = Order([SourceCount(n) for n in counts], group_rows, seed=4).rows(0, sum(counts))
    source = np.searchsorted(np.cumsum(counts), rows, side="right")
    group = source * 1000 + (rows - np.concatenate([[0], np.cumsum(counts)])[source]) // group_rows
    num_groups = sum(-(-n // group_rows) for n in counts)
    assert (np.diff(group) != 0).sum() == num_groups - 1
    assert (np.diff(source) != 0).sum() > 10  # and the sources take turns
