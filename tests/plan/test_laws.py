"""The Step Law: its own arithmetic, and where it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dray.errors import SpecError
from dray.plan import local_shape, make_plan
from dray.plan.laws import round_rows, step_law_batch_tokens, step_law_rate
from dray.spec import dump_spec, make_spec, read_yaml
from tiny import tiny_tree


def make(**sections: Any) -> Any:
    sections = {
        "optimizer": {"learning_rate": "auto"},
        "batch": {"global_rows": "auto"},
        **sections,
    }
    tree = tiny_tree(Path("corpus"), **sections)
    tree["batch"] = sections["batch"]
    return make_spec(tree)


def test_the_law_as_it_is_written() -> None:
    """By hand, for 1 B parameters and 100 B tokens: 1.79 · 10^(-6.417) · 10^(3.377) and
    0.58 · 10^(6.281)."""
    assert step_law_rate(1e9, 1e11) == pytest.approx(1.79 * 10 ** (-0.713 * 9 + 0.307 * 11))
    assert step_law_rate(1e9, 1e11) == pytest.approx(1.63e-3, rel=0.01)
    assert step_law_batch_tokens(1e11) == pytest.approx(1.108e6, rel=0.01)


@pytest.mark.parametrize(
    ("rows", "rounded"), [(0.3, 1), (1.4, 1), (2.6, 3), (5.2, 6), (13, 12), (15, 16), (100, 96)]
)
def test_rows_are_what_many_ranks_divide(rows: float, rounded: int) -> None:
    assert round_rows(rows) == rounded


def test_a_plan_has_the_laws_numbers() -> None:
    spec = make(duration={"steps": None, "tokens": 10_000_000})
    plan = make_plan(spec, local_shape())
    assert plan.law is not None
    assert plan.law.num_tokens == 10_000_000
    body = plan.law.num_parameters
    assert body < plan.num_parameters
    assert plan.learning_rate == pytest.approx(step_law_rate(body, 1e7), rel=1e-2)
    assert plan.batch.global_rows == round_rows(step_law_batch_tokens(1e7) / 64)


def test_by_steps_batch_and_tokens_follow_from_each_other() -> None:
    plan = make_plan(make(duration={"steps": 2000}), local_shape())
    assert plan.law is not None
    assert plan.law.num_tokens == 2000 * plan.law.global_rows * 64
    wanted = step_law_batch_tokens(plan.law.num_tokens) / 64
    assert plan.law.global_rows == pytest.approx(wanted, rel=0.35)


def test_before_the_corpus_is_known_epochs_say_no_tokens() -> None:
    spec = make(duration={"steps": None, "epochs": 1})
    plan = make_plan(spec, local_shape())
    assert plan.law is None
    assert any("once the corpus is prepared" in note for note in plan.notes)
    assert make_plan(spec, local_shape(), num_rows=100_000, num_tokens=1).law is not None


def test_auto_is_written_as_auto_and_changes_no_other_spec() -> None:
    spec = make()
    again = make_spec(read_yaml(dump_spec(spec)))
    assert again == spec
    assert again.is_auto
    assert read_yaml(dump_spec(spec))["optimizer"]["learning_rate"] == "auto"
    assert not make_spec(tiny_tree(Path("corpus"))).is_auto


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"optimizer": {"learning_rate": 0}}, "a number above 0, or auto"),
        ({"batch": {"global_rows": 0}}, "a number above 0, or auto"),
        ({"batch": {"global_rows": "all"}}, "global_rows"),
        ({"optimizer": {"name": "sgd", "learning_rate": 1.0}}, "AdamW's"),
        ({"model": {"run": "other", "architecture": None}}, "starts from run other"),
    ],
)
def test_where_there_is_no_law(sections: dict[str, Any], said: str) -> None:
    if "model" in sections:
        sections["model"] = {"run": "other"}
    tree = tiny_tree(Path("corpus"))
    tree |= {"optimizer": {"learning_rate": "auto"}, "batch": {"global_rows": "auto"}, **sections}
    with pytest.raises(SpecError) as caught:
        make_spec(tree)
    assert said in str(caught.value)
