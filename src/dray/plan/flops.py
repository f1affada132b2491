"""FLOPs a token (forward and backward), FLOPs of a card or core, and the time that follows.

Two counts, because papers use both: the loose one multiplies every parameter and whole attention squares, the strict
one only what is multiplied. Times are estimates from a usual share of the peak; a run measures its own.
"""

from __future__ import annotations

from dray.plan.hardware import Precision, Shape
from dray.plan.parameters import Dimensions, ParameterCount

# Shares of the peak that training reached: GPUs as published for dense models; CPUs as measured.
USUAL_SHARE_GPU = {"bf16": 0.40, "fp16": 0.40, "fp32": 0.60}
USUAL_SHARE_CPU = {"bf16": 0.22, "fp16": 0.01, "fp32": 0.55}
START_SECONDS = 15.0
COMPILE_SECONDS = 25.0


def flops_per_token_loose(sizes: Dimensions, count: ParameterCount, sequence_tokens: int) -> float:
    """6·N_total + 12·L·d·T."""
    return 6.0 * count.total + 12.0 * sizes.layers * sizes.heads * sizes.head_dim * sequence_tokens


def flops_per_token_strict(sizes: Dimensions, count: ParameterCount, sequence_tokens: int) -> float:
    """6·(N_nonembedding + head) + 6·L·d·T; models that look both ways multiply the whole square, 12·L·d·T."""
    square = 6.0 if sizes.causal else 12.0
    # A classifier's head sees one token of a row: nothing, next to the others.
    head = count.head if sizes.task == "causal_lm" else 0
    return 6.0 * (count.body + head) + square * sizes.layers * sizes.heads * sizes.head_dim * sequence_tokens


def peak_flops_per_rank(shape: Shape, precision: Precision, *, on_gpu: bool, cpus_per_worker: float,
                        num_ranks: int) -> float | None:
    """Dense FLOP/s of what a rank computes on; None where the hardware's figures are unknown."""
    if on_gpu:
        card = shape.accelerator
        return None if card is None else card.fp32_flops if precision == "fp32" else card.half_flops
    core = shape.cpu_core_fp32_flops if precision == "fp32" else shape.cpu_core_bf16_flops
    # Workers that share a core get a part of it.
    cores = min(cpus_per_worker, shape.num_cpus / num_ranks)
    return None if core is None else core * cores


def training_seconds(num_tokens: int, flops_per_token: float, peak_flops: float, num_ranks: int, *,
                     precision: Precision, on_gpu: bool, recompute: bool) -> float:
    """Seconds for so many tokens. Recomputing activations repeats the forward pass: a third more."""
    share = (USUAL_SHARE_GPU if on_gpu else USUAL_SHARE_CPU)[precision]
    return num_tokens * flops_per_token * (4 / 3 if recompute else 1.0) / (peak_flops * share * num_ranks)
