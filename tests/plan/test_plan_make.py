"""The plan as a whole: what fits, what is refused and how, and that it needs neither torch nor
ray."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dray.errors import PlanError, SpecError
from dray.plan import Plan, Shape, format_bytes, format_plan, format_seconds, make_plan, parse_shape
from dray.spec import Spec, make_spec

LAPTOP = Shape(name="laptop", cpus_per_node=2, memory_bytes_per_node=24 * 10**9, oversubscribe=True)
LARGE = {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "intermediate_size": 11008}


def spec_of(**sections: Any) -> Spec:
    tree: dict[str, Any] = {
        "name": "t",
        "data": {"train": "none", "sequence_tokens": 256},
        "tokenizer": {"train": "byte_bpe", "vocab_size": 8192},
        "model": {"architecture": "llama", "hidden_size": 256, "num_layers": 4, "num_heads": 4},
        "batch": {"global_rows": 32},
        "duration": {"steps": 100},
        "resources": {"workers": 2},
    }
    for name, values in sections.items():
        tree[name] = (
            tree[name] | values
            if isinstance(tree.get(name), dict) and isinstance(values, dict)
            else values
        )
    return make_spec(tree)


def large(**sections: Any) -> Spec:
    on_gpus = {"workers": 16, "gpus_per_worker": 1, **sections.pop("resources", {})}
    data, batch = (
        sections.pop("data", {"sequence_tokens": 4096}),
        {"global_rows": 512, **sections.pop("batch", {})},
    )
    return spec_of(model=LARGE, resources=on_gpus, data=data, batch=batch, **sections)


def refusal(spec: Spec, shape: Shape, **known: Any) -> str:
    with pytest.raises(PlanError) as caught:
        make_plan(spec, shape, **known)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_overrides(spec: Spec, text: str) -> Spec:
    """The spec with the settings that a refusal proposes, as a user would give them."""
    tree = spec.model_dump(mode="json")
    for setting in text.split():
        path, _, value = setting.partition("=")
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[last] = json.loads(value) if value[0] in "0123456789[tf" else value
    return make_spec(tree)


def test_a_small_run_on_a_laptop() -> None:
    plan = make_plan(spec_of(), LAPTOP, num_rows=1000, num_tokens=256_000, vocab_size=8192)
    assert (plan.num_ranks, plan.precision, plan.zero_stage) == (2, "fp32", 0)
    assert plan.batch.num_ranks * plan.batch.rows_per_rank == 32
    assert plan.tokens_per_step == 32 * 256
    assert (plan.num_steps, plan.num_tokens) == (100, 100 * 32 * 256)
    assert plan.shard_bytes == 1000 * (2 * 256 + 4)
    assert plan.checkpoint_bytes == 12 * plan.num_parameters
    assert plan.est_seconds is not None
    assert 15 < plan.est_seconds < 3600
    assert plan.deepspeed["zero_optimization"]["stage"] == 0


def test_the_time_of_padded_rows_goes_by_their_real_length() -> None:
    spec = spec_of(
        task="sequence_classification",
        data={"train": {"path": "none", "label": "label"}},
        model={"architecture": "bert", "num_labels": 2},
    )
    short = make_plan(spec, LAPTOP, num_rows=1000, num_tokens=60_000)
    unknown = make_plan(spec, LAPTOP)
    assert (short.row_tokens, unknown.row_tokens) == (61, 256)
    assert 3.5 < unknown.step_seconds / short.step_seconds < 5
    assert short.memory == unknown.memory  # a batch of the longest rows may come
    assert make_plan(spec_of(), LAPTOP, num_rows=1000, num_tokens=60_000).row_tokens == 256


def test_the_terms_add_up() -> None:
    for stage in range(4):
        memory = make_plan(spec_of(zero={"stage": stage}), LAPTOP).memory
        terms = (
            "parameters",
            "gradients",
            "optimizer",
            "activations",
            "logits",
            "buffers",
            "checkpoint",
            "framework",
            "allocator",
        )
        assert memory.total == sum(getattr(memory, term) for term in terms)
        assert memory.activations_checkpointed < memory.activations_kept


def test_a_plan_survives_json() -> None:
    plan = make_plan(large(), parse_shape("2x8xH100"))
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_the_fastest_stage_that_fits_is_taken() -> None:
    # A node has no slow network in it: where there is room the lower stages communicate least.
    small = {
        "model": {**LARGE, "num_layers": 4},
        "batch": {"global_rows": 64, "micro_rows": 8},
        "engine": {"activation_checkpointing": True},
        "resources": {"workers": 8, "gpus_per_worker": 1},
    }
    roomy = make_plan(spec_of(**small), parse_shape("1x8xB200"))
    assert roomy.zero_stage in {1, 2}
    assert "is the lowest within 5% of the fastest that fits" in roomy.zero_reason
    tight = make_plan(
        large(engine={"activation_checkpointing": True}),
        parse_shape("2x8x(memory=20GB,tflops=312)"),
    )
    assert tight.zero_stage == 3
    assert "stage 2 would take" in tight.zero_reason


def test_the_reason_for_a_stage_does_not_call_it_the_fastest_where_another_one_is() -> None:
    spec = spec_of(resources={"workers": 2})
    plan = make_plan(spec, LAPTOP)
    seconds = [
        make_plan(spec_of(resources={"workers": 2}, zero={"stage": stage}), LAPTOP).step_seconds
        for stage in range(4)
    ]
    fastest = plan.step_seconds == min(seconds)
    assert fastest == ("is the fastest that fits" in plan.zero_reason)
    assert fastest != ("of the fastest that fits" in plan.zero_reason)


def test_the_stage_and_the_time_follow_the_network() -> None:
    """ZeRO-3 moves half as much again as the lower stages: a slow network makes it dear, a fast one
    hides it."""
    spec = large(engine={"activation_checkpointing": True}, zero={"stage": 3})
    fast, slow = (
        make_plan(spec, parse_shape(f"2x8xB200(network={rate})")) for rate in ("400GB", "1GB")
    )
    assert fast.est_seconds is not None
    assert slow.est_seconds is not None
    assert slow.est_seconds > 2 * fast.est_seconds
    auto = make_plan(
        large(engine={"activation_checkpointing": True}), parse_shape("2x8xB200(network=1GB)")
    )
    assert auto.zero_stage < 3


def test_what_an_optimizer_keeps_is_counted() -> None:
    """Of a Llama in fp32 at stage 0, where the weights themselves are stepped."""

    def plan_of(name: str, **regularization: Any) -> Plan:
        spec = large(
            optimizer={"name": name, "learning_rate": 1e-3},
            resources={"workers": 1},
            regularization=regularization,
            precision="fp32",
        )
        return make_plan(spec, parse_shape("1x1x(memory=1TB,tflops=900)"))

    adamw = plan_of("adamw")
    count = adamw.num_parameters
    kept = {"adamw": 8, "sgd": 4, "lion": 4}
    for name, each in kept.items():
        plan = plan_of(name)
        assert plan.memory.optimizer == each * count
        assert plan.checkpoint_bytes == (4 + each) * count
        averaged = plan_of(name, ema={})
        assert averaged.memory.optimizer == (each + 4) * count
        assert averaged.checkpoint_bytes == (8 + each) * count
    assert plan_of("adafactor").memory.optimizer < 0.01 * count
    assert 2 * count < plan_of("adamw_8bit").memory.optimizer < 4 * count
    assert 4 * count < plan_of("muon").memory.optimizer < 8 * count
    assert adamw.memory.total > plan_of("sgd").memory.total > plan_of("adafactor").memory.total


@pytest.mark.parametrize("name", ["adafactor", "muon", "adamw_8bit"])
def test_what_goes_by_whole_matrices_is_planned_without_zero(name: str) -> None:
    optimizer = {"name": name, "learning_rate": 1e-3}
    plan = make_plan(large(optimizer=optimizer), parse_shape("2x8xH200"))
    assert plan.zero_stage == 0
    assert f"stage 0 as {name} needs it" in plan.zero_reason
    unit = "blocks of whole tensors" if name == "adamw_8bit" else "whole matrices"
    assert any(f"{name} goes by {unit}" in note for note in plan.notes)
    text = refusal(
        large(optimizer=optimizer, batch={"micro_rows": 32}, precision="fp32"),
        parse_shape("2x8xH100"),
    )
    assert "zero.stage" not in text
    assert "offload" not in text


def test_no_plan_takes_a_stage_under_which_an_architecture_is_not_trained_right() -> None:
    model = {"architecture": "openai-gpt", "hidden_size": 64, "num_layers": 2, "num_heads": 4}
    with pytest.raises(PlanError, match=r"zero\.stage = 3: openai-gpt's gradients are wrong"):
        make_plan(spec_of(model=model, zero={"stage": 3}), LAPTOP)
    assert make_plan(spec_of(model=model), LAPTOP).zero_stage < 3


def test_hardware_of_unknown_speed_takes_the_lowest_stage() -> None:
    plan = make_plan(
        spec_of(resources={"workers": 2, "gpus_per_worker": 1}), parse_shape("1x2xunknown")
    )
    assert plan.zero_stage == 0
    assert "the lowest that fits" in plan.zero_reason


def test_higher_stages_and_more_ranks_take_less() -> None:
    shape = parse_shape("64x8xH100")
    by_stage = [
        make_plan(
            spec_of(
                model={**LARGE, "num_layers": 8},
                zero={"stage": stage},
                batch={"global_rows": 64, "micro_rows": 1},
                resources={"workers": 64, "gpus_per_worker": 1},
            ),
            shape,
        ).memory.total
        for stage in range(4)
    ]
    assert all(later < earlier for earlier, later in pairwise(by_stage))
    by_ranks = [
        make_plan(
            large(zero={"stage": 3}, batch={"micro_rows": 1}, resources={"workers": ranks}), shape
        ).memory
        for ranks in (16, 32, 64)
    ]
    assert all(later.optimizer < earlier.optimizer for earlier, later in pairwise(by_ranks))


def test_what_does_not_fit_names_settings_that_do() -> None:
    for spec, shape in (
        (large(), parse_shape("2x8xA10G")),
        (large(), parse_shape("2x8xT4")),
        (large(zero={"stage": 1}, batch={"micro_rows": 16}), parse_shape("2x8xH100")),
        (large(resources={"workers": 1}, zero={"stage": 0}), parse_shape("1x1xH100")),
    ):
        message = refusal(spec, shape)
        assert "would fit: " in message, message
        for way in message.partition("would fit: ")[2].split("; or "):
            if "machines" not in way:
                make_plan(with_overrides(spec, way), shape)  # does not raise


def test_what_can_never_fit_says_so() -> None:
    message = refusal(large(resources={"workers": 1}), parse_shape("1x1x(memory=2GB,tflops=8)"))
    assert "no setting on this hardware would fit it" in message


def test_a_model_with_fewer_layers_is_named_when_nothing_else_helps() -> None:
    spec = spec_of(model={**LARGE, "num_layers": 64}, resources={"workers": 1})
    message = refusal(spec, LAPTOP)
    assert "model.num_layers=" in message
    make_plan(with_overrides(spec, message.partition("would fit: ")[2].partition(";")[0]), LAPTOP)


def test_more_workers_than_the_shape_has() -> None:
    assert "has 8 GPUs" in refusal(large(), parse_shape("1x8xH100"))
    assert "give resources.workers=8" in refusal(large(), parse_shape("1x8xH100"))
    message = refusal(spec_of(resources={"workers": 2, "gpus_per_worker": 1}), LAPTOP)
    assert "has 0 GPUs" in message
    assert "resources.gpus_per_worker=0" in message


def test_workers_must_leave_cpus_for_reading() -> None:
    shape = parse_shape("2xCPU(cpus=4,memory=64GB)")
    message = refusal(spec_of(resources={"workers": 8}), shape)
    assert message.startswith("resources.workers = 8: ")
    assert "1 for reading" in message
    assert "give resources.workers=7" in message
    assert (
        make_plan(spec_of(batch={"global_rows": 28}, resources={"workers": 7}), shape).num_ranks
        == 7
    )
    # Without Ray nobody else reads, and one's own machine may be shared.
    assert make_plan(spec_of(resources={"workers": 8}), shape, with_ray=False).num_ranks == 8
    assert make_plan(spec_of(resources={"workers": 4}), LAPTOP).num_ranks == 4


def test_readers_may_have_the_cpus_of_a_head_that_is_too_small_for_a_worker() -> None:
    spec, node = (
        spec_of(resources={"workers": 1, "cpus_per_worker": 4}),
        parse_shape("1xCPU(cpus=4,memory=64GB)"),
    )
    assert "1 for reading" in refusal(spec, node)
    assert make_plan(spec, node.model_copy(update={"spare_cpus": 1.0})).num_ranks == 1


def test_a_workers_cpus_lie_on_one_node() -> None:
    shape = parse_shape("3xCPU(cpus=4,memory=64GB)")  # 12 CPUs, but only three workers of 3
    assert "give resources.workers=3" in refusal(
        spec_of(resources={"workers": 4, "cpus_per_worker": 3}), shape
    )


def test_an_elastic_group_is_planned_at_what_the_shape_holds() -> None:
    spec = spec_of(resources={"workers": [2, 64]}, batch={"global_rows": 30, "micro_rows": 2})
    plan = make_plan(spec, parse_shape("2xCPU(cpus=4,memory=64GB)"))
    assert plan.num_ranks == 7
    assert plan.batch.padded_rows == 7 * plan.batch.rows_per_rank - 30
    assert any("without targets" in note for note in plan.notes)
    assert make_plan(spec, LAPTOP, num_ranks=3).num_ranks == 3
    assert "2 × 1 for the workers" in refusal(spec, parse_shape("1xCPU(cpus=2,memory=64GB)"))


def test_contradictory_batch_numbers() -> None:
    message = refusal(spec_of(batch={"global_rows": 100, "micro_rows": 16}), LAPTOP)
    assert message.startswith(
        "batch.global_rows = 100: not a multiple of 2 ranks × 16 rows (32); nearest: 96 or 128"
    )
    assert "not a multiple of 2 ranks × 1 row" in refusal(spec_of(batch={"global_rows": 7}), LAPTOP)


@pytest.mark.parametrize(("precision", "shape", "on_gpu", "resolved"), [
    ("auto", "2x1xH100", True, "bf16"), ("auto", "2x1xV100", True, "fp32"),
    ("fp16", "2x1xV100", True, "fp16"), ("auto", "1xCPU(cpus=4,memory=64GB)", False, "fp32"),
    ("auto", "1xCPU(cpus=4,memory=64GB,bf16=1)", False, "bf16"),
    ("bf16", "1xCPU(cpus=4,memory=64GB,bf16=1)", False, "bf16"), ("fp32", "2x1xH100", True, "fp32"),
])  # fmt: skip
def test_precision_is_what_the_hardware_computes_in(
    precision: str, shape: str, on_gpu: bool, resolved: str
) -> None:
    spec = spec_of(precision=precision, resources={"workers": 2, "gpus_per_worker": int(on_gpu)})
    assert make_plan(spec, parse_shape(shape)).precision == resolved


@pytest.mark.parametrize(("precision", "shape", "on_gpu"), [
    ("bf16", "2x1xV100", True), ("bf16", "1xCPU(cpus=4,memory=64GB)", False),
    ("fp16", "1xCPU(cpus=4,memory=64GB)", False),
])  # fmt: skip
def test_precision_that_the_hardware_lacks_is_refused(
    precision: str, shape: str, on_gpu: bool
) -> None:
    spec = spec_of(precision=precision, resources={"workers": 2, "gpus_per_worker": int(on_gpu)})
    message = refusal(spec, parse_shape(shape))
    assert message.startswith(f"precision = {precision}: ")
    assert "precision=fp32" in message


def test_vocabularies_that_disagree_are_refused() -> None:
    with pytest.raises(SpecError, match=r"model\.vocab_size = 4096: the tokeniser has 8192 tokens"):
        make_plan(spec_of(model={"vocab_size": 4096}), LAPTOP)
    with pytest.raises(SpecError, match="the tokeniser has 9000 tokens"):
        make_plan(spec_of(model={"vocab_size": 8192}), LAPTOP, vocab_size=9000)


def test_epochs_wait_for_the_corpus() -> None:
    spec = spec_of(duration={"steps": None, "epochs": 2})
    plan = make_plan(spec, LAPTOP)
    assert plan.num_steps is plan.num_tokens is plan.est_seconds is plan.shard_bytes is None
    assert make_plan(spec, LAPTOP, num_rows=1000).num_steps == 63
    assert "after preparing" in format_plan(plan)


def test_offloading_moves_states_to_the_host() -> None:
    shape = parse_shape("2x8xH100(host_memory=2TB)")
    kept, moved = (
        make_plan(large(zero={"stage": 3, "offload": offload}), shape)
        for offload in ("none", "parameters")
    )
    assert moved.memory.optimizer == moved.memory.parameters == 0
    assert moved.memory.host_bytes > kept.memory.host_bytes
    assert moved.deepspeed["zero_optimization"]["offload_param"]["device"] == "cpu"
    small_host = parse_shape("2x8xH100(host_memory=40GB)")
    assert "of host memory" in refusal(
        large(zero={"stage": 3, "offload": "parameters"}), small_host
    )


def test_compilation_is_chosen_where_it_pays() -> None:
    on_gpu = {"workers": 2, "gpus_per_worker": 1}
    h100 = parse_shape("1x2xH100")
    assert not make_plan(spec_of(), LAPTOP).compile
    assert not make_plan(spec_of(resources=on_gpu), h100).compile
    assert make_plan(spec_of(resources=on_gpu, duration={"steps": 10**6}), h100).compile
    assert make_plan(spec_of(engine={"compile": True}), LAPTOP).compile


def test_compiled_models_keep_less_and_zero_3_is_not_compiled() -> None:
    h100 = parse_shape("1x2xH100")
    sections = {"resources": {"workers": 2, "gpus_per_worker": 1}, "duration": {"steps": 10**6}}
    plans = {
        stage: make_plan(spec_of(**sections, zero={"stage": stage}), h100) for stage in (1, 2, 3)
    }
    assert [plan.compile for plan in plans.values()] == [True, True, False]
    eager = make_plan(spec_of(**sections, zero={"stage": 1}, engine={"compile": False}), h100)
    assert plans[1].memory.activations < eager.memory.activations
    assert plans[1].step_seconds < eager.step_seconds
    asked = make_plan(spec_of(**sections, zero={"stage": 3}, engine={"compile": True}), h100)
    assert asked.compile
    assert any("ZeRO 3's hooks" in note for note in asked.notes)


def test_notes_name_what_is_odd() -> None:
    def notes(spec: Spec, shape: Shape) -> str:
        return " ".join(make_plan(spec, shape).notes)

    assert "4 workers share 2 CPUs" in notes(spec_of(resources={"workers": 4}), LAPTOP)
    late = spec_of(regularization={"swa": {"first_step": 101}})
    assert "swa.first_step = 101: the run has 100 steps" in notes(late, LAPTOP)
    assert "run on its CPUs" in notes(spec_of(precision="fp32"), parse_shape("1x8xH100"))
    assert "are estimates" in notes(spec_of(model={"architecture": "olmo"}), LAPTOP)
    gpus = {"workers": 2, "gpus_per_worker": 1}
    assert "was not checked" in notes(spec_of(resources=gpus), parse_shape("1x2xunknown"))
    assert "offloading saves nothing" in notes(spec_of(zero={"offload": "optimizer"}), LAPTOP)


@settings(max_examples=60, deadline=None)
@given(ranks=st.integers(1, 16), global_rows=st.integers(1, 300), elastic=st.booleans())
def test_the_micro_batch_is_found_or_the_batch_refused(
    ranks: int, global_rows: int, elastic: bool
) -> None:
    spec = spec_of(
        batch={"global_rows": global_rows}, resources={"workers": [1, ranks] if elastic else ranks}
    )
    roomy = LAPTOP.model_copy(update={"memory_bytes_per_node": 10**13})
    if not elastic and global_rows % ranks:
        refusal(spec, roomy)
        return
    batch = make_plan(spec, roomy).batch
    assert (
        batch.num_ranks * batch.micro_rows * batch.accumulation == global_rows + batch.padded_rows
    )
    assert batch.padded_rows < ranks


def test_planning_takes_milliseconds() -> None:
    spec, shape = large(), parse_shape("2x8xH100")
    make_plan(spec, shape)
    begun = time.perf_counter()
    for _ in range(20):
        make_plan(spec, shape)
    assert (time.perf_counter() - begun) / 20 < 0.05


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys; from dray.plan import *; from dray.spec import load_spec; import "
        "dray.rank.schedule\n"
        "format_plan(make_plan(load_spec('quickstart'), local_shape()))\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'pyarrow', 'deepspeed', 'numpy') if m "
        "in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_table_names_what_matters() -> None:
    text = format_plan(make_plan(large(), parse_shape("2x8xH100")))
    for word in (
        "2x8xH100",
        "ZeRO",
        "the fastest that fits",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "fits",
        "strict",
        "loose",
        "tokens/s",
        "checkpoint",
        "host",
    ):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120


def test_units() -> None:
    assert [format_bytes(n) for n in (999, 1500, 2.5e6, 999.6e6, 1.234e9, 5e13)] == [
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "1,000 MB",
        "1.23 GB",
        "50 TB",
    ]
    assert [format_seconds(n) for n in (5, 89, 120, 5400, 90_000, 200_000)] == [
        "5 s",
        "89 s",
        "2 min",
        "1 h 30 min",
        "25 h 0 min",
        "2 d 7 h",
    ]


def test_a_row_of_several_sequences_takes_the_work_of_as_many() -> None:
    """A model that is given two sequences of each row."""

    class Twice(type(spec_of().task)):  # type: ignore[misc]
        head = replace(spec_of().task.head, sequences=2)

    once, twice = (
        make_plan(
            spec_of(batch={"micro_rows": 4}).model_copy(update={"task": task}),
            LAPTOP,
            num_ranks=2,
        )
        for task in (spec_of().task, Twice())
    )
    assert twice.flops_per_token_strict == 2 * once.flops_per_token_strict
    assert twice.flops_per_token_loose == 2 * once.flops_per_token_loose
    assert twice.memory.activations_kept > 1.5 * once.memory.activations_kept
