"""The DeepSpeed configuration: the one place where ZeRO's settings are decided.

The optimiser and the learning rate are the engine's, so no optimizer or scheduler section is
written. There is no train_batch_size either: DeepSpeed multiplies it out itself, so that one plan
serves an elastic group at any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dray.plan.hardware import Precision

# Elements. DeepSpeed's own default of 5e8 would cost 1 GB in bf16, twice that when it overlaps.
GPU_BUCKET, CPU_BUCKET = 50_000_000, 10_000_000
PERSISTENT = 100_000
LIVE = 100_000_000
SUB_GROUP = 200_000_000


@dataclass(frozen=True)
class Buckets:
    """Sizes of DeepSpeed's buffers, in elements."""

    reduce: int
    """Gradients are gathered and reduced this many at a time."""
    prefetch: int
    """ZeRO-3 fetches this many parameters ahead."""
    live: int
    """ZeRO-3 keeps this many whole parameters before it releases some."""
    sub_group: int
    """ZeRO-3 steps the optimiser on this many elements at a time."""


def make_buckets(num_parameters: int, layer_parameters: int, *, on_gpu: bool) -> Buckets:
    """Buffers no larger than the model has use for; live parameters hold at least three blocks."""
    even = num_parameters + num_parameters % 2
    reduce = min(even, GPU_BUCKET if on_gpu else CPU_BUCKET)
    return Buckets(
        reduce=reduce,
        prefetch=min(reduce, max(1, layer_parameters)),
        live=min(even, max(LIVE, 3 * layer_parameters)),
        sub_group=min(even, SUB_GROUP),
    )


def make_deepspeed_config(
    stage: int,
    offload: str,
    *,
    micro_rows: int,
    accumulation: int,
    precision: Precision,
    clip_grad_norm: float | None,
    buckets: Buckets,
    on_gpu: bool,
) -> dict[str, Any]:
    """What `deepspeed.initialize(config=…)` takes. Sizes in elements, rows a rank."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_rows,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_grad_norm or 0.0,
        "zero_optimization": _zero_section(stage, offload, buckets, on_gpu=on_gpu),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # A norm that is not finite is the guarded optimiser's business, which asks on the device.
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": False},
        "fp16": {
            "enabled": precision == "fp16",
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 1,
            "min_loss_scale": 1,
        },  # as without ZeRO, where DeepSpeed knows no hysteresis
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }
    accumulates_in_fp32 = (
        grad_accumulation_bytes(stage, accumulation, precision) == 4 and precision != "fp32"
    )
    if accumulates_in_fp32:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def grad_accumulation_bytes(stage: int, accumulation: int, precision: Precision) -> int:
    """Bytes of an accumulated gradient's element.

    Sums over several micro batches are kept in fp32 where DeepSpeed can: under ZeRO 2 and 3. At
    stage 0 it refuses another type than the model's; at stage 1, in bf16, it would take an
    optimiser that holds all gradients in fp32.
    """
    if precision == "fp32":
        return 4
    return 4 if stage >= 2 and accumulation > 1 else 2


def _zero_section(stage: int, offload: str, buckets: Buckets, *, on_gpu: bool) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": stage}
    if stage == 0:
        return section
    section |= {
        "reduce_bucket_size": buckets.reduce,
        "allgather_bucket_size": buckets.reduce,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": overlaps(stage, on_gpu=on_gpu),
    }
    if offload != "none":
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if stage == 3:
        section |= {
            "stage3_prefetch_bucket_size": buckets.prefetch,
            "stage3_param_persistence_threshold": PERSISTENT,
            "stage3_max_live_parameters": buckets.live,
            "stage3_max_reuse_distance": buckets.live,
            "sub_group_size": buckets.sub_group,
        }
        if offload == "parameters":
            section["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    return section


def overlaps(stage: int, *, on_gpu: bool) -> bool:
    """Whether reduction overlaps the backward pass, which takes a second bucket; a CPU has no
    streams for it."""
    return on_gpu and stage >= 2
