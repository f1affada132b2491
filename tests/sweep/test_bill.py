"""What a sweep will take, by the plan of one of its trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dray.plan import Demands, Plan, make_demands, make_plan, parse_shape, price_workers
from dray.spec import make_spec
from dray.sweep.bill import make_bill
from dray.sweep.space import Space, make_space
from tiny import tiny_tree

RATES = {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}}


def planned() -> tuple[Plan, Demands]:
    tree = tiny_tree(
        Path("none"), duration={"steps": 900}, checkpoint={"every_steps": 100, "keep_last": 2}
    )
    spec = make_spec(tree)
    plan = make_plan(spec, parse_shape("1xCPU(cpus=8,memory=64GB)"), num_rows=5000, vocab_size=512)
    return plan, make_demands(spec, plan)


def space(budget: dict[str, Any], **sections: Any) -> Space:
    return make_space({"parameters": RATES, "budget": budget, "scheduler": "none", **sections})


def test_all_trials_to_their_end() -> None:
    plan, demands = planned()
    seconds = demands.seconds_with_failures
    assert seconds is not None
    bill = make_bill(space({"trials": 16}), plan, demands, price_workers(3.0, 2, seconds))
    assert (bill.num_trials, bill.trial_seconds) == (16, seconds)
    assert bill.least_seconds == bill.most_seconds == 16 * seconds
    assert bill.most_worker_hours == pytest.approx(16 * seconds / 3600 * 2)
    assert bill.most_money == pytest.approx(16 * seconds / 3600 * 6.0)
    assert bill.checkpoints_bytes == 16 * 3 * plan.checkpoint_bytes
    text = "\n".join(bill.describe())
    assert "16 trials of up to" in text
    assert " to " not in text.splitlines()[1]


def test_trials_that_fall_behind_are_stopped_at_the_first_look() -> None:
    plan, demands = planned()
    asha = {"name": "asha", "grace_steps": 90}
    bill = make_bill(space({"trials": 10}, scheduler=asha), plan, demands)
    assert bill.least_seconds is not None
    assert bill.most_seconds is not None
    assert bill.least_seconds == pytest.approx(bill.most_seconds / 10)
    assert bill.most_money is None


@pytest.mark.parametrize(
    ("budget", "limit", "whole"),
    [
        ({"steps": 4500, "trials": 16}, "steps", 5.0),
        ({"tokens": 8 * 64 * 900 * 3}, "tokens", 3.0),
        ({"trials": 2, "steps": 10**6}, "", 2.0),
    ],
)
def test_the_limit_that_is_reached_first(budget: dict[str, Any], limit: str, whole: float) -> None:
    plan, demands = planned()
    bill = make_bill(space(budget), plan, demands)
    assert bill.limit == limit
    assert bill.most_seconds == pytest.approx(whole * (demands.seconds_with_failures or 0))
    assert (f"budget of {limit}" in bill.describe()[0]) == bool(limit)


def test_money_of_the_budget_is_what_it_costs_at_most() -> None:
    plan, demands = planned()
    bill = make_bill(space({"money": 1.5, "price_per_hour": 2.0}), plan, demands)
    assert (bill.limit, bill.most_money) == ("money", pytest.approx(1.5))


def test_a_grid_says_how_many_there_are_and_nothing_else_does() -> None:
    plan, demands = planned()
    grid = {"parameters": {"optimizer.learning_rate": {"grid": [1e-3, 2e-3, 3e-3]}}}
    bill = make_bill(
        make_space({**grid, "search": "grid", "repeats": 2, "scheduler": "none"}), plan, demands
    )
    assert bill.num_trials == 6
    timed = make_bill(space({"hours": 2}), plan, demands)
    assert (timed.num_trials, timed.most_seconds, timed.checkpoints_bytes) == (None, None, None)
    assert timed.describe()[1:] == ["no more than 2 hours of the clock"]
