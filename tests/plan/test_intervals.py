"""How often to save: the formulas against the paper's figures, and against simulated failures."""

from __future__ import annotations

import math

import pytest

from bench.scale_failures import simulate_goodput
from dray.plan import FailureRate, choose_interval, daly_interval, expected_goodput
from dray.plan.intervals import LEAST_SECONDS, MOST_SECONDS, PRIOR_RANK_HOURS

MINUTE, HOUR = 60.0, 3600.0


@pytest.mark.parametrize(
    ("failure_minutes", "wanted_minutes"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)]
)
def test_the_figures_of_daly(failure_minutes: float, wanted_minutes: float) -> None:
    """The captions of figures 3 to 5 of the paper: saves of 5 minutes."""
    found = daly_interval(5 * MINUTE, failure_minutes * MINUTE) / MINUTE
    assert found == pytest.approx(wanted_minutes, rel=0.006)


def test_the_limits_of_daly() -> None:
    young = math.sqrt(2 * 1.0 * 1e8)
    assert daly_interval(1.0, 1e8) == pytest.approx(young - 1.0, rel=1e-3)
    assert daly_interval(200.0, 100.0) == daly_interval(900.0, 100.0) == 100.0
    assert daly_interval(0.0, 1e6) == 0.0


@pytest.mark.parametrize("failure_seconds", [0.25 * HOUR, 5 * HOUR, 100 * HOUR])
@pytest.mark.parametrize("held_seconds", [1.0, 30.0])
def test_no_interval_on_a_grid_is_expected_to_be_better(
    failure_seconds: float, held_seconds: float
) -> None:
    def goodput(seconds: float) -> float:
        return expected_goodput(
            seconds,
            held_seconds=held_seconds,
            failure_seconds=failure_seconds,
            lost_seconds=60.0,
        )

    chosen = daly_interval(held_seconds, failure_seconds)
    best = max(goodput(chosen * 1.05**power) for power in range(-60, 61))
    assert goodput(chosen) > best - 1e-4


@pytest.mark.parametrize(
    ("num_ranks", "held_seconds", "commit_seconds"),
    [(10_000, 2.0, 40.0), (10_000, 20.0, 20.0), (512, 5.0, 20.0)],
)
def test_simulated_failures_agree(
    num_ranks: int, held_seconds: float, commit_seconds: float
) -> None:
    failure_seconds = FailureRate().mean_seconds(num_ranks)
    costs = {
        "held_seconds": held_seconds,
        "commit_seconds": commit_seconds,
        "restart_seconds": 180.0,
        "failure_seconds": failure_seconds,
    }
    chosen = choose_interval(**costs)
    found = {
        seconds: simulate_goodput(seconds, **costs, num_failures=4000, seed=7)
        for seconds in (chosen.seconds, *(60.0 * 2**power for power in range(9)))
    }
    assert found[chosen.seconds] > max(found.values()) - 0.003
    assert found[chosen.seconds] == pytest.approx(chosen.goodput, abs=0.01)
    assert found[60.0 * 2**8] < found[chosen.seconds] - 0.003


def test_the_published_rate_and_what_a_run_has_seen() -> None:
    assert pytest.approx(50_677, abs=1) == PRIOR_RANK_HOURS
    # 16,384 GPUs for 54 days: 419 failures, once in three hours.
    assert FailureRate().mean_seconds(16_384) / HOUR == pytest.approx(54 * 24 / 419)
    assert FailureRate().hours == pytest.approx(PRIOR_RANK_HOURS, rel=1e-6)
    seen = FailureRate(failures=1000, rank_hours=1e6)
    assert seen.hours == pytest.approx(1000, rel=0.01)  # the prior is forgotten
    quiet = [FailureRate(0, hours).hours / PRIOR_RANK_HOURS for hours in (0.0, 1e4, 1e5, 1e6)]
    assert quiet == sorted(quiet)
    assert quiet[2] == pytest.approx(10.8, abs=0.2)


def test_machines_that_are_lent_are_found_out_within_some_failures() -> None:
    """Eight of them, gone every two hours without a word: a hundred times as often as a prior of
    50,677 hours would have it after a day."""
    found = [FailureRate(n, 16.0 * n).mean_seconds(8) / HOUR for n in (1, 3, 12)]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(70, abs=1)
    assert found[1] < 6
    assert found[2] == pytest.approx(2, rel=0.25)


def test_intervals_stay_within_their_limits() -> None:
    costs = {"restart_seconds": 30.0, "failure_seconds": 1e9}
    assert choose_interval(held_seconds=0.0, commit_seconds=1.0, **costs).seconds == LEAST_SECONDS
    assert choose_interval(held_seconds=9.0, commit_seconds=1.0, **costs).seconds == MOST_SECONDS
    slow = choose_interval(held_seconds=0.0, commit_seconds=400.0, **costs)
    assert slow.seconds == 800.0  # saves are written one at a time
    short = choose_interval(held_seconds=9.0, commit_seconds=1.0, most_seconds=600.0, **costs)
    assert short.seconds == 600.0


def test_a_group_that_fails_before_it_can_save_comes_to_nothing() -> None:
    hopeless = {"held_seconds": 1.0, "failure_seconds": 1.0, "lost_seconds": 1.0}
    assert expected_goodput(3600.0, **hopeless) == 0.0
    costs = {"held_seconds": 1.0, "commit_seconds": 1.0, "restart_seconds": 1.0}
    assert simulate_goodput(3600.0, **costs, failure_seconds=1.0) == 0.0
