"""The order is a pure function: every row once an epoch, the same global batches at any number of
ranks, O(1) seek."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dray.order import (
    NO_STEPS,
    PADDING,
    LeftOut,
    Order,
    SourceCount,
    batch_positions,
    chain_digest,
    deal_to_ranks,
    format_digest,
    make_segments,
    row_digest,
    row_digests,
)


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
    # Each row's mean place over many epochs is the middle, and neighbours on disk do not stay
    # together.
    order = Order([SourceCount(1000)], 10, seed=3)
    places = np.stack([np.argsort(order.rows(e * 1000, (e + 1) * 1000)) for e in range(400)])
    assert abs(places.mean(axis=0) - 499.5).max() < 5 * 1000 / np.sqrt(12 * 400)
    assert 0.05 < (np.abs(np.diff(places, axis=1)) < 10).mean() * 10 < 9.5


def test_weighted_sources_are_mixed_in_proportion_everywhere():
    order = Order(
        [SourceCount(1000, 3.0), SourceCount(50, 1.0), SourceCount(9000, 0.001)], 64, seed=1
    )
    for start in (0, 10**9):
        rows = order.rows(start, start + 8192)
        shares = [
            ((rows >= a) & (rows < b)).mean() for a, b in ((0, 1000), (1000, 1050), (1050, 10050))
        ]
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
def test_segments_cover_each_step_and_validation_row_once(
    start, extra, steps_per_block, every, val_rows
):
    end = start + extra
    due = [*range(every, end + 1, every), end]
    segments = list(
        make_segments(
            start_step=start,
            num_steps=end,
            steps_per_block=steps_per_block,
            validate_every=every,
            num_validation_rows=val_rows,
            validation_rows_per_block=32,
        )
    )
    trained = [s for seg in segments if seg.kind == "train" for s in range(seg.first, seg.last + 1)]
    assert trained == list(range(start + 1, end + 1))
    for step in {d for d in due if d > start}:
        parts = [seg for seg in segments if seg.kind == "validation" and seg.first == step]
        assert [r for seg in parts for r in range(seg.start_row, seg.stop_row)] == list(
            range(val_rows)
        )
        at = segments.index(parts[0])
        assert segments[at - 1].kind == "train"
        assert segments[at - 1].last == step


def test_a_source_without_rows_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        Order([SourceCount(0)], 8, 0)


def test_an_epoch_of_several_sources_reads_group_by_group():
    """Sources without weights are one pool: a group's rows come one after another, whichever source
    it lies in."""
    counts, group_rows = [1000, 333, 70], 32
    rows = Order([SourceCount(n) for n in counts], group_rows, seed=4).rows(0, sum(counts))
    source = np.searchsorted(np.cumsum(counts), rows, side="right")
    group = source * 1000 + (rows - np.concatenate([[0], np.cumsum(counts)])[source]) // group_rows
    num_groups = sum(-(-n // group_rows) for n in counts)
    assert (np.diff(group) != 0).sum() == num_groups - 1
    assert (np.diff(source) != 0).sum() > 10  # and the sources take turns


@st.composite
def left_out_batches(draw: st.DrawFn) -> tuple[int, ...]:
    return tuple(sorted(draw(st.sets(st.integers(0, 120), max_size=40))))


@given(batches=left_out_batches(), first=st.integers(1, 150), num_steps=st.integers(1, 30))
def test_step_s_reads_the_sth_batch_that_is_not_left_out(batches, first, num_steps):
    read = [batch for batch in range(400) if batch not in batches]
    steps = np.arange(first, first + num_steps)
    assert LeftOut(batches).batches_at(steps).tolist() == read[first - 1 : first - 1 + num_steps]


@given(batches=left_out_batches(), first=st.integers(1, 60), num_steps=st.integers(1, 10))
def test_leaving_out_steps_changes_nothing_before_them(batches, first, num_steps):
    before, after = LeftOut(batches), LeftOut(batches).with_steps(first, first + num_steps - 1)
    steps = np.arange(1, 200)
    assert len(after.batches) == len(batches) + num_steps
    assert np.array_equal(
        before.batches_at(steps[: first - 1]), after.batches_at(steps[: first - 1])
    )
    # From there on what was read `num_steps` later comes now, and the batches in between never
    # come.
    assert np.array_equal(
        before.batches_at(steps[first - 1 :] + num_steps), after.batches_at(steps[first - 1 :])
    )


@settings(max_examples=50, deadline=None)
@given(
    batches=left_out_batches(),
    global_rows=st.integers(1, 60),
    num_ranks=st.integers(1, 16),
    first=st.integers(1, 10**9),
)
def test_left_out_batches_are_read_by_no_rank(batches, global_rows, num_ranks, first):
    order, steps = (
        Order([SourceCount(1234, 1.0), SourceCount(77, 2.0)], 32, seed=5),
        np.arange(first, first + 5),
    )
    read = LeftOut(batches).batches_at(steps)
    assert not set(read.tolist()) & set(batches)
    rows = order.rows_at(batch_positions(read, global_rows)).reshape(-1, global_rows)
    for batch, of_step in zip(read.tolist(), rows, strict=True):
        assert np.array_equal(of_step, order.rows(batch * global_rows, (batch + 1) * global_rows))
        dealt = deal_to_ranks(of_step, num_ranks, -(-global_rows // num_ranks))
        assert (
            sum(row_digest(part) for part in dealt) % 2**64 == row_digests(rows[read == batch])[0]
        )


@pytest.mark.parametrize("batches", [(-1,), (3, 3), (5, 2)])
def test_batches_to_leave_out_are_ascending_indices(batches):
    with pytest.raises(ValueError, match="ascend"):
        LeftOut(batches)


@pytest.mark.parametrize("weights", [(None, None, None), (1.0, 5.0, 0.5)])
def test_an_epoch_of_a_pool_is_each_of_its_rows(weights):
    order = Order(
        [SourceCount(n, w) for n, w in zip((100, 33, 7), weights, strict=True)], 16, seed=2
    )
    positions = np.arange(20_000)
    rows, (pools, epochs) = order.rows_at(positions), order.epochs_at(positions)
    assert [len(pool) for pool in order.pools] == ([140] if weights[0] is None else [100, 33, 7])
    for number, pool in enumerate(order.pools):
        for epoch in range(int(epochs[pools == number].max())):
            assert np.array_equal(
                np.sort(rows[(pools == number) & (epochs == epoch)]), np.asarray(pool)
            )


def test_a_chained_digest_tells_histories_apart():
    def chain(*digests: int) -> str:
        text = NO_STEPS
        for digest in digests:
            text = chain_digest(text, digest)
        return text

    assert chain(1, 2, 3) == chain_digest(chain_digest(chain(1), 2), 3)
    different = [
        chain(),
        chain(1),
        chain(2, 1),
        chain(1, 2),
        chain(1, 1),
        chain(1, 2, 0),
        chain(2**64 - 1),
        chain(0),
    ]
    assert len(set(different)) == len(different)
    assert chain(2**64 + 5) == chain(5)  # digests are taken modulo 2^64
    assert format_digest(2**64 + 5) == "0000000000000005"
