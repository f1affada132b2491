"""Batch arithmetic: what divides, what is padded, and how a duration becomes steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dray.errors import PlanError
from dray.plan import make_batch, num_steps_of
from dray.plan.batch import micro_candidates
from dray.spec import Duration, load_spec, recipe_names

COUNTS = st.integers(1, 64)


@given(COUNTS, COUNTS, COUNTS)
def test_a_fixed_group_cuts_exactly(num_ranks: int, micro_rows: int, accumulation: int) -> None:
    batch = make_batch(num_ranks * micro_rows * accumulation, num_ranks, micro_rows, elastic=False)
    assert batch.accumulation == accumulation
    assert batch.padded_rows == 0
    assert batch.rows_per_rank == micro_rows * accumulation


@given(st.integers(1, 10_000), COUNTS, COUNTS)
def test_an_elastic_group_pads_less_than_one_round(
    global_rows: int, num_ranks: int, micro_rows: int
) -> None:
    batch = make_batch(global_rows, num_ranks, micro_rows, elastic=True)
    assert batch.rows_per_rank * num_ranks == global_rows + batch.padded_rows
    assert batch.rows_per_rank == batch.micro_rows * batch.accumulation
    assert 0 <= batch.padded_rows < num_ranks * micro_rows


def test_an_indivisible_batch_names_the_nearest() -> None:
    with pytest.raises(PlanError) as caught:
        make_batch(100, 8, 16, elastic=False)
    said = "batch.global_rows = 100: not a multiple of 8 ranks × 16 rows (128); nearest: 128"
    assert str(caught.value).startswith(said)
    with pytest.raises(PlanError, match="nearest: 192 or 256"):
        make_batch(200, 4, 16, elastic=False)


@given(st.integers(1, 500), st.integers(1, 16))
def test_candidates_for_the_micro_batch_pad_nothing_needless(
    global_rows: int, num_ranks: int
) -> None:
    found = micro_candidates(global_rows, num_ranks, elastic=True)
    assert found == sorted(found, reverse=True)
    assert found[-1] == 1
    least = make_batch(global_rows, num_ranks, 1, elastic=True).padded_rows
    assert {
        make_batch(global_rows, num_ranks, rows, elastic=True).padded_rows for rows in found
    } == {least}


def test_a_fixed_group_that_cannot_share_out_has_no_candidates() -> None:
    with pytest.raises(PlanError, match="not a multiple of 3 ranks × 1 row"):
        micro_candidates(16, 3, elastic=False)


def test_durations_become_steps() -> None:
    assert num_steps_of(Duration(steps=7), 16, 8192, None) == 7
    assert num_steps_of(Duration(tokens=8193), 16, 8192, None) == 2
    assert (
        num_steps_of(Duration(epochs=2), 16, 8192, 100) == 13
    )  # 200 rows: the last batch is filled up
    assert num_steps_of(Duration(epochs=0.001), 16, 8192, 100) == 1
    assert num_steps_of(Duration(epochs=2), 16, 8192, None) is None


@pytest.mark.parametrize("name", recipe_names())
def test_the_workers_of_every_recipe_share_its_batch(name: str) -> None:
    spec = load_spec(name)
    ranks, micro_rows = spec.resources.workers, spec.batch.micro_rows
    micro_rows = 1 if micro_rows == "auto" else micro_rows
    batch = make_batch(spec.batch.global_rows, ranks, micro_rows, elastic=False)
    assert batch.padded_rows == 0
