"""Draws: pure functions of what is known, within their ranges, and worth their cost."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dray.sweep.search import Known, draw
from dray.sweep.space import make_space

PARAMETERS = {
    "optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "batch.global_rows": {"choice": [8, 16, 32]},
    "optimizer.weight_decay": {"quniform": [0, 0.3, 0.1]},
    "schedule.name": {"choice": ["cosine", "linear"]},
    "schedule.warmup_steps": {"randint": [0, 9], "when": {"schedule.name": "linear"}},
}


def space_of(search: Any, **keys: Any) -> Any:
    return make_space({"parameters": PARAMETERS, "search": search, "budget": {"trials": 9}, **keys})


def loss_of(drawn: dict[str, Any]) -> float:
    """Least at a rate of 1e-3, the largest batch and no decay."""
    return (
        (math.log10(drawn["optimizer.learning_rate"]) + 3) ** 2
        + 4 / drawn["batch.global_rows"]
        + drawn["optimizer.weight_decay"]
    )


def search_of(search: Any, count: int, mode: str = "min") -> list[Known]:
    known: list[Known] = []
    sign = 1 if mode == "min" else -1
    for number in range(count):
        drawn = draw(space_of(search), number, known, mode, {})
        known.append(Known(drawn, sign * loss_of(drawn), True))
    return known


@pytest.mark.parametrize("search", ["random", "tpe", "cmaes"])
def test_draws_lie_in_their_ranges_and_heed_conditions(search: str) -> None:
    for known in search_of(search, 14):
        drawn = known.drawn
        assert 1e-4 <= drawn["optimizer.learning_rate"] <= 1e-2
        assert drawn["batch.global_rows"] in (8, 16, 32)
        assert drawn["optimizer.weight_decay"] in (0, 0.1, 0.2, 0.3)
        assert ("schedule.warmup_steps" in drawn) == (drawn["schedule.name"] == "linear")
        assert drawn.get("schedule.warmup_steps", 0) in range(9)


@pytest.mark.parametrize("search", ["random", "tpe", "cmaes"])
def test_the_same_is_drawn_from_the_same(search: str) -> None:
    """Also after trials that were stopped, failed or still go on: what is known counts alone."""
    known = search_of(search, 10)
    known += [
        Known(known[0].drawn, None, False),
        Known(known[1].drawn, None, True, is_lost=True),
        Known(known[2].drawn, 3.0, True, was_stopped=True, reports={5: 3.0}),
        Known(known[3].drawn, None, True, was_stopped=True),
    ]
    first = draw(space_of(search), len(known), known, "min", {})
    assert first == draw(space_of(search), len(known), known, "min", {})
    assert first != draw(space_of({"name": search, "seed": 1}), len(known), known, "min", {})


@pytest.mark.parametrize("mode", ["min", "max"])
def test_tpe_goes_where_trials_were_good(mode: str) -> None:
    """The median of its last draws against that of as many random ones."""
    guided = [loss_of(dict(known.drawn)) for known in search_of("tpe", 40, mode)[-15:]]
    blind = [loss_of(dict(known.drawn)) for known in search_of("random", 40, mode)[-15:]]
    assert sorted(guided)[7] < 0.6 * sorted(blind)[7]


def test_a_grid_goes_through_every_combination_once() -> None:
    space = make_space(
        {
            "parameters": {
                "batch.global_rows": {"choice": [8, 16]},
                "schedule.name": {"grid": ["cosine", "linear", "wsd"]},
            },
            "search": "grid",
        }
    )
    drawn = [tuple(draw(space, number, [], "min", {}).values()) for number in range(6)]
    assert len(set(drawn)) == 6


@pytest.mark.parametrize("search", ["random", "tpe", "cmaes"])
def test_values_of_a_grid_come_in_turn_under_every_search(search: str) -> None:
    parameters = {**PARAMETERS, "regularization.dropout": {"grid": [0.0, 0.1, 0.2]}}
    space = make_space({"parameters": parameters, "search": search, "budget": {"trials": 9}})
    known: list[Known] = []
    for number in range(9):
        drawn = draw(space, number, known, "min", {})
        known.append(Known(drawn, loss_of(drawn), True))
    assert [item.drawn["regularization.dropout"] for item in known] == [0.0, 0.1, 0.2] * 3
