"""How long a step takes, by what ZeRO does with it: computing, communication that nothing hides,
and the update.

The rates are the hardware's nominal ones, so that a plan stays a pure function of the spec and the
shape: good for comparing ZeRO stages, a first estimate of the time. A run measures its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from dray.plan.flops import flops_per_token_strict
from dray.plan.hardware import Precision, Shape
from dray.plan.memory import Load

# Shares of the peak that training reached, as measured: a Llama of 1B parameters in bf16 on an H200
# (fp16 and fp32 on GPUs: assumed), compiled and not; CPUs.
USUAL_SHARE_GPU = {"bf16": 0.40, "fp16": 0.40, "fp32": 0.60}
COMPILED_SHARE_GPU = {"bf16": 0.52, "fp16": 0.52, "fp32": 0.65}
USUAL_SHARE_CPU = {"bf16": 0.22, "fp16": 0.01, "fp32": 0.55}
START_SECONDS = 15.0
COMPILE_SECONDS = 25.0
# Bytes a second of a rank: what a core reads and writes beside the others, and what gloo moves
# between processes.
CPU_MEMORY_RATE, CPU_LINK_RATE = 8e9, 1e9
HOST_MEMORY_RATE = 10e9
GPU_MEMORY_RATE, GPU_LINK_RATE = 500e9, 25e9
"""Of cards that do not tell theirs."""
LINK_SHARE = 0.7
"""What collectives reach of a link's bandwidth."""
HIDDEN_SHARE = 2 / 3
"""Of a micro batch's computing, what reductions can hide behind: the backward pass."""
CPU_COPY_RATE = 1.4e9
"""Bytes a second of a copy into memory that is new to the process, as measured."""
ROW_GRADIENT_PASSES = 4
"""Over a row's gradient, where each is measured and added by itself: as was timed on a CPU."""
CALLS_A_SECOND = 2000.0
"""Calls of all ranks together that an actor takes without being busy with it."""
WRITE_RATE = 400e6
"""Bytes a second in which a rank hashes and writes its part of a checkpoint, and reads it back,
where nothing was measured: a thread on a local disk. A shared file system may be slower."""
GATHER_OVERHEAD = 0.10
"""What ZeRO-3's hooks add to computing."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser update by what they are spent on."""

    compute: float
    communication: float
    """Beyond what overlaps with computing."""
    update: float

    @property
    def total(self) -> float:
        return self.compute + self.communication + self.update


def peak_flops_per_rank(
    shape: Shape, precision: Precision, *, on_gpu: bool, cpus_per_worker: float, num_ranks: int
) -> float | None:
    """Dense FLOP/s of what a rank computes on; None where the hardware's figures are unknown."""
    if on_gpu:
        card = shape.accelerator
        return None if card is None else card.fp32_flops if precision == "fp32" else card.half_flops
    core = shape.cpu_core_fp32_flops if precision == "fp32" else shape.cpu_core_bf16_flops
    # Workers that share a core get a part of it.
    cores = min(cpus_per_worker, shape.num_cpus / num_ranks)
    return None if core is None else core * cores


def step_time(load: Load, shape: Shape, peak_flops: float) -> StepTime:
    """The time of a step on ranks of `peak_flops` each. Recomputing activations repeats the forward
    pass: a third more.

    With f = (ranks - 1) / ranks a ring moves f bytes for each byte that is gathered or scattered,
    2·f for one that is summed. Stages 0 and 1 communicate after the last backward pass; stage 2
    reduces at each micro batch, beside the backward pass on GPUs; stage 3 also gathers the
    parameters in both passes.
    """
    passes = 4 / 3 if load.checkpointing else 1.0
    flops = passes * flops_per_token_strict(load.sizes, load.count, load.row_tokens)
    on_gpu = COMPILED_SHARE_GPU if load.compiled else USUAL_SHARE_GPU
    share = (on_gpu if load.on_gpu else USUAL_SHARE_CPU)[load.precision]
    micro = load.micro_rows * load.row_tokens * flops / (peak_flops * share)
    if load.stage == 3:
        micro *= 1 + GATHER_OVERHEAD
    if load.row_by_row:
        added = ROW_GRADIENT_PASSES * 4 * load.count.trained / _memory_rate(load, shape)
        micro += load.micro_rows * added
    return StepTime(
        compute=load.accumulation * micro,
        communication=_communication(load, shape, micro),
        update=_update(load, shape),
    )


def hold_seconds(num_bytes: float, num_ranks: int, *, on_gpu: bool) -> float:
    """For how long a save holds training up: all ranks hand their records in, to one actor, and
    each copies its part of so many bytes into host memory."""
    copied = num_bytes / (GPU_LINK_RATE if on_gpu else CPU_COPY_RATE)
    return num_ranks / CALLS_A_SECOND + copied


def write_seconds(num_bytes: float) -> float:
    """How long a rank writes its part of a checkpoint, or reads it."""
    return num_bytes / WRITE_RATE


def _communication(load: Load, shape: Shape, micro_seconds: float) -> float:
    """Seconds that nothing hides. `micro_seconds`: the computing of one micro batch."""
    ring = (load.num_ranks - 1) / load.num_ranks
    rate = ring / _link_rate(load, shape)
    once = load.element_bytes * load.count.trained * rate
    if load.stage < 2:
        return 2 * once  # a sum over all; or, at stage 1, reduced to the owners and gathered again
    hidden = HIDDEN_SHARE * micro_seconds if load.on_gpu else 0.0
    if load.stage == 2:
        return load.accumulation * max(0.0, once - hidden) + once
    moved = once + 2 * load.whole_bytes * rate
    return load.accumulation * max(0.0, moved - (micro_seconds if load.on_gpu else 0.0))


def _update(load: Load, shape: Shape) -> float:
    """The optimiser reads a gradient, reads and writes master and states; half precision writes
    the weights besides."""
    owned = load.count.trained if load.stage == 0 else load.share
    stepped = 4 + 2 * (4 + load.state_bytes)
    traffic = (stepped if load.precision == "fp32" else stepped + 4) * owned
    if load.on_gpu and load.offload != "none":
        return traffic / HOST_MEMORY_RATE
    return traffic / _memory_rate(load, shape)


def _memory_rate(load: Load, shape: Shape) -> float:
    if not load.on_gpu:
        return CPU_MEMORY_RATE
    card = shape.accelerator
    return (card and card.memory_bytes_per_second) or GPU_MEMORY_RATE


def _link_rate(load: Load, shape: Shape) -> float:
    """Bytes a second of the slowest link in a ring over all ranks."""
    if not load.on_gpu:
        return (
            min(CPU_LINK_RATE, shape.network_bytes_per_second)
            if load.num_ranks > 1
            else CPU_LINK_RATE
        )
    card = shape.accelerator
    within = (card and card.link_bytes_per_second) or GPU_LINK_RATE
    several_nodes = load.num_ranks > load.ranks_per_node
    return LINK_SHARE * (min(within, shape.network_bytes_per_second) if several_nodes else within)
