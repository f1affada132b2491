"""How many trials there is room for, and how many share a GPU or a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from dray.errors import PlanError
from dray.plan import Plan, make_plan, parse_shape
from dray.spec import Resources, make_spec
from dray.sweep.room import MOST_PACKED, most_packed, pack
from tiny import tiny_tree


def plan_of(resources: Resources, hidden_size: int, shape: str = "1x1xH100") -> Plan:
    model = {
        "architecture": "llama",
        "hidden_size": hidden_size,
        "num_layers": 24,
        "num_heads": hidden_size // 64,
    }
    tree = tiny_tree(
        Path("corpus"), model=model, resources=resources.model_dump(), zero={"stage": "auto"}
    )
    return make_plan(make_spec(tree), parse_shape(shape))


ONE = Resources(workers=1, gpus_per_worker=1)


def test_small_trials_share_a_card_by_themselves() -> None:
    packed = pack(ONE, plan_of(ONE, 256), "auto")
    assert packed.gpus_per_worker == 1 / MOST_PACKED
    share = plan_of(packed, 256)
    assert share.memory_limit_bytes is not None
    assert share.memory.total <= share.memory_limit_bytes
    whole = plan_of(ONE, 256).memory_limit_bytes or 0
    assert share.memory_limit_bytes == pytest.approx(whole / MOST_PACKED, rel=1e-6)


def test_a_large_trial_keeps_its_card() -> None:
    """24 layers of width 2048 take some 20 GB of states: not two of them in 80."""
    plan = plan_of(ONE, 3072)
    assert plan.memory_limit_bytes is not None
    assert plan.memory.total > plan.memory_limit_bytes / 2
    assert pack(ONE, plan, "auto") == ONE
    with pytest.raises(PlanError, match=r"packing = 2: a trial takes .* 1 of them fit"):
        pack(ONE, plan, 2)


def test_cpus_are_shared_where_somebody_says_so() -> None:
    cpu = Resources(workers=1, cpus_per_worker=2)
    plan = plan_of(cpu, 64, "1xCPU(cpus=4,memory=64GB)")
    assert pack(cpu, plan, "auto") == cpu
    assert pack(cpu, plan, 4).cpus_per_worker == 0.5
    assert (most_packed(cpu, "auto"), most_packed(cpu, 4), most_packed(ONE, "auto")) == (
        1,
        4,
        MOST_PACKED,
    )


def test_trials_of_several_workers_are_not_packed() -> None:
    two = Resources(workers=2)
    plan = plan_of(two, 64, "1xCPU(cpus=4,memory=64GB)")
    assert pack(two, plan, "auto") == two
    with pytest.raises(PlanError, match="a trial has 2 workers"):
        pack(two, plan, 2)
