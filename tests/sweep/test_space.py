"""Search spaces: their form, and what of them does not suit a spec."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from dray.errors import SpecError
from dray.spec import make_spec
from dray.sweep.space import (
    SPACES,
    Parameter,
    check_space,
    load_space,
    make_space,
    settle,
    with_values,
)
from tiny import tiny_tree

TREE = tiny_tree(Path("corpus"))
RATE = {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}}


def space_of(parameters: dict[str, Any], **keys: Any) -> Any:
    return make_space({"parameters": parameters, "budget": {"trials": 4}, **keys})


@pytest.mark.parametrize("name", SPACES.names())
def test_each_packaged_space_loads_and_says_why(name: str) -> None:
    space = load_space(name)
    assert space.parameters
    assert SPACES.load(name).startswith("#"), "its arithmetic stands in its comments"


@pytest.mark.parametrize(
    ("parameters", "keys", "said"),
    [
        (
            {"optimizer.learning_rat": {"uniform": [0, 1]}},
            {},
            "did you mean optimizer.learning_rate",
        ),
        ({"regularization.dropout": {"uniform": [0, 1.5]}}, {}, "dropout = 1.5"),
        ({"batch.global_rows": {"choice": [8, "many"]}}, {}, "global_rows"),
        ({"name": {"choice": ["a", "b"]}}, {}, "changes the result"),
        ({"validation.metric": {"choice": ["loss"]}}, {}, "changes the result"),
        (RATE, {"metric": "perplexit"}, "did you mean perplexity"),
        (RATE, {"metric": "zzz"}, "it has loss"),
        (
            {**RATE, "model.tie_embeddings": {"choice": [True]}},
            {"ties": {"optimizer.learning_rate": {"to": "model.tie_embeddings"}}},
            "is no number",
        ),
        (
            {"model.hidden_size": {"choice": [64, 96]}, "model.num_heads": {"choice": [4, 7]}},
            {},
            "the spec refuses",
        ),
    ],
)
def test_what_does_not_suit_the_spec(
    parameters: dict[str, Any], keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(SpecError, match=r"^sp\.yaml") as caught:
        check_space(space_of(parameters, **keys), TREE, "sp.yaml")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_validation_nothing_can_be_compared() -> None:
    tree = tiny_tree(Path("corpus"), data={"validation": None})
    with pytest.raises(SpecError, match=r"data\.validation is missing"):
        check_space(space_of(RATE), tree, "sp.yaml")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"loguniform": [0, 1]}, "above 0"),
        ({"loguniform": [1, 1]}, "is empty"),
        ({"uniform": [2, 1]}, "is empty"),
        ({"choice": []}, "choice is empty"),
        ({"grid": []}, "grid is empty"),
        ({"quniform": [0, 1, 2]}, "does not fit"),
        ({"uniform": [0, 1], "choice": [1]}, "one of"),
        ({}, "one of"),
        ({"uniformly": [0, 1]}, "did you mean"),
        ({"uniform": [0]}, "uniform"),
        ({"uniform": [0, True]}, "number"),
    ],
)
def test_ranges_that_are_none(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        space_of({"optimizer.learning_rate": given})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"parameters": {}}, "parameters is empty"),
        ({"parameters": RATE}, "budget is missing"),
        ({"parameters": RATE, "budget": {"money": 3}}, "price_per_hour"),
        ({"parameters": RATE, "search": "grid"}, "needs choice or grid"),
        ({"parameters": RATE, "search": "bohb", "budget": {"trials": 1}}, "hpbandster"),
        ({"parameters": RATE, "budget": {"trial": 1}}, "did you mean budget.trials"),
        ({"parameters": RATE, "max_trials": 1}, "did you mean budget.trials"),
        ({"points": [{"seed": 1}], "parameters": RATE}, "give one of the two"),
        ({"points": [{"seed": 1}, {}]}, "one of them is empty"),
        ({"points": [{"seed": 1}], "search": "random"}, "tried in turn"),
        (
            {"parameters": RATE, "budget": {"trials": 1}, "ties": {"x": {"to": "y"}}},
            "no such parameter",
        ),
    ],
)
def test_spaces_that_are_none(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        make_space(tree)
    assert said in str(caught.value)


def test_parameters_that_depend_on_each_other() -> None:
    circle = {
        "optimizer.learning_rate": {"uniform": [1e-4, 1e-3], "when": {"optimizer.weight_decay": 0}},
        "optimizer.weight_decay": {"choice": [0, 0.1], "when": {"optimizer.learning_rate": 1}},
    }
    with pytest.raises(SpecError, match="depend on each other"):
        space_of(circle)


def test_a_condition_is_asked_of_the_space_and_of_the_spec() -> None:
    space = space_of(
        {
            "regularization.label_smoothing": {
                "uniform": [0, 0.1],
                "when": {"schedule.name": ["cosine", "linear"]},
            },
            "schedule.name": {"choice": ["cosine", "constant"]},
            "optimizer.weight_decay": {"uniform": [0, 0.1], "when": {"zero.stage": 3}},
        }
    )
    assert space.in_order().index("schedule.name") < space.in_order().index(
        "regularization.label_smoothing"
    )
    path = "regularization.label_smoothing"
    assert space.is_active(path, {"schedule.name": "cosine"}, TREE)
    assert not space.is_active(path, {"schedule.name": "constant"}, TREE)
    assert not space.is_active("optimizer.weight_decay", {}, TREE)  # the spec's stage is 1
    assert space.is_active("optimizer.weight_decay", {}, with_values(TREE, {"zero.stage": 3}))


@pytest.mark.parametrize(("rule", "factor"), [("sqrt", 2.0), ("linear", 4.0)])
def test_a_rate_that_is_tied_follows_the_batch(rule: str, factor: float) -> None:
    space = space_of(
        {**RATE, "batch.global_rows": {"choice": [8, 32]}},
        ties={"optimizer.learning_rate": {"to": "batch.global_rows", "rule": rule}},
    )
    spec = make_spec(TREE)
    drawn = {"optimizer.learning_rate": 1e-3, "batch.global_rows": 4 * spec.batch.global_rows}
    settled = settle(space, drawn, spec)
    assert settled["optimizer.learning_rate"] == pytest.approx(1e-3 * factor)
    assert settled["batch.global_rows"] == drawn["batch.global_rows"]


def test_draws_lie_in_their_ranges() -> None:
    chance = random.Random(0)
    for given, low, high in (
        ({"loguniform": [1e-4, 1e-2]}, 1e-4, 1e-2),
        ({"quniform": [0.0, 0.3, 0.1]}, 0.0, 0.3),
        ({"randint": [2, 5]}, 2, 4),
    ):
        values = [Parameter.model_validate(given).draw(chance) for _ in range(200)]
        assert low <= min(values) <= max(values) <= high
    assert set(values) == {2, 3, 4}


def test_a_task_that_was_given_by_its_name_keeps_it() -> None:
    changed = with_values({"task": "masked_lm"}, {"task.share": 0.3})
    assert changed == {"task": {"name": "masked_lm", "share": 0.3}}


def test_points_are_tried_in_turn_and_checked_whole() -> None:
    points = [
        {"model.hidden_size": 32, "model.num_heads": 2},
        {"model.hidden_size": 48, "model.num_heads": 3},
    ]
    space = make_space({"points": points})
    check_space(space, TREE, "sp.yaml")
    assert space.cells() == points
    assert space.paths == ["model.hidden_size", "model.num_heads"]
    assert make_space(space.model_dump(mode="json")) == space, "as a sweep's record keeps it"
    with pytest.raises(SpecError, match=r"points: the spec refuses model\.hidden_size=50"):
        check_space(make_space({"points": [{"model.hidden_size": 50}]}), TREE, "sp.yaml")
    with pytest.raises(SpecError, match="points: name"):
        check_space(make_space({"points": [{"name": "a"}]}), TREE, "sp.yaml")
