"""The learning rate: fixed points, bounds and independence of the run's length."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dray.rank.schedule import learning_rate
from dray.spec import Schedule

NAMES = ("constant", "cosine", "linear", "wsd")
PEAK = 3e-4


def rates(schedule: Schedule, num_steps: int) -> list[float]:
    return [learning_rate(schedule, step, num_steps, PEAK) for step in range(1, num_steps + 1)]


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Schedule, int]:
    num_steps = draw(st.integers(1, 400))
    schedule = Schedule(
        name=draw(st.sampled_from(NAMES)),
        warmup_steps=draw(st.integers(0, num_steps)),
        decay_steps=draw(st.none() | st.integers(1, 500)),
        floor_share=draw(st.floats(0, 1)),
    )
    return schedule, num_steps


@given(schedules())
def test_rates_are_finite_and_between_zero_and_the_peak(case: tuple[Schedule, int]) -> None:
    assert all(math.isfinite(rate) and 0 <= rate <= PEAK * (1 + 1e-12) for rate in rates(*case))


@given(schedules())
def test_a_rate_never_rises_after_the_warm_up(case: tuple[Schedule, int]) -> None:
    schedule, num_steps = case
    after = rates(schedule, num_steps)[max(0, schedule.warmup_steps - 1) :]
    assert all(later <= earlier + 1e-15 for earlier, later in itertools.pairwise(after))


@given(schedules())
def test_after_the_warm_up_no_rate_is_below_the_floor(case: tuple[Schedule, int]) -> None:
    schedule, num_steps = case
    after = rates(schedule, num_steps)[schedule.warmup_steps :]
    assert all(rate >= schedule.floor_share * PEAK * (1 - 1e-12) for rate in after)


@given(st.sampled_from(NAMES), st.integers(2, 50))
def test_the_warm_up_is_linear_from_zero(name: str, warmup: int) -> None:
    schedule = Schedule(name=name, warmup_steps=warmup)
    found = rates(schedule, 1000)[:warmup]
    assert found == pytest.approx([PEAK * (step + 1) / warmup for step in range(warmup)])
    assert found[-1] == PEAK


@given(st.integers(1, 300), st.integers(1, 1000), st.integers(0, 1000))
def test_an_explicit_decay_does_not_depend_on_the_length(step: int, decay: int, more: int) -> None:
    for name in ("cosine", "linear", "constant"):
        schedule = Schedule(name=name, warmup_steps=min(5, decay), decay_steps=decay)
        assert learning_rate(schedule, step, 300, PEAK) == learning_rate(
            schedule, step, 300 + more, PEAK
        )


@given(st.integers(100, 1000), st.integers(1, 1000))
def test_wsd_before_its_decay_does_not_depend_on_the_length(num_steps: int, more: int) -> None:
    schedule = Schedule(name="wsd", warmup_steps=10, decay_steps=50)
    for step in (1, 9, 10, 11, num_steps - 50):
        assert learning_rate(schedule, step, num_steps, PEAK) == learning_rate(
            schedule, step, num_steps + more, PEAK
        )


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_cosine_and_linear_reach_the_floor_at_the_last_step_and_stay(name: str) -> None:
    schedule = Schedule(name=name, warmup_steps=10, floor_share=0.1)
    assert learning_rate(schedule, 100, 100, PEAK) == pytest.approx(0.1 * PEAK)
    assert learning_rate(schedule, 150, 100, PEAK) == pytest.approx(0.1 * PEAK)
    assert learning_rate(schedule, 55, 100, PEAK) == pytest.approx(
        0.55 * PEAK
    )  # half-way, in both shapes


def test_wsd_holds_the_peak_and_then_falls_linearly() -> None:
    schedule = Schedule(name="wsd", warmup_steps=10, floor_share=0.0)
    assert learning_rate(schedule, 90, 100, PEAK) == PEAK
    assert learning_rate(schedule, 95, 100, PEAK) == pytest.approx(0.5 * PEAK)
    assert learning_rate(schedule, 100, 100, PEAK) == 0.0


def test_constant_stays_at_the_peak() -> None:
    assert learning_rate(Schedule(name="constant"), 10**9, 10, PEAK) == PEAK


def test_steps_count_from_one() -> None:
    with pytest.raises(ValueError, match="count from 1"):
        learning_rate(Schedule(), 0, 10, PEAK)
