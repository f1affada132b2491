"""Peak memory of a rank, term by term, and what a node's host memory must hold.

A step has four moments that may be its peak: the loss (all activations, and a chunk of logits), the
end of the backward pass (gradients), their reduction, and the optimiser's step. Each is summed; the
terms of the greatest are the plan. The arithmetic follows DeepSpeed's sources and transformers'
eager layers; `docs/plan.md` compares it with measured peaks. It counts no memory that other
programs hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from pydantic import BaseModel, ConfigDict

from dray.plan.activations import (
    checkpoint_bytes_per_token,
    layer_bytes_per_token,
    layer_working_bytes_per_token,
)
from dray.plan.hardware import Precision
from dray.plan.parameters import Dimensions, ParameterCount
from dray.plan.zero_config import Buckets, grad_accumulation_bytes, overlaps

# What a rank holds besides the terms below: torch, deepspeed, transformers, a model's code, and
# what the first steps touch of them. Fitted to peaks: of plain processes that import these 520 to
# 600 MB, and of forks under Ray, which have ray.train and ray.data besides, 420 to 620.
CPU_FRAMEWORK_BYTES = 530_000_000
# CUDA context, cuBLAS and the NCCL of one rank, measured on an H200; what more ranks take of NCCL
# is as commonly reported.
GPU_FRAMEWORK_BYTES, NCCL_BYTES = 1_800_000_000, 700_000_000
GPU_HOST_PROCESS_BYTES = 4_000_000_000
# Share of the activations that the allocator holds unused. glibc: fitted to measurements; GPUs: of
# all that comes and goes, measured with segments that can grow (`processes/heap.py`).
CPU_SLACK, GPU_SLACK = 0.45, 0.02
MASTER_BYTES = 4
"""Of a parameter in fp32, as the optimiser steps it and a checkpoint holds it."""
PACKED_BYTES = 0.57
"""Of a parameter in 4 bits, with the scale of each 64."""
READER_BYTES = 1_500_000_000
# Bytes of fp32 logits that the loss holds at a time. On a CPU a chunk should stay near the caches
# (4 to 16 MB were equally fast, the whole of a step slower by a quarter); a GPU's matrix product
# wants thousands of rows (bench/gpu/loss_arms.py).
CPU_LOSS_CHUNK, GPU_LOSS_CHUNK = 16_000_000, 1_000_000_000


WORKING_TENSORS = 3
"""As large as the largest one that is kept, that come and go beside each other in the backward pass
of a layer: its gradient, that of its input, and one on the way."""


def loss_chunk_bytes(on_gpu: bool) -> int:
    """How many bytes of logits in fp32 the loss may hold at a time."""
    return GPU_LOSS_CHUNK if on_gpu else CPU_LOSS_CHUNK


MEMORY_TERMS = (
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
"""The parts of a MemoryPlan's total."""


class MemoryPlan(BaseModel):
    """Bytes of one rank at its peak, by term, and of a node's host."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    checkpoint: int
    """The copy that is being written while training goes on; on a GPU it is in host memory."""
    framework: int
    allocator: int
    """Freed memory that the allocator keeps."""
    total: int
    peak: str
    """When: loss, backward, reduce or step."""
    host_bytes: int
    """Host memory of a node: its ranks' processes, offloaded states and the readers."""
    activations_kept: int
    """Activations of a micro batch when all are kept."""
    activations_checkpointed: int
    """Activations when blocks are recomputed."""


@dataclass(frozen=True)
class Load:
    """What decides the memory of a rank."""

    sizes: Dimensions
    count: ParameterCount
    precision: Precision
    stage: int
    offload: str
    num_ranks: int
    ranks_per_node: int
    micro_rows: int
    accumulation: int
    sequence_tokens: int
    checkpointing: bool
    dropout: float
    buckets: Buckets
    on_gpu: bool
    with_ray: bool
    row_tokens: int
    """Of a row on average, padding included. Times go by this, peaks by `sequence_tokens`."""
    state_bytes: float
    """What the optimiser and hooks keep for a parameter, on average."""
    working_copies: int
    """Copies in fp32 of what is updated at once that come and go in an update."""
    compiled: bool = False
    kept_passes: int = 1
    """Forward passes of a micro batch whose activations are kept at once."""
    row_by_row: bool = False
    """Whether each row goes through the model alone, and its gradient is added to a sum."""

    @property
    def element_bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2

    @property
    def rows_at_once(self) -> int:
        return 1 if self.row_by_row else self.micro_rows

    @property
    def tokens(self) -> int:
        return self.rows_at_once * self.sequence_tokens * self.sizes.head.sequences

    @property
    def share(self) -> int:
        """Trained parameters in a rank's part."""
        return -(-self.count.trained // self.num_ranks)

    @property
    def whole_bytes(self) -> int:
        """Of all parameters as the passes use them."""
        packed = self.count.packed
        return self.element_bytes * (self.count.total - packed) + int(PACKED_BYTES * packed)

    @property
    def checkpoint_bytes(self) -> int:
        """Of a rank's part of a checkpoint."""
        return int((MASTER_BYTES + self.state_bytes) * self.share)


@dataclass(frozen=True)
class _Moment:
    """Terms in bytes at one moment of a step; `lasting` are those that stay between steps."""

    name: str
    parameters: int
    optimizer: int
    gradients: int = 0
    activations: int = 0
    logits: int = 0
    buffers: int = 0
    lasting: int = field(default=0)

    @property
    def total(self) -> int:
        return (
            self.parameters
            + self.optimizer
            + self.gradients
            + self.activations
            + self.logits
            + self.buffers
        )


def make_memory(load: Load) -> MemoryPlan:
    """The peak of one rank, in bytes by term."""
    peak = max(_moments(load), key=lambda moment: moment.total)
    framework = _framework_bytes(load)
    slack = int(GPU_SLACK * (peak.total - peak.lasting)) if load.on_gpu else _heap_bytes(load)
    checkpoint = 0 if load.on_gpu else load.checkpoint_bytes
    total = peak.total + checkpoint + framework + slack
    kept, checkpointed = (
        _activation_bytes(replace(load, checkpointing=way)) for way in (False, True)
    )
    return MemoryPlan(
        parameters=peak.parameters,
        gradients=peak.gradients,
        optimizer=peak.optimizer,
        activations=peak.activations,
        logits=peak.logits,
        buffers=peak.buffers,
        checkpoint=checkpoint,
        framework=framework,
        allocator=slack,
        total=total,
        peak=peak.name,
        host_bytes=_host_bytes(load, total),
        activations_kept=kept,
        activations_checkpointed=checkpointed,
    )


def logits_bytes(load: Load) -> int:
    """In the loss: a chunk's logits, their softmax in fp32 and its gradient, beside the gradients
    of hidden states and head, which are made with it. What fits into a chunk takes torch's own way,
    which holds all of it three times. A head that is more than a projection has the logits of its
    share of the tokens as a whole, and their gradient."""
    head = load.sizes.head
    if head.over == "hidden":  # the vectors of rows
        return load.rows_at_once * load.sizes.hidden * 12
    if head.over == "labels":
        each = load.tokens if head.each == "token" else load.rows_at_once
        return each * load.sizes.num_labels * 12
    vocab, hidden, element = load.sizes.vocab, load.sizes.hidden, load.element_bytes
    chunk_tokens = max(1, loss_chunk_bytes(load.on_gpu) // (4 * vocab))
    share = 1.0 if load.stage == 3 else head.share
    tokens = math.ceil(load.tokens * share)
    if tokens <= chunk_tokens:
        return tokens * vocab * (8 + element)
    softmax = 0 if load.on_gpu else 4  # there the gradient is made in one pass over the logits
    once = element if load.precision == "fp32" and not load.on_gpu else 2 * element
    chunk = chunk_tokens * vocab * (softmax + once)
    if head.looks_ahead:
        return chunk + 2 * tokens * vocab * element
    return chunk + 4 * vocab * hidden + tokens * hidden * element


def _activation_bytes(load: Load) -> int:
    return load.kept_passes * _activation_bytes_of_a_pass(load)


def _activation_bytes_of_a_pass(load: Load) -> int:
    if load.sizes.row is not None:
        return load.rows_at_once * load.sizes.row.elements * load.element_bytes
    one_block = layer_bytes_per_token(
        load.sizes,
        load.element_bytes,
        load.dropout,
        load.sequence_tokens,
        on_gpu=load.on_gpu,
        compiled=load.compiled and load.on_gpu,
    )
    if load.checkpointing:
        inputs = load.sizes.layers * checkpoint_bytes_per_token(load.sizes, load.element_bytes)
        return load.tokens * (inputs + one_block)
    ends = 4 * load.sizes.hidden * load.element_bytes
    return load.tokens * (load.sizes.layers * one_block + ends)


def _moments(load: Load) -> list[_Moment]:
    parameters, optimizer = _parameter_bytes(load), _optimizer_bytes(load)
    standing_gradients, standing_buffers = _standing(load)
    accumulated = _accumulated_gradient_bytes(load)
    # A row's gradient, beside the sum of those before it, in fp32.
    trained = load.count.trained if load.row_by_row else 0
    one_row, summed = load.element_bytes * trained, 4 * trained
    base = _Moment(
        "", parameters, optimizer, gradients=standing_gradients, buffers=standing_buffers
    )
    base = replace(base, lasting=base.total)
    gathered = _gathered_bytes(load)
    activations = _activation_bytes(load)
    working = load.tokens * layer_working_bytes_per_token(load.sizes, load.element_bytes)
    if load.sizes.row is not None:
        working = load.rows_at_once * WORKING_TENSORS * load.sizes.row.largest * load.element_bytes
    bucket, copies, whole = _reduction_bytes(load)
    embedding = load.element_bytes * min(load.sizes.vocab * load.sizes.hidden, load.count.trained)
    return [
        replace(
            base,
            name="loss",
            activations=activations,
            logits=logits_bytes(load),
            gradients=base.gradients + accumulated + summed,
            buffers=base.buffers + gathered,
        ),
        replace(
            base,
            name="backward",
            activations=working,
            gradients=base.gradients + max(accumulated, whole, one_row) + embedding + summed,
            buffers=base.buffers + gathered + (bucket + copies if load.stage >= 2 else 0),
        ),
        replace(
            base,
            name="reduce",
            gradients=base.gradients + max(accumulated, whole),
            buffers=base.buffers + bucket + copies + (gathered if load.stage == 3 else 0),
        ),
        replace(
            base, name="step", gradients=base.gradients + _step_bytes(load), buffers=base.buffers
        ),
    ]


def _parameter_bytes(load: Load) -> int:
    """What the forward pass uses: whole, or a part under ZeRO-3 (small tensors stay whole)."""
    if load.stage < 3:
        return load.whole_bytes
    return 0 if load.offload == "parameters" else load.whole_bytes // load.num_ranks


def _optimizer_bytes(load: Load) -> int:
    """What the optimiser and hooks keep, and the fp32 master weights, where they are not the
    parameters themselves."""
    if load.offload != "none" and load.on_gpu:
        return 0
    owned = load.count.trained if load.stage == 0 else load.share
    # In fp32, ZeRO-0 and ZeRO-3 step the parameters themselves; ZeRO-1 and 2 keep a copy of their
    # part.
    master = (
        0
        if load.precision == "fp32" and load.stage in (0, 3) and load.offload == "none"
        else MASTER_BYTES
    )
    return int((load.state_bytes + master) * owned)


def _standing(load: Load) -> tuple[int, int]:
    """(gradient partition, bucket) that ZeRO-3 allocates once."""
    if load.stage < 3:
        return 0, 0
    width = grad_accumulation_bytes(load.stage, load.accumulation, load.precision)
    on_host = load.offload != "none" and load.on_gpu
    return 0 if on_host else width * load.share, load.element_bytes * load.buckets.reduce


def _accumulated_gradient_bytes(load: Load) -> int:
    """Gradients of earlier micro batches that are there while the next one is computed."""
    if load.accumulation == 1 or load.stage == 3:
        return 0
    width = grad_accumulation_bytes(load.stage, load.accumulation, load.precision)
    if load.stage == 2:
        return 0 if load.offload != "none" and load.on_gpu else width * load.share
    return load.element_bytes * load.count.trained


def _gathered_bytes(load: Load) -> int:
    """Whole parameters that ZeRO-3 holds during the passes, beyond the rank's own part."""
    if load.stage < 3:
        return 0
    live = max(load.buckets.live, load.count.largest) + load.buckets.prefetch
    return load.element_bytes * min(load.count.total, live)


def _reduction_bytes(load: Load) -> tuple[int, int, int]:
    """(buckets, flattened copies of what is being reduced, gradients that are there as a whole)"""
    element, trained = load.element_bytes, load.count.trained
    largest = min(load.count.largest, trained)
    if load.stage == 0:
        flat = element * min(trained, 500_000_000)
        return 0, flat if load.num_ranks > 1 else 0, element * trained
    bucket = element * load.buckets.reduce
    if load.stage == 3:
        return 0, max(bucket, element * largest), element * largest
    # A tensor larger than the bucket is reduced by itself, and copied as a whole.
    copy = element * max(load.buckets.reduce, largest)
    buckets = bucket * (2 if overlaps(load.stage, on_gpu=load.on_gpu) else 1)
    own = 0 if load.offload != "none" and load.on_gpu else element * load.share
    return (
        buckets,
        copy,
        own + (element * trained if load.stage == 1 else element * largest),
    )


def _step_bytes(load: Load) -> int:
    """Gradients while the optimiser steps: the accumulated part, and its flat fp32 copy; and what
    the optimiser itself needs for what it steps at once."""
    if load.offload != "none" and load.on_gpu:
        return 0
    width = grad_accumulation_bytes(load.stage, load.accumulation, load.precision)
    working = 4 * load.working_copies
    if load.stage == 0:
        return (
            load.element_bytes * load.count.trained
            + (0 if load.precision == "fp32" else 8 * load.count.trained)
            + working * min(load.count.largest, load.count.trained)
        )
    if load.stage == 3:
        return (4 + working) * min(load.share, load.buckets.sub_group)
    return (width + 4 + working) * load.share


def _heap_bytes(load: Load) -> int:
    """What glibc's heap holds of freed blocks: a share of the activations, and whole tensors of the
    parameters' sizes.

    Those are the last step's gradients and, with ZeRO, the parameters as they were before they
    moved into flat buffers; ZeRO-3 gathers and frees them once more. Ranks let their heap keep what
    it frees (process.py), and the copy for a checkpoint lies there first.
    """
    times = {0: 1, 1: 2, 2: 2, 3: 3}[load.stage]
    tensors = times * load.element_bytes * load.count.total
    return int(CPU_SLACK * _activation_bytes(load)) + max(0, tensors - load.checkpoint_bytes)


def _framework_bytes(load: Load) -> int:
    if load.on_gpu:
        return GPU_FRAMEWORK_BYTES + (NCCL_BYTES if load.num_ranks > 1 else 0)
    return CPU_FRAMEWORK_BYTES


def _host_bytes(load: Load, total: int) -> int:
    """Bytes of host memory on one node."""
    readers = READER_BYTES if load.with_ray else 0
    if not load.on_gpu:
        return load.ranks_per_node * total + readers
    on_host = load.checkpoint_bytes
    if (
        load.offload != "none"
    ):  # master weights, states, fp32 gradients, and a copy in the compute type
        on_host += int((8 + load.state_bytes + load.element_bytes) * load.share)
    if load.offload == "parameters":
        on_host += load.whole_bytes // load.num_ranks
    return load.ranks_per_node * (GPU_HOST_PROCESS_BYTES + on_host) + readers
