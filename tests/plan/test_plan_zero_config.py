"""The DeepSpeed configuration against DeepSpeed's own parser: every key is known, every combination
is accepted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from dray.plan.zero_config import grad_accumulation_bytes, make_buckets, make_deepspeed_config

STAGES = (0, 1, 2, 3)
OFFLOADS = {"none": 0, "optimizer": 1, "parameters": 3}
CASES = [
    (stage, offload, precision, accumulation, on_gpu)
    for stage, offload, precision, accumulation, on_gpu in itertools.product(
        STAGES, OFFLOADS, ("fp32", "bf16", "fp16"), (1, 4), (False, True)
    )
    if stage >= OFFLOADS[offload]
]


def config_of(
    stage: int,
    offload: str = "none",
    precision: Any = "bf16",
    accumulation: int = 1,
    *,
    on_gpu: bool = False,
    clip: float | None = 1.0,
) -> dict[str, Any]:
    return make_deepspeed_config(
        stage,
        offload,
        micro_rows=2,
        accumulation=accumulation,
        precision=precision,
        clip_grad_norm=clip,
        buckets=make_buckets(10_001, 1_000, on_gpu=on_gpu),
        on_gpu=on_gpu,
    )


@pytest.mark.parametrize(("stage", "offload", "precision", "accumulation", "on_gpu"), CASES)
def test_deepspeed_accepts_every_combination(
    stage: int, offload: str, precision: str, accumulation: int, on_gpu: bool
) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = config_of(stage, offload, precision, accumulation, on_gpu=on_gpu)
    parsed = DeepSpeedConfig(config)
    section = parsed.zero_config
    known = set(DeepSpeedZeroConfig.model_fields) | {
        f.alias for f in DeepSpeedZeroConfig.model_fields.values()
    }
    assert set(config["zero_optimization"]) <= known
    assert int(section.stage) == stage
    assert parsed.gradient_clipping == 1.0
    assert parsed.train_batch_size == 2 * accumulation
    assert parsed.bfloat16_config.enabled == (precision == "bf16")
    assert parsed.float16_config.enabled == (precision == "fp16")
    assert parsed.zero_allow_untested_optimizer
    assert not parsed.zero_force_ds_cpu_optimizer
    if stage:
        assert (
            section.reduce_bucket_size == section.allgather_bucket_size == 10_002
        )  # even, and no more than the model
        assert (section.offload_optimizer is not None) == (offload != "none")
    if stage == 3:
        assert section.max_live_parameters == section.max_reuse_distance == 10_002
        assert section.prefetch_bucket_size == 1_000
        assert section.param_persistence_threshold == 100_000
        assert (section.offload_param is not None) == (offload == "parameters")


def test_gradients_add_up_in_fp32_where_deepspeed_can() -> None:
    def dtype(*arguments: Any) -> Any:
        return config_of(*arguments).get("data_types", {}).get("grad_accum_dtype")

    assert [dtype(stage, "none", "bf16", 4) for stage in STAGES] == [None, None, "fp32", "fp32"]
    assert [dtype(stage, "none", "bf16", 1) for stage in STAGES] == [None] * 4
    assert [dtype(stage, "none", "fp32", 4) for stage in STAGES] == [None] * 4
    assert grad_accumulation_bytes(2, 4, "bf16") == 4
    assert grad_accumulation_bytes(1, 4, "bf16") == 2


def test_no_clipping_is_zero() -> None:
    assert config_of(1, clip=None)["gradient_clipping"] == 0.0


def test_neither_optimiser_nor_total_batch_is_written() -> None:
    assert not {"optimizer", "scheduler", "train_batch_size"} & set(config_of(3))


def test_buckets_are_bounded_by_model_and_hardware() -> None:
    small, large, huge = (
        make_buckets(size, size // 32, on_gpu=True) for size in (10**6, 10**9, 10**11)
    )
    assert small.reduce == small.live == 10**6
    assert large.reduce == huge.reduce == 50_000_000
    assert large.live < 10**9
    assert huge.live >= 3 * 10**11 // 32
    assert make_buckets(10**9, 10**7, on_gpu=False).reduce < large.reduce
