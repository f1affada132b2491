"""Rungs: which smaller models, for how long, and what each costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dray.errors import PlanError, SpecError
from dray.ladder.driver import parse_amount
from dray.ladder.rungs import (
    LEAST_STEPS,
    Rung,
    check_ladder,
    make_point,
    make_rungs,
    make_target,
    scaled_sizes,
)
from dray.plan import make_plan, parse_shape
from dray.spec import Spec, make_spec
from dray.sweep.space import with_values
from tiny import tiny_tree

SIZES = {"architecture": "llama", "hidden_size": 192, "num_layers": 4, "num_heads": 6}


def tree_of(**sections: Any) -> dict[str, Any]:
    return tiny_tree(
        Path("corpus"),
        **{
            "model": {**SIZES, "tie_embeddings": False},
            "batch": {"global_rows": 32, "micro_rows": "auto"},
            "schedule": {"name": "cosine", "warmup_steps": 60},
            "duration": {"steps": None, "tokens": 6_000_000},
            "resources": {"workers": 1},
            **sections,
        },
    )


def ladder_of(tree: dict[str, Any], share: float = 0.05) -> tuple[Spec, Rung, list[Rung]]:
    spec = make_spec(tree)
    target = make_target(spec, 50_000)
    return spec, target, make_rungs(spec, target, share * target.flops)


@pytest.mark.parametrize("share", [0.02, 0.05, 0.2])
def test_a_ladder_takes_what_it_may_and_no_more(share: float) -> None:
    _, target, rungs = ladder_of(tree_of(), share)
    spent = sum(rung.flops for rung in rungs) / target.flops
    assert 0.9 * share <= spent <= share
    assert len({rung.size for rung in rungs}) >= 3
    assert all(rung.size.num_parameters < target.size.num_parameters for rung in rungs)
    assert all(rung.num_tokens <= target.num_tokens / 2 for rung in rungs)


def test_a_larger_budget_comes_nearer() -> None:
    reaches = []
    for share in (0.02, 0.05, 0.2):
        _, target, rungs = ladder_of(tree_of(), share)
        largest = max(rung.size.num_parameters for rung in rungs)
        longest = max(rung.num_tokens for rung in rungs)
        reaches.append(max(target.size.num_parameters / largest, target.num_tokens / longest))
    assert reaches == sorted(reaches, reverse=True)


def test_each_rung_is_a_spec_of_just_that_size_and_length() -> None:
    tree = tree_of()
    spec, target, rungs = ladder_of(tree)
    for rung in rungs:
        point = make_point(spec, target, rung)
        own = make_spec(with_values(tree, point))
        plan = make_plan(own, parse_shape("1xCPU(cpus=2,memory=16GB)"), num_rows=50_000)
        assert plan.num_parameters == rung.size.num_parameters
        assert plan.num_tokens == rung.num_tokens
        assert plan.num_steps is not None
        assert plan.num_steps >= LEAST_STEPS
        assert own.model.hidden_size == rung.size.hidden_size
        assert own.optimizer.base_hidden_size == 192
        assert own.schedule.warmup_steps < plan.num_steps
        assert own.batch.global_rows <= 32
        rate = 3e-3 * (own.batch.global_rows / 32) ** 0.5
        assert own.optimizer.learning_rate == pytest.approx(rate, rel=5e-3)


def test_a_tied_head_keeps_the_rate_of_the_spec() -> None:
    spec, target, rungs = ladder_of(tree_of(model={**SIZES, "tie_embeddings": True}))
    assert not any("width_transfer" in key for key in make_point(spec, target, rungs[0]))


def test_grouped_heads_and_feed_forwards_shrink_with_the_width() -> None:
    model = {**SIZES, "num_kv_heads": 2, "intermediate_size": 480, "tie_embeddings": False}
    tree = tree_of(model=model)
    spec, target, rungs = ladder_of(tree)
    for rung in rungs:
        own = make_spec(with_values(tree, make_point(spec, target, rung))).model
        assert own.num_heads is not None
        assert own.num_kv_heads is not None
        assert own.num_heads % own.num_kv_heads == 0
        assert own.intermediate_size == pytest.approx(2.5 * int(own.hidden_size or 0), abs=4)


def test_batches_are_shared_out_equally() -> None:
    tree = tree_of(resources={"workers": 2})
    spec, target, rungs = ladder_of(tree)
    rows = [make_point(spec, target, rung).get("batch.global_rows", 32) for rung in rungs]
    assert all(number % 2 == 0 for number in rows)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (tree_of(data={"validation": None}), "validation is missing"),
        (
            tree_of(
                task="sequence_classification",
                data={"train": {"path": "x", "label": "label"}},
                model={**SIZES, "architecture": "bert"},
            ),
            "language models",
        ),
        ({**tree_of(), "model": {"path": "somewhere"}}, "drawn weights"),
    ],
)
def test_specs_without_a_ladder(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        check_ladder(make_spec(tree))
    assert "\n" not in str(caught.value)


def test_what_pays_for_no_ladder() -> None:
    with pytest.raises(PlanError, match=r"pay for no ladder .*give --budget flops=") as caught:
        ladder_of(tree_of(), 1e-5)
    least = float(str(caught.value).rpartition("flops=")[2].split()[0])
    target = ladder_of(tree_of())[1]
    assert ladder_of(tree_of(), 1.05 * least / target.flops)
    with pytest.raises(PlanError, match=r"no budget pays .* longer duration"):
        ladder_of(tree_of(duration={"steps": None, "tokens": 3000}), 1000)
    small = {"architecture": "llama", "hidden_size": 32, "num_layers": 1, "num_heads": 1}
    with pytest.raises(PlanError, match="fewer than 3 smaller sizes"):
        ladder_of(tree_of(model=small))


def test_the_sizes_that_the_best_is_looked_for_among() -> None:
    spec = make_spec(tree_of())
    sizes = scaled_sizes(spec)
    counts = [size.num_parameters for size in sizes]
    assert counts == sorted(set(counts))
    assert sizes[0].hidden_size <= 32
    assert min(size.num_layers for size in sizes) == 2, "of one layer the law says nothing"
    assert sizes[-1].hidden_size >= 32 * 192
    assert all(size.num_layers == round(4 * size.hidden_size / 192) for size in sizes[20:])


def test_amounts() -> None:
    target = ladder_of(tree_of())[1]

    def flops(text: str, price: float | None = None) -> float:
        return parse_amount(text, "--budget").flops(target, 1e12, price)

    assert flops("5%") == pytest.approx(0.05 * target.flops)
    assert flops("share=0.1") == pytest.approx(0.1 * target.flops)
    assert flops("flops=3e9") == 3e9
    assert flops("hours=2") == 2e12
    assert flops("money=10", price=2.5) == pytest.approx(4e12)
    with pytest.raises(SpecError, match="price-per-hour"):
        flops("money=10")
    with pytest.raises(SpecError, match="speed is not known"):
        parse_amount("hours=2", "--for").flops(target, None, None)


@pytest.mark.parametrize("text", ["5", "0%", "share=-1", "flops=nan", "hours=inf", "eur=3", "%"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(SpecError, match="is no amount"):
        parse_amount(text, "--budget")
