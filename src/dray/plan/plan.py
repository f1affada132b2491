"""The plan: what a run will take on given hardware, as a pure function of the spec, the shape and
the corpus' size.

What does not fit is refused here, before anything is written, with the nearest settings that would.
It imports neither torch nor ray, and answers in milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict

from dray.errors import PlanError, SpecError
from dray.plan.architectures import WRONG_UNDER_ZERO_3
from dray.plan.batch import BatchPlan, make_batch, micro_candidates, num_steps_of
from dray.plan.flops import flops_per_token_loose, flops_per_token_strict
from dray.plan.hardware import Precision, Shape
from dray.plan.intervals import FailureRate, SaveInterval, choose_interval
from dray.plan.laws import Law, find_law, with_numbers
from dray.plan.memory import MASTER_BYTES, Load, MemoryPlan, make_memory
from dray.plan.parameters import (
    Counted,
    Dimensions,
    ParameterCount,
    count_parameters,
    count_state_bytes,
    load_dimensions,
)
from dray.plan.privacy import epsilon_of, mu_for, mu_of, noise_for
from dray.plan.speed import (
    COMPILE_SECONDS,
    START_SECONDS,
    hold_seconds,
    peak_flops_per_rank,
    step_time,
    write_seconds,
)
from dray.plan.zero_config import make_buckets, make_deepspeed_config
from dray.spec import Spec

# Share of the hardware's memory that a plan may fill.
GPU_USABLE, HOST_USABLE = 0.94, 0.90
# Tokens in a forward pass: fewer leave the hardware idle, more gain nothing.
GPU_TOKENS, CPU_TOKENS = (4_096, 32_768), (1_024, 4_096)
# Of stages whose estimated times differ by less, the lowest is taken.
NEARLY = 1.05
# A compilation is worth its time when the whole takes at least so much longer.
COMPILE_PAYS = 8


PROVISIONAL = 1.0e-3, 16
"""Rate and rows to plan with where a law is to give them, and its tokens are not known yet."""
_PROVISIONAL_NOTE = (
    "auto: rate and batch follow from the training tokens, which are known once the corpus is "
    f"prepared; planned with {PROVISIONAL[1]} rows until then"
)


class Plan(BaseModel):
    """What a run will take: bytes, seconds, FLOPs, steps, and the DeepSpeed configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: Shape
    num_ranks: int
    on_gpu: bool
    precision: Precision
    zero_stage: int
    zero_reason: str
    offload: str
    batch: BatchPlan
    num_steps: int | None
    """None: epochs are wanted and the corpus is not prepared yet."""
    tokens_per_step: int
    row_tokens: int
    """Of a row on average, padding included: what is computed. As many as it may have where the
    corpus is not known."""
    num_tokens: int | None
    """Tokens that the run will train on."""
    num_parameters: int
    num_trained_parameters: int | None = None
    """Of these, those that are trained; None: all, or that is not known."""
    num_embedding_parameters: int
    parameters_exact: bool
    counted: Counted | None = None
    """What the architecture itself was found to be; None: the formulas were used."""
    flops_per_token_loose: float
    flops_per_token_strict: float
    peak_flops_per_rank: float | None
    memory: MemoryPlan
    memory_limit_bytes: int | None
    """What one rank may use; None: unknown."""
    host_limit_bytes: int
    checkpoint_bytes: int
    shard_bytes: int | None
    """Bytes of the training rows' token shards; None: the corpus' size is not known."""
    compile: bool
    activation_checkpointing: bool
    step_seconds: float | None = None
    """Of one optimiser update; None: the hardware's speed is unknown."""
    step_measured: bool = False
    """Whether that was measured on this machine; else it follows from nominal rates."""
    est_seconds: float | None
    """Of the whole run, start and compilation included; None besides where the number of steps is
    not known yet."""
    save_interval: SaveInterval | None = None
    """What `checkpoint: auto` begins with, before the run has measured its own saves."""
    deepspeed: dict[str, Any]
    law: Law | None = None
    """What the Step Law says of it; None: nothing, or its tokens are not known yet."""
    learning_rate: float | None = None
    """The peak, whoever chose it."""
    notes: list[str]


@dataclass(frozen=True)
class _Setting:
    """One way to run the spec: what decides whether it fits."""

    num_ranks: int
    stage: int
    micro_rows: int
    checkpointing: bool
    offload: str
    compiled: bool = False
    """Whether it was found that compiling pays. What fits is chosen as if it did not."""


@dataclass(frozen=True)
class _Question:
    """What all settings share."""

    spec: Spec
    shape: Shape
    sizes: Dimensions
    count: ParameterCount
    precision: Precision
    on_gpu: bool
    with_ray: bool
    elastic: bool
    row_tokens: int
    counted: Counted | None
    why_not_counted: str

    @property
    def state_bytes(self) -> int:
        """What the optimiser and hooks keep for all parameters."""
        given = self.spec.regularization
        num_averages = (given.ema is not None) + (given.swa is not None)
        averages = num_averages * MASTER_BYTES * self.count.trained
        return count_state_bytes(self.spec.optimizer, self.sizes, self.count) + averages

    @property
    def checkpoint_bytes(self) -> int:
        """All ranks' files together."""
        return MASTER_BYTES * self.count.trained + self.state_bytes

    @property
    def host_limit(self) -> int:
        return int(HOST_USABLE * self.shape.memory_bytes_per_node)

    def rank_limit(self, num_ranks: int) -> int | None:
        if not self.on_gpu:
            return self.host_limit // self.ranks_per_node(num_ranks)
        card = self.shape.accelerator
        return (
            None
            if card is None or card.memory_bytes is None
            else int(GPU_USABLE * card.memory_bytes * self.spec.resources.gpus_per_worker)
        )

    def ranks_per_node(self, num_ranks: int) -> int:
        return -(-num_ranks // self.shape.num_nodes)

    def memory(self, setting: _Setting) -> MemoryPlan:
        return make_memory(self.load(setting))

    def load(self, setting: _Setting) -> Load:
        spec = self.spec
        batch = make_batch(
            spec.batch.global_rows, setting.num_ranks, setting.micro_rows, elastic=self.elastic
        )
        return Load(
            sizes=self.sizes,
            count=self.count,
            precision=self.precision,
            stage=setting.stage,
            offload=setting.offload,
            num_ranks=setting.num_ranks,
            ranks_per_node=self.ranks_per_node(setting.num_ranks),
            micro_rows=setting.micro_rows,
            accumulation=batch.accumulation,
            sequence_tokens=spec.row_tokens,
            checkpointing=setting.checkpointing,
            dropout=spec.regularization.dropout,
            buckets=make_buckets(self.count.total, self.count.layer, on_gpu=self.on_gpu),
            on_gpu=self.on_gpu,
            with_ray=self.with_ray,
            row_tokens=self.row_tokens,
            state_bytes=self.state_bytes / max(1, self.count.trained),
            working_copies=spec.optimizer.working_copies,
            compiled=setting.compiled,
            kept_passes=spec.regularization.num_kept_passes,
            row_by_row=spec.privacy is not None,
        )

    def peak_flops(self, num_ranks: int) -> float | None:
        peak = peak_flops_per_rank(
            self.shape,
            self.precision,
            on_gpu=self.on_gpu,
            num_ranks=num_ranks,
            cpus_per_worker=self.spec.resources.cpus_per_worker,
        )
        return peak * self.spec.resources.gpus_per_worker if peak and self.on_gpu else peak

    def step_seconds(self, setting: _Setting) -> float | None:
        """Estimated seconds of a step; None where the hardware's speed is unknown."""
        peak = self.peak_flops(setting.num_ranks)
        return None if peak is None else step_time(self.load(setting), self.shape, peak).total

    def fits(self, setting: _Setting) -> bool:
        memory, limit = self.memory(setting), self.rank_limit(setting.num_ranks)
        return (limit is None or memory.total <= limit) and memory.host_bytes <= max(
            self.host_limit, 1
        )


def make_plan(
    spec: Spec,
    shape: Shape,
    *,
    num_rows: int | None = None,
    num_tokens: int | None = None,
    vocab_size: int | None = None,
    num_labels: int | None = None,
    pad_token_id: int | None = None,
    num_ranks: int | None = None,
    with_ray: bool = True,
    config: Mapping[str, Any] | None = None,
    counted: Counted | None = None,
    why_not_counted: str = "",
) -> Plan:
    """Plan a run. Raises PlanError where it does not fit, SpecError where model and tokeniser
    disagree.

    `num_rows`, `num_tokens` (of the training rows), `vocab_size`, `num_labels` and `pad_token_id`
    are the corpus', where it is known. `config`: of the folder that `model.path` names, as the run
    keeps it; without it is read there. `num_ranks`: plan for so many of an elastic group.
    `with_ray`: whether workers run under Ray, which takes memory. `counted`: the architecture's own
    sizes, where they were counted (`dray.models.counting`); `why_not_counted`: what kept them from
    it. Without them the formulas are used.
    """
    if not spec.task.tokenizes and (counted is None or counted.row is None):
        raise SpecError(
            f"task = {spec.task.name}",
            why_not_counted or "its documents are no texts, and no model was built to be measured",
            "what a model takes that reads no text is measured on the model itself",
            "mend that"
            if why_not_counted
            else "plan by `dray plan`, or dray.models.counting.make_counted_plan, with torch there",
        )
    on_gpu = spec.resources.gpus_per_worker > 0
    sizes = load_dimensions(spec, vocab_size, num_labels, config, pad_token_id, counted=counted)
    count = counted.count if counted is not None else count_parameters(sizes)
    law = None if spec.why_no_law else find_law(spec, count.body, num_rows)
    is_provisional = spec.is_auto and law is None
    if spec.is_auto:
        rate, rows = (law.learning_rate, law.global_rows) if law else PROVISIONAL
        spec = with_numbers(spec, rate, rows)
    elastic = isinstance(spec.resources.workers, tuple)
    ranks = num_ranks or _rank_count(spec, shape, on_gpu=on_gpu, with_ray=with_ray)
    precision = _resolve_precision(spec, shape, on_gpu=on_gpu)
    question = _Question(
        spec=spec,
        shape=shape,
        sizes=sizes,
        count=count,
        precision=precision,
        on_gpu=on_gpu,
        with_ray=with_ray,
        elastic=elastic,
        row_tokens=_row_tokens(spec, num_rows, num_tokens),
        counted=counted,
        why_not_counted=why_not_counted,
    )
    setting, reason = _choose(question, ranks)
    plan = _make(question, setting, reason, num_rows, num_tokens)
    notes = [_PROVISIONAL_NOTE, *plan.notes] if is_provisional else plan.notes
    rate = float(spec.optimizer.learning_rate)
    return plan.model_copy(update={"law": law, "learning_rate": rate, "notes": notes})


def _make(
    question: _Question,
    setting: _Setting,
    reason: str,
    num_rows: int | None,
    corpus_tokens: int | None,
) -> Plan:
    spec, shape, sizes, count = question.spec, question.shape, question.sizes, question.count
    batch = make_batch(
        spec.batch.global_rows, setting.num_ranks, setting.micro_rows, elastic=question.elastic
    )
    width, precision = spec.row_tokens, question.precision
    tokens_per_step = spec.batch.global_rows * width
    num_steps = num_steps_of(spec.duration, spec.batch.global_rows, tokens_per_step, num_rows)
    if num_steps is not None:
        _check_schedule(spec, num_steps)
    num_tokens = None if num_steps is None else num_steps * tokens_per_step
    strict = flops_per_token_strict(sizes, count, width)
    a_step = question.step_seconds(setting)
    compiles = _resolve_compile(
        question, setting, None if num_steps is None or a_step is None else num_steps * a_step
    )
    if compiles:
        setting = replace(setting, compiled=True)
        a_step = question.step_seconds(setting)
    return Plan(
        shape=shape,
        num_ranks=setting.num_ranks,
        on_gpu=question.on_gpu,
        precision=precision,
        zero_stage=setting.stage,
        zero_reason=reason,
        offload=setting.offload,
        batch=batch,
        num_steps=num_steps,
        tokens_per_step=tokens_per_step,
        row_tokens=question.row_tokens,
        num_tokens=num_tokens,
        num_parameters=count.total,
        num_trained_parameters=count.trained if count.base else None,
        num_embedding_parameters=count.embedding,
        parameters_exact=sizes.exact or question.counted is not None,
        counted=question.counted,
        flops_per_token_loose=flops_per_token_loose(sizes, count, width),
        flops_per_token_strict=strict,
        peak_flops_per_rank=question.peak_flops(setting.num_ranks),
        memory=question.memory(setting),
        memory_limit_bytes=question.rank_limit(setting.num_ranks),
        host_limit_bytes=question.host_limit,
        checkpoint_bytes=question.checkpoint_bytes,
        shard_bytes=_shard_bytes(width, sizes.vocab, num_rows, corpus_tokens)
        if spec.task.tokenizes
        else None,
        compile=compiles,
        activation_checkpointing=setting.checkpointing,
        step_seconds=a_step,
        est_seconds=_run_seconds(num_steps, a_step, compiles=compiles),
        save_interval=_save_interval(question, setting),
        deepspeed=make_deepspeed_config(
            setting.stage,
            setting.offload,
            micro_rows=setting.micro_rows,
            accumulation=batch.accumulation,
            precision=precision,
            clip_grad_norm=spec.regularization.clip_grad_norm,
            buckets=question.load(setting).buckets,
            on_gpu=question.on_gpu,
        ),
        notes=[
            *_notes(question, setting, batch),
            *_notes_of_length(question, num_steps, num_rows),
        ],
    )


def _save_interval(question: _Question, setting: _Setting) -> SaveInterval:
    """By nominal rates, and the rate of failures that is assumed of every run."""
    share = question.checkpoint_bytes / setting.num_ranks
    written = write_seconds(share)
    return choose_interval(
        held_seconds=hold_seconds(share, setting.num_ranks, on_gpu=question.on_gpu),
        commit_seconds=written,
        restart_seconds=START_SECONDS + COMPILE_SECONDS * setting.compiled + written,
        failure_seconds=FailureRate().mean_seconds(setting.num_ranks),
    )


def _check_schedule(spec: Spec, num_steps: int) -> None:
    """Raise SpecError if the schedule is longer than the run. Epochs and tokens are steps only
    here."""
    try:
        spec.schedule.check_length(num_steps)
    except ValueError as error:
        raise SpecError("the spec", str(error)) from error


def _row_tokens(spec: Spec, num_rows: int | None, num_tokens: int | None) -> int:
    """Tokens of a row as they are computed. Rows of like length share a batch, which is padded to
    its longest one: a token more than their mean."""
    width = spec.row_tokens
    if spec.task.packs or spec.task.fixed_tokens or not num_rows or not num_tokens:
        return width
    return min(width, max(1, round(num_tokens / num_rows + 1)))


def with_measured_step(plan: Plan, seconds: float) -> Plan:
    """The plan with a step's measured duration instead of the estimated one."""
    return plan.model_copy(
        update={
            "step_seconds": seconds,
            "step_measured": True,
            "est_seconds": _run_seconds(plan.num_steps, seconds, compiles=plan.compile),
        }
    )


def _run_seconds(
    num_steps: int | None, step_seconds: float | None, *, compiles: bool
) -> float | None:
    if num_steps is None or step_seconds is None:
        return None
    return num_steps * step_seconds + START_SECONDS + COMPILE_SECONDS * compiles


def _rank_count(spec: Spec, shape: Shape, *, on_gpu: bool, with_ray: bool) -> int:
    """The most workers that the shape can hold, of those that the spec asks for. Raises PlanError
    for too few."""
    resources, fewest, most = spec.resources, spec.resources.min_workers, spec.resources.max_workers
    where = f"resources.workers = {fewest if fewest == most else [fewest, most]}"
    capacity = most
    if on_gpu:
        capacity = int((shape.num_accelerators + 1e-9) // resources.gpus_per_worker)
        if capacity < fewest:
            what = f"{shape.name or 'the cluster'} has {shape.num_accelerators} GPUs"
            way_out = (
                f"give resources.workers={capacity}"
                if capacity
                else "give resources.gpus_per_worker=0, or plan for other hardware: --shape "
                "1x8xH100"
            )
            raise PlanError(
                where,
                what,
                f"{fewest} workers × {resources.gpus_per_worker:g} GPU are asked for",
                way_out,
            )
    if not shape.oversubscribe:
        readers = max(0.0, resources.reader_cpus - shape.spare_cpus) if with_ray else 0.0
        # A worker's CPUs lie on one node; the readers' too.
        per_node = int((shape.cpus_per_node + 1e-9) // resources.cpus_per_worker)
        by_cpu = min(
            shape.num_nodes * per_node,
            int((shape.num_cpus - readers + 1e-9) // resources.cpus_per_worker),
        )
        if by_cpu < fewest:
            rule = (
                f"{fewest} × {resources.cpus_per_worker:g} for the workers and {readers:g} for "
                "reading (workers that hold every CPU would wait for rows for ever)"
            )
            room = shape.cpus_per_node - readers
            way_out = (
                f"give resources.workers={by_cpu}"
                if by_cpu >= 1
                else f"give resources.cpus_per_worker={max(0.1, room / fewest):.2g}"
            )
            raise PlanError(
                where, f"{shape.name or 'the cluster'} has {shape.num_cpus:g} CPUs", rule, way_out
            )
        capacity = min(capacity, by_cpu)
    return min(most, capacity)


def _resolve_precision(spec: Spec, shape: Shape, *, on_gpu: bool) -> Precision:
    """What the hardware computes in. Raises PlanError for a precision that it lacks."""
    card = shape.accelerator
    if on_gpu:
        has_bf16 = card is None or card.has_bf16
        if spec.precision == "bf16" and not has_bf16:
            raise PlanError(
                "precision = bf16",
                f"{card.name if card else 'the GPU'} has no bf16",
                "the hardware must compute in it",
                "give precision=fp16 or precision=fp32",
            )
        return ("bf16" if has_bf16 else "fp32") if spec.precision == "auto" else spec.precision
    if spec.precision == "auto":
        return "bf16" if shape.cpu_bf16 else "fp32"
    if spec.precision == "fp16" or (spec.precision == "bf16" and not shape.cpu_bf16):
        raise PlanError(
            f"precision = {spec.precision}",
            f"the CPU has no {spec.precision} arithmetic",
            "it would work, some 200 times slower than fp32",
            "give precision=fp32 or precision=auto",
        )
    return spec.precision


def _choose(question: _Question, num_ranks: int) -> tuple[_Setting, str]:
    """The fastest ZeRO stage of those that fit, each with the greatest micro batch that is useful.
    Raises PlanError."""
    spec = question.spec
    stages = _stages(spec, question.sizes.architecture)
    least_tokens, most_tokens = GPU_TOKENS if question.on_gpu else CPU_TOKENS
    row = question.sizes.row
    width = spec.row_tokens if row is None else row.positions(question.count.active)
    micros = _micros(question, num_ranks)
    useful = [rows for rows in micros if rows * width <= most_tokens] or micros[-1:]
    enough = [rows for rows in useful if rows * width >= least_tokens] or useful[:1]

    def settings(stage: int, rows_allowed: list[int]) -> Iterator[_Setting]:
        for rows in rows_allowed:
            yield _Setting(
                num_ranks, stage, rows, spec.engine.activation_checkpointing, spec.zero.offload
            )

    # First stages that fit with enough tokens a pass; a higher stage is better than a starved one.
    for rows_allowed in (enough, useful):
        first = (
            next(filter(question.fits, settings(stage, rows_allowed)), None) for stage in stages
        )
        fitting = [setting for setting in first if setting is not None]
        if fitting:
            return _fastest(question, fitting, stages)
    raise _does_not_fit(question, num_ranks, stages[-1], useful[-1])


def _fastest(
    question: _Question, fitting: list[_Setting], stages: list[int]
) -> tuple[_Setting, str]:
    """The setting with the least estimated time, of nearly equal ones the lowest stage; and why."""
    if len(stages) == 1:
        optimizer = question.spec.optimizer
        because = "the spec says" if optimizer.elementwise else f"{optimizer.name} needs it"
        return fitting[0], f"stage {stages[0]} as {because}"
    seconds = {setting: question.step_seconds(setting) or 0.0 for setting in fitting}
    chosen = next(
        setting for setting in fitting if seconds[setting] <= NEARLY * min(seconds.values())
    )
    reasons = []
    if len(fitting) > 1 and seconds[chosen]:
        others = ", ".join(
            f"stage {other.stage} {seconds[other]:.3g} s" for other in fitting if other != chosen
        )
        reasons.append(f"about {seconds[chosen]:.3g} s a step, {others}")
    refused = [stage for stage in stages if stage not in {setting.stage for setting in fitting}]
    if refused:
        needed = question.memory(replace(chosen, stage=refused[-1])).total
        limit = question.rank_limit(chosen.num_ranks)
        room = f" of {limit / 1e9:.1f} GB" if limit is not None else ""
        reasons.append(f"stage {refused[-1]} would take {needed / 1e9:.1f} GB a rank{room}")
    if not seconds[chosen]:
        what = "the lowest that fits"
    elif seconds[chosen] == min(seconds.values()):
        what = "the fastest that fits"
    else:
        what = f"the lowest within {NEARLY - 1:.0%} of the fastest that fits"
    return chosen, f"stage {chosen.stage} is {what}" + (": " if reasons else "") + "; ".join(
        reasons
    )


def _stages(spec: Spec, architecture: str) -> list[int]:
    """The stages that a spec allows. Raises PlanError for an architecture that is not trained right
    under the only one."""
    lowest = {"none": 0, "optimizer": 1, "parameters": 3}[spec.zero.offload]
    wanted = list(range(lowest, 4)) if spec.zero.stage == "auto" else [spec.zero.stage]
    stages = [stage for stage in wanted if stage <= _highest_stage(spec, architecture)]
    if not stages:
        raise PlanError(
            "zero.stage = 3",
            f"{architecture}'s gradients are wrong under ZeRO 3",
            "all stages give the same losses (docs/models.md)",
            "give zero.stage=2, without zero.offload=parameters",
        )
    return stages


def _highest_stage(spec: Spec, architecture: str) -> int:
    """The highest stage under which optimiser and architecture are trained right."""
    if not spec.optimizer.elementwise:
        return 0
    if spec.adapters is not None and spec.adapters.quantized:
        return 2
    return 2 if architecture in WRONG_UNDER_ZERO_3 else 3


def _micros(question: _Question, num_ranks: int) -> list[int]:
    """Rows that a rank may compute at once. Raises PlanError where those of the spec do not go with
    its task or its model."""
    spec, elastic, row = question.spec, question.elastic, question.sizes.row
    global_rows, together = spec.batch.global_rows, spec.task.rows_together
    if spec.batch.micro_rows == "auto":
        micros = micro_candidates(global_rows, num_ranks, elastic=elastic)
    else:
        make_batch(global_rows, num_ranks, spec.batch.micro_rows, elastic=elastic)
        micros = [spec.batch.micro_rows]
    where, given = f"batch.micro_rows = {spec.batch.micro_rows}", f"{num_ranks} ranks"
    if not (whole := [rows for rows in micros if rows % together == 0]) or global_rows % together:
        raise PlanError(
            where,
            f"{given}, {global_rows} rows a step",
            f"{spec.task.name} computes {together} rows of a step together",
            f"give multiples of {together} as batch.micro_rows and batch.global_rows",
        )
    if row is None or not row.shares_statistics:
        return whole
    if spec.task.fixed_tokens is None:
        raise PlanError(
            f"model.architecture = {question.sizes.architecture}",
            "normalises batches, in which rows of several lengths are padded",
            "padding would count as a part of them",
            "take an architecture without batch normalisation",
        )
    at_once = [rows for rows in whole if rows * num_ranks == global_rows]
    if not at_once:
        raise PlanError(
            where,
            f"{given}, {global_rows} rows a step",
            f"{question.sizes.architecture} normalises batches: a step is the same on any "
            "number of ranks only if each computes its share at once",
            "give batch.micro_rows=auto, and batch.global_rows that the ranks divide",
        )
    return at_once


def _does_not_fit(question: _Question, num_ranks: int, stage: int, micro_rows: int) -> PlanError:
    spec = question.spec
    setting = _Setting(
        num_ranks, stage, micro_rows, spec.engine.activation_checkpointing, spec.zero.offload
    )
    memory, limit = question.memory(setting), question.rank_limit(num_ranks)
    if limit is not None and memory.total > limit:
        what = (
            f"needs {memory.total / 1e9:.1f} GB a rank at ZeRO stage {stage} with {micro_rows} rows"
        )
        rule = f"{question.shape.name or 'the hardware'} leaves {limit / 1e9:.1f} GB a rank"
    else:
        what = f"needs {memory.host_bytes / 1e9:.1f} GB of host memory a node"
        rule = f"{question.shape.name or 'the hardware'} leaves {question.host_limit / 1e9:.1f} GB"
    highest = _highest_stage(question.spec, question.sizes.architecture)
    ways = [
        text
        for text, way in _ways_out(question, setting)
        if way.stage <= highest and question.fits(way)
    ][:3]
    return PlanError(
        "model",
        what,
        rule,
        "would fit: " + "; or ".join(ways) if ways else _smaller(question, setting),
    )


def _ways_out(question: _Question, setting: _Setting) -> Iterator[tuple[str, _Setting]]:
    """Settings near the refused one, the least intrusive first."""
    spec = question.spec
    micros = [
        rows
        for rows in micro_candidates(spec.batch.global_rows, setting.num_ranks, elastic=True)
        if rows < setting.micro_rows
    ]
    fitting = next(
        (rows for rows in micros if question.fits(replace(setting, micro_rows=rows))), None
    )
    if fitting is not None:
        yield f"batch.micro_rows={fitting}", replace(setting, micro_rows=fitting)
    smallest = micros[-1] if micros else setting.micro_rows
    less = f" batch.micro_rows={smallest}" if micros else ""
    if not setting.checkpointing:
        yield "engine.activation_checkpointing=true", replace(setting, checkpointing=True)
    for stage in range(setting.stage + 1, 4):
        yield f"zero.stage={stage}", replace(setting, stage=stage)
        yield (
            f"zero.stage={stage} engine.activation_checkpointing=true{less}",
            replace(setting, stage=stage, checkpointing=True, micro_rows=smallest),
        )
    if question.on_gpu and setting.offload == "none":
        yield (
            "zero.offload=optimizer",
            replace(setting, offload="optimizer", stage=max(1, setting.stage)),
        )
        yield (
            f"zero.stage=3 zero.offload=parameters engine.activation_checkpointing=true{less}",
            replace(
                setting, offload="parameters", stage=3, checkpointing=True, micro_rows=smallest
            ),
        )
    for num_ranks in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        factor = num_ranks // setting.num_ranks
        fits_shape = (
            num_ranks <= question.shape.num_accelerators
            if question.on_gpu
            else num_ranks <= question.shape.num_nodes
        )
        if factor >= 2 and spec.batch.global_rows % num_ranks == 0 and fits_shape:
            yield (
                f"zero.stage=3 resources.workers={num_ranks}{less}",
                replace(setting, num_ranks=num_ranks, stage=3, micro_rows=1),
            )


def _smaller(question: _Question, setting: _Setting) -> str:
    """When no setting helps: how many layers would fit as the rest stands, or that none would."""
    layers = question.sizes.layers
    low, high = 0, layers
    while low < high:
        middle = (low + high + 1) // 2
        sizes, counted = replace(question.sizes, layers=middle), question.counted
        count = counted.with_layers(middle) if counted else count_parameters(sizes)
        if replace(question, sizes=sizes, count=count).fits(replace(setting, checkpointing=True)):
            low = middle
        else:
            high = middle - 1
    if low == 0:
        return "no setting on this hardware would fit it: take a smaller model, or more memory"
    return (
        f"would fit: model.num_layers={low} engine.activation_checkpointing=true; "
        "or more or larger machines, e.g. --shape 2x8xH100"
    )


def _resolve_compile(question: _Question, setting: _Setting, seconds: float | None) -> bool:
    """Where compilation was measured to win (CPU: bf16 on AMX; GPU: below ZeRO 3, whose hooks cut
    a model into pieces), if the run is long enough.

    Raises PlanError where it is asked for and cannot be.
    """
    wanted, shape = question.spec.engine.compile, question.shape
    if wanted is True and not shape.has_compiler:
        raise PlanError(
            "engine.compile = true",
            f"{shape.name} has no C++ compiler",
            "torch.compile needs one",
            "install g++, name another with CXX, or give engine.compile=auto",
        )
    if wanted != "auto":
        return wanted
    wins = shape.has_compiler and (
        (question.on_gpu and setting.stage < 3) or (question.precision == "bf16" and shape.cpu_amx)
    )
    return wins and seconds is not None and seconds >= COMPILE_PAYS * COMPILE_SECONDS


def _shard_bytes(
    width: int, vocab: int, num_rows: int | None, corpus_tokens: int | None
) -> int | None:
    """Rows of fixed width: token ids of 2 or 4 bytes, and a count of 4."""
    rows = (
        num_rows
        if num_rows is not None
        else None
        if corpus_tokens is None
        else -(-corpus_tokens // width)
    )
    return None if rows is None else rows * (width * (2 if vocab <= 2**16 else 4) + 4)


def _notes_of_counts(question: _Question) -> Iterator[str]:
    spec = question.spec
    why = question.why_not_counted or "the model itself was not looked at"
    if spec.keeps_base and question.counted is None:
        yield f"planned as if all of the model were trained ({why})"
    elif question.counted is None and not question.sizes.exact:
        yield (
            f"{question.sizes.architecture} is counted by formula ({why}): the number of "
            "parameters and the memory are estimates"
        )


def _notes_of_length(
    question: _Question, num_steps: int | None, num_rows: int | None
) -> Iterator[str]:
    """What the number of steps and rows decides."""
    spec = question.spec
    swa = spec.regularization.swa
    if swa is not None and num_steps is not None and swa.first_step > num_steps:
        yield (
            f"regularization.swa.first_step = {swa.first_step}: the run has {num_steps} steps, so "
            "the mean of its weights is its weights"
        )
    given = spec.privacy
    if given is None:
        return
    mixed = spec.data.balance or any(own.weight for own in spec.data.train)
    if num_steps is None or not num_rows or mixed:
        yield (
            "privacy: noise and ε follow from the row that is used most often, known once a run "
            "has begun: `dray show` tells them"
        )
        return
    uses = -(-num_steps * spec.batch.global_rows // num_rows)
    noise = given.noise_multiplier
    if noise is None:
        assert given.epsilon is not None
        noise = noise_for(uses, mu_for(given.epsilon, given.delta))
    epsilon = epsilon_of(given.delta, mu_of(uses, noise))
    length = noise * math.sqrt(question.count.trained) / spec.batch.global_rows
    yield (
        f"privacy: each row used about {uses} times with noise {noise:.4g} is ε = {epsilon:.4g} "
        f"at δ = {given.delta:g}; a step's noise is {length:.2g} times as long as the longest "
        "gradient that a batch can have"
    )


def _notes(question: _Question, setting: _Setting, batch: BatchPlan) -> Iterator[str]:
    spec, shape = question.spec, question.shape
    yield from _notes_of_counts(question)
    if batch.padded_rows:
        yield (
            f"{batch.padded_rows} rows without targets fill up each step ({setting.num_ranks} "
            "ranks do not divide it)"
        )
    if shape.oversubscribe and setting.num_ranks * spec.resources.cpus_per_worker > shape.num_cpus:
        yield f"{setting.num_ranks} workers share {shape.num_cpus:g} CPUs"
    if not question.on_gpu and shape.accelerator is not None:
        yield (
            f"the shape has {shape.accelerator.name}, but resources.gpus_per_worker is 0: the "
            "workers run on its CPUs"
        )
    if setting.offload != "none" and not question.on_gpu:
        yield "offloading saves nothing where the workers run on the CPU"
    if question.on_gpu and shape.accelerator is not None and shape.accelerator.memory_bytes is None:
        yield f"the memory of {shape.accelerator.name} is unknown: whether it fits was not checked"
    if (
        spec.engine.compile == "auto"
        and not shape.has_compiler
        and (question.on_gpu or shape.cpu_amx)
    ):
        yield "not compiled: there is no C++ compiler here (g++); compiled it would be faster"
    if spec.engine.compile is True and setting.stage == 3:
        yield (
            "ZeRO 3's hooks cut a model into pieces before it is compiled: on a GPU no other stage "
            "was as slow"
        )
    if question.precision == "fp16":
        yield "fp16 needs loss scaling, and skips steps that overflow"
    if question.precision == "bf16" and setting.stage < 2 and batch.accumulation > 1:
        instead = "; zero.stage=2 adds them up in fp32" if spec.optimizer.elementwise else ""
        yield f"gradients of the micro batches add up in bf16{instead}"
    if not spec.optimizer.elementwise and setting.num_ranks > 1:
        yield (
            f"{spec.optimizer.name} goes by {spec.optimizer.unit}: every rank keeps all of them, "
            "and all that it keeps for them"
        )
    if setting.stage >= 2 and batch.accumulation > 1:
        yield (
            f"ZeRO {setting.stage} reduces gradients {batch.accumulation} times a step, once a "
            "micro batch"
        )
