"""The training loop that every rank runs, readable top to bottom.

A rank restores, then takes its work as it comes: steps of training, and at the right places parts
of a validation pass. It reports what it measured, commits checkpoints together with the others, and
stops when all agree to. It knows neither Ray nor the command line.

The host never waits for a GPU's queue within a step: what it must know of a step beforehand comes
from the rows, whether an update is sound is decided on the device, and losses and times are read
once the next step has been queued.
"""

from __future__ import annotations

import hashlib
import math
import resource
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import pyarrow as pa
import torch
from torch import Tensor

from dray.corpus.stream import RowStream
from dray.corpus.tokenizing import Decoder
from dray.doctor.hangs import agreement_seconds
from dray.errors import CheckpointDamaged, GroupDissolved, LossSpike, ReadsDiffer, StoreError
from dray.models.build import (
    build_model,
    documents_apart,
    enable_activation_checkpointing,
    import_transformers,
    one_document_a_row,
    sizes_by,
)
from dray.models.config import make_kept_config
from dray.models.freezing import with_depths
from dray.models.groups import parameter_groups
from dray.models.initialize import restore_rotary_buffers
from dray.models.width import width_factor, with_rates
from dray.order import NO_STEPS, Ints, chain_digest, format_digest, row_digest
from dray.origin import open_weights
from dray.processes.heap import prepare_heap
from dray.rank.cadence import build_cadence
from dray.rank.chance import Chance
from dray.rank.device import Clock, Reading, is_queued, send
from dray.rank.engine import Engine, build_engine, import_deepspeed
from dray.rank.exploring import explore
from dray.rank.feeding import StepRows, ValidationRows, feed
from dray.rank.group import Ranks
from dray.rank.hiding import PrivateNoise, PrivateRows
from dray.rank.hooks import Hook, build_hooks, check_blocks
from dray.rank.job import Attempt, Job
from dray.rank.numerics import Watch
from dray.rank.passes import Micro, build_passes
from dray.rank.pulse import Pulse
from dray.rank.saving import Outcome, Saver
from dray.rank.schedule import learning_rate
from dray.rank.teaching import TaughtLoss, load_teacher
from dray.runs import CheckpointReader, Run, inspect_checkpoint
from dray.runs.records import Event, Report, StepReport, ValidationReport, finite
from dray.runs.uptime import INTERVAL
from dray.storage.filesystem import child
from dray.tasks import Batch, Task, TaskMetrics

_MEASURED_STEPS = 6  # the first of them is not typical
_LEAST_TIMEOUT_SECONDS, _TIMEOUT_STEPS = 300.0, 50  # of a collective, once steps are measured


def preload() -> None:
    """Import what a rank on CPUs uses, for the fork server."""
    prepare_heap()
    import_transformers()
    import_deepspeed("cpu")


class Reporter(Protocol):
    """Where a rank's records go, and where a wish to stop comes from."""

    def send(self, report: Report) -> None: ...

    def stop_requested(self) -> bool: ...

    def notice_given(self) -> bool:
        """Whether a machine of the group is about to be taken away, or the group is to have another
        size."""

    def flush(self) -> None: ...

    def wait_stored(self) -> None:
        """Wait until what all ranks have flushed is in the run's metrics."""


@dataclass
class _Progress:
    """What the loop remembers between steps."""

    step: int
    tokens: int = 0
    chain_after: int = 0
    chain: str = NO_STEPS
    """Chained digest of the rows of all steps after `chain_after`: what the weights were trained
    on."""
    best: float | None = None
    validations_without_better: int = 0
    last_validation: dict[str, float | None] = field(default_factory=dict)
    last_validation_step: int = 0
    saved_at: float = field(default_factory=time.monotonic)
    saved_step: int = -1
    save_due: bool = False
    notice: bool = False
    """The group is about to end: the step is to be saved for that, and no other one begun."""


@dataclass(frozen=True)
class _Agreed:
    """What all ranks know of a step before it is computed. It comes from their rows, so no device
    is asked."""

    num_targets: int
    num_tokens: int
    digest: int
    stop: bool
    """A person wants the run to stop after this step."""
    save: bool
    """rank 0's clock says that a checkpoint is due."""
    notice: bool
    """Some rank has learnt that its machine will be taken away, or the group resized."""


@dataclass(frozen=True)
class _Queued:
    """A step that was given to the device, and what is known of it so far."""

    report: StepReport
    """But for what the device computes."""
    row_ids: Ints
    numbers: Reading
    """This rank's loss sum, that of all ranks, the gradient norm, and whether the update was
    made."""
    begun: Any
    forwards: list[tuple[Any, Any]]
    ended: Any


def train_rank(
    job: Job,
    ranks: Ranks,
    attempt: Attempt,
    reporter: Reporter,
    *,
    stream: RowStream,
    blocks: Iterable[pa.Table],
    pulse: Pulse,
) -> str:
    """Train from where the attempt starts to the end, on this rank's blocks of the stream.

    Returns how it ended: completed, early_stopped or interrupted.
    """
    run = Run.open(job.storage, job.run_name)
    pulse.enter("build", attempt.start_step)
    loop = _Loop(job, ranks, reporter, run=run, attempt=attempt, pulse=pulse)
    pulse.enter("restore")
    loop.restore()
    pulse.enter("data")
    reporter.send(
        Event(
            "ready",
            attempt.number,
            stream.start_step,
            {"rank": ranks.rank, "num_ranks": ranks.num_ranks},
        )
    )
    with documents_apart() if loop.task.apart else one_document_a_row():
        ended = loop.follow(stream, blocks)
    if ranks.rank == 0:
        run.end_attempt(attempt.number, ended, loop.progress.step)
    reporter.flush()
    return ended


class _Loop:
    """One rank from its first step to its last.

    `follow` takes the work of the stream and gives it to `_train_step` and `_validate`; after each
    piece `_save` is called where a checkpoint is due, the one path to one. `_train_step` agrees
    with the other ranks, queues the step on the device and remembers it; `_settle` reads what
    became of a step and reports it: at once on a CPU, one step later on a GPU, and before anything
    that must know (a checkpoint, the end).
    """

    def __init__(
        self,
        job: Job,
        ranks: Ranks,
        reporter: Reporter,
        *,
        run: Run,
        attempt: Attempt,
        pulse: Pulse,
    ) -> None:
        self.job, self.ranks, self.reporter, self.pulse = job, ranks, reporter, pulse
        self.run, self.attempt = run, attempt.number
        path = attempt.checkpoint and run.find_path(attempt.checkpoint)
        self.newest = inspect_checkpoint(run.filesystem, path) if path else None
        self.spec, self.plan = job.spec, attempt.plan
        decode = Decoder(child(run.corpus_copy, "tokenizer"))
        self.chance = Chance()
        self.passes = build_passes(job.spec.regularization, self.chance)
        if job.spec.privacy is not None:
            self.passes = PrivateRows(job.spec.privacy, self.chance)
        self.task: Task = job.spec.task.on(job.manifest, job.spec.model.num_labels, decode)
        self.engine: Engine = build_engine(
            self._build_model,
            self._make_groups,
            self.spec.optimizer,
            self.plan,
            ranks,
            make_objective=self._make_objective,
            hooks=[*build_hooks(self.spec, self.chance), *self._hiding()],
        )
        self.saver = Saver(
            run,
            self.attempt,
            self.spec,
            engine=self.engine,
            ranks=ranks,
            wait_stored=reporter.wait_stored,
        )
        self.cadence = build_cadence(run, self.spec.checkpoint, self.plan, self.attempt, ranks.rank)
        self.numbers = Watch(self.spec.numerics)
        self.clock = Clock(ranks.device)
        self.queued: deque[_Queued] = deque()
        self.most_queued = 1 if is_queued(ranks.device) else 0
        self.step_seconds: list[float] = []
        self._bound_collectives(agreement_seconds(self.spec.watchdog))  # compilation takes its time
        restore_rotary_buffers(
            self.engine.module
        )  # half precision casts them, and long rows need their digits
        self.progress = _Progress(
            step=attempt.start_step, saved_step=attempt.start_step if self.newest else -1
        )
        self.metrics: TaskMetrics | None = None
        self.is_undefined_told = False

    def _hiding(self) -> list[Hook]:
        """The noise of a private run."""
        privacy = self.spec.privacy
        if privacy is None:
            return []
        if (kept := self.run.noise()) is None:
            raise StoreError(f"run {self.run.name!r}", "has lost its noise", "it was kept there")
        return [PrivateNoise(privacy, kept, self.spec.batch.global_rows)]

    def _build_model(self, constructing: Any, gathering: Any) -> torch.nn.Module:
        manifest, is_new = self.job.manifest, self.newest is None
        # What is never trained is in no checkpoint.
        fills = is_new or self.spec.keeps_base
        origin = self.job.weights if fills else None
        model: Any = build_model(
            self.spec,
            **sizes_by(manifest, self.task.num_labels),
            constructing=constructing,
            gathering=gathering,
            initial_weights=fills,
            config=self.job.config,
            weights=None if origin is None else open_weights(origin),
        )
        if origin is not None and is_new and self.ranks.rank == 0:
            self.reporter.send(Event("weights_taken", self.attempt, 0, model.load_report.to_json()))
        if self.job.config is None and self.ranks.rank == 0:
            self.run.keep_model(make_kept_config(model))
        if self.plan.activation_checkpointing:
            enable_activation_checkpointing(model, self.chance.contexts)
        module: torch.nn.Module = model
        return module

    def _make_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        groups = parameter_groups(model, self.spec.optimizer.weight_decay)
        groups = with_rates(model, groups, width_factor(self.spec))
        return with_depths(model, groups, self.spec)

    def _make_objective(self, model: torch.nn.Module) -> torch.nn.Module:
        objective = self.task.objective(model, self.spec.regularization.label_smoothing)
        check_blocks(model, self.spec)
        if not self.plan.compile:
            self.chance.watch(objective)
        if self.spec.distil is None:
            return self.passes.around(objective)
        teacher = load_teacher(
            self.job.storage, self.spec.distil, self.job.manifest, self.ranks.device
        )
        return TaughtLoss(objective, teacher, self.spec.distil)

    def restore(self) -> None:
        """Copy the newest checkpoint into the engine, if there is one. Nothing unverified is
        read."""
        if self.newest is None:
            return
        with self.run.hold(self.newest), CheckpointReader(self.run, self.newest) as reader:
            verify_together(self.run, reader, self.ranks)
            state = reader.metadata
            self.engine.restore(reader, state["optimizer_step"], state["loss_scale"])
        for name in ("tokens", "best", "validations_without_better"):
            setattr(self.progress, name, state[name])
        self.progress.best = finite(self.progress.best)  # older versions kept what was not
        self._restore_chain(state.get("rows_chain"))
        self.progress.last_validation = state["validation"]
        self.progress.last_validation_step = state["validation_step"]

    def _restore_chain(self, saved: dict[str, Any] | None) -> None:
        """Go on with the checkpoint's chain; anew where it has none, or is another run's, whose
        rows are not ours."""
        own = self.newest is not None and self.newest.path.startswith(f"{self.run.path}/")
        if saved and own:
            self.progress.chain_after, self.progress.chain = saved["after"], saved["digest"]
        else:
            self.progress.chain_after = self.progress.step

    def follow(self, stream: RowStream, blocks: Iterable[pa.Table]) -> str:
        """Do the work of the stream to its end, or until all ranks agree to stop. Returns how it
        ended."""
        ended = ""
        self._tell_interval()
        with closing(feed(stream, blocks, self.task, self.ranks, self.spec.seed)) as pieces:
            while not ended:
                self.pulse.enter("data")
                begun, waiting_since = self.clock.mark(), time.perf_counter()
                work = next(pieces, None)
                data_wait = time.perf_counter() - waiting_since
                if work is None:
                    is_whole = stream.num_steps >= (self.plan.num_steps or 0)
                    ended = "completed" if is_whole else "interrupted"
                elif isinstance(work, StepRows):
                    ended = "interrupted" if self._train_step(work, begun, data_wait) else ""
                else:
                    ended = self._validate(work)
                # A step that is also validated is saved after that, with its metrics.
                if self.progress.save_due and not ended and not self._is_unvalidated(work, stream):
                    self._save()
        self._save(last=True)
        return ended

    def _is_unvalidated(self, work: StepRows | ValidationRows | None, stream: RowStream) -> bool:
        """Whether a validation pass follows this piece, or goes on after it."""
        return (isinstance(work, StepRows) and stream.validates_after(work.step)) or (
            isinstance(work, ValidationRows) and not work.is_last
        )

    def _train_step(self, rows: StepRows, begun: Any, data_wait: float) -> bool:
        """Agree on one optimiser update and queue it. Returns whether all ranks stop after it."""
        step, progress = rows.step, self.progress
        agreed = self._agree(rows)
        self.engine.begin_step(step)
        rate = learning_rate(
            self.spec.schedule, step, self.plan.num_steps or step, self.spec.optimizer.learning_rate
        )
        compute = self._pooled_forward_backward if self.task.pools else self._forward_backward
        loss_sum, forwards = compute(rows, agreed.num_targets)
        self.pulse.enter("step")
        # Gradients are shared, losses are not: a bad one on one rank keeps all of them from the
        # update.
        total_loss = self.ranks.total(loss_sum)
        self.saver.hold_back()
        update = self.engine.step(rate, withhold=~torch.isfinite(total_loss))
        numbers = Reading(
            torch.stack([loss_sum, total_loss, update.grad_norm, update.applied.double()])
        )
        progress.step = step
        progress.chain = chain_digest(progress.chain, agreed.digest)
        progress.notice |= agreed.notice
        progress.save_due |= agreed.save or self._checkpoint_due(step) or progress.notice
        progress.tokens += agreed.num_tokens
        report = StepReport(
            rank=self.ranks.rank,
            attempt=self.attempt,
            step=step,
            num_ranks=self.ranks.num_ranks,
            num_targets=agreed.num_targets,
            learning_rate=rate,
            rows_digest=format_digest(agreed.digest),
            tokens=progress.tokens,
            step_tokens=agreed.num_tokens,
            data_wait_seconds=data_wait,
        )
        self.queued.append(
            _Queued(report, rows.row_ids, numbers, begun, forwards, self.clock.mark())
        )
        self._settle(self.most_queued)
        return agreed.stop

    def _agree(self, rows: StepRows) -> _Agreed:
        """The one small agreement of a step: what the loss is divided by, what the batch was, what
        to do after it."""
        self.pulse.enter("agree", rows.step)
        targets, tokens, digest, stops, saves, notices = self.ranks.sum(
            [
                rows.num_targets,
                rows.num_tokens,
                row_digest(rows.row_ids),
                int(self.reporter.stop_requested()),
                int(self._minutes_due()),
                int(self.reporter.notice_given()),
            ]
        )
        if self.spec.privacy is not None:  # how many targets rows have says something of them
            targets = self.spec.batch.global_rows
        return _Agreed(targets, tokens, digest, stops > 0, saves > 0, notices > 0)

    def _forward_backward(
        self, rows: StepRows, all_targets: int
    ) -> tuple[Tensor, list[tuple[Any, Any]]]:
        """The gradients of one step. Returns this rank's summed loss (fp64, on the device), and
        marks around its forward passes: those alone, below ZeRO-3, tell a slow rank from a waiting
        one."""
        batches: list[Batch] = rows.batches
        if self.task.explores:
            self.pulse.enter("forward")
            batches = explore(self.engine, self.task, batches, self.ranks)
        self.engine.train(True)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        forwards: list[tuple[Any, Any]] = []
        for index, batch in enumerate(batches):
            with self._drawing(rows, index):
                is_last = index == len(batches) - 1
                backward = partial(self._backward, all_targets=all_targets, is_last=is_last)
                forward = partial(self._forward, forwards=forwards)
                micro = Micro(forward, self.engine.probe, backward)
                on_device = send(batch, self.ranks.device)
                loss_sum += self.passes.learn(micro, on_device).double()
        return loss_sum, forwards

    def _forward(self, batch: Batch, *, forwards: list[tuple[Any, Any]]) -> Any:
        self.pulse.enter("forward")
        begun = self.clock.mark()
        found = self.engine(batch)
        forwards.append((begun, self.clock.mark()))
        return found

    def _backward(self, loss: Tensor, *, last: bool, all_targets: int, is_last: bool) -> None:
        """DeepSpeed averages gradients over ranks; the sum over all targets wants their number
        instead."""
        self.pulse.enter("backward")
        mean = loss * (self.ranks.num_ranks / max(1, all_targets))
        self.engine.backward(mean, last=last and is_last)

    @contextmanager
    def _drawing(self, rows: StepRows, index: int) -> Iterator[None]:
        """What a micro batch draws: by its rows, so there is no generator to save, and nothing goes
        by ranks. What torch draws by itself (fused attention on GPUs, compiled models) goes by the
        place in the run."""
        torch.manual_seed(make_dropout_seed(self.spec.seed, rows.step, self.ranks.rank, index))
        if self.plan.compile:
            yield
            return
        ids = rows.ids_of(index)
        with self.chance.rows(self.spec.seed, rows.step, ids, self.ranks.device):
            yield

    def _pooled_forward_backward(
        self, rows: StepRows, all_targets: int
    ) -> tuple[Tensor, list[tuple[Any, Any]]]:
        """As `_forward_backward` where the loss is of all rows of the global batch together.

        What the model makes of them is computed without gradients and joined over the ranks; the
        loss and its gradient are of that, the same on every rank; a second pass gives the gradient
        on to the weights, a micro batch at a time (GradCache: Gao et al., 2021). So neither ranks
        nor micro batches show in the loss, and no more than a micro batch has its activations.
        """
        self.engine.train(True)
        forwards, parts = [], []
        for index, batch in enumerate(rows.batches):
            with torch.no_grad(), self._drawing(rows, index):
                part, marks = self._pooled(batch)
            parts.append(part)
            forwards.append(marks)
        own = sum(map(len, parts))
        # Slots that hold no row come last, so the rows of the global batch are the first ones.
        everyone = self.ranks.join_rows(torch.cat(parts))[: self.spec.batch.global_rows]
        pool = everyone.detach().requires_grad_()
        losses = self.task.pooled_losses(pool, self.spec.regularization.label_smoothing)
        (gradient,) = torch.autograd.grad(losses.sum(), pool)
        first = self.ranks.rank * own
        mine = torch.zeros((own, *pool.shape[1:]), dtype=pool.dtype, device=pool.device)
        mine[: max(0, len(pool) - first)] = gradient[first : first + own]
        done = 0
        for index, batch in enumerate(rows.batches):
            with self._drawing(rows, index):
                part, marks = self._pooled(batch)
                forwards.append(marks)
                share = (part * mine[done : done + len(part)]).sum()
                done += len(part)
                self.pulse.enter("backward")
                self.engine.backward(
                    share * (self.ranks.num_ranks / max(1, all_targets)),
                    last=index == len(rows.batches) - 1,
                )
        return losses.detach()[first : first + own].double().sum(), forwards

    def _pooled(self, batch: Batch) -> tuple[Tensor, tuple[Any, Any]]:
        """What the model makes of a micro batch, fp32, and marks around its forward pass."""
        self.pulse.enter("forward")
        on_device, begun = send(batch, self.ranks.device), self.clock.mark()
        _, output = self.engine(on_device)
        return output["pooled"].float(), (begun, self.clock.mark())

    def _settle(self, may_stay: int = 0) -> None:
        """Read and report what became of the steps that were queued, but for the last `may_stay` of
        them.

        All ranks do so at the same places. Raises BadNumbers and LossSpike.
        """
        while len(self.queued) > may_stay:
            queued = self.queued.popleft()
            self.pulse.enter("step")
            loss_sum, total_loss, norm, applied = queued.numbers.read()
            seconds = self.clock.seconds(queued.begun, queued.ended)
            report = replace(
                queued.report,
                loss_sum=loss_sum,
                grad_norm=norm,
                applied=bool(applied),
                seconds=seconds,
                forward_seconds=sum(self.clock.seconds(*forward) for forward in queued.forwards),
                time=time.time(),
                memory_bytes=_memory_bytes(self.ranks.device),
            )
            self.reporter.send(report)
            self._measure_step(max(0.0, seconds - report.data_wait_seconds))
            self.pulse.is_warm = True
            mean_loss = total_loss / max(1, report.num_targets)
            self._watch_numbers(
                report.step, mean_loss, applied=report.applied, row_ids=queued.row_ids
            )

    def _measure_step(self, seconds: float) -> None:
        """Once steps are measured, a collective of the model's that takes many times as long is a
        hang, and raises."""
        if len(self.step_seconds) < _MEASURED_STEPS:
            self.step_seconds.append(seconds)
            if len(self.step_seconds) == _MEASURED_STEPS:
                slowest = max(self.ranks.gather(max(self.step_seconds[1:])))
                self._bound_collectives(max(_LEAST_TIMEOUT_SECONDS, _TIMEOUT_STEPS * slowest))

    def _bound_collectives(self, compute_seconds: float) -> None:
        """Agreements wait for rows and storage too, and the model's collectives for nothing but
        computing: all ranks have agreed on the step, or met before a part of a validation pass,
        when they come to those."""
        self.ranks.bound(
            compute_seconds=compute_seconds, agree_seconds=agreement_seconds(self.spec.watchdog)
        )

    def _watch_numbers(self, step: int, loss: float, *, applied: bool, row_ids: Ints) -> None:
        """Record a step without an update, with its rows, and a loss that leaps. Raises BadNumbers
        and LossSpike."""
        if applied:
            if self.numbers.is_spike(loss):
                self._meet_spike(step, loss)
            return
        reason = (
            "the gradient norm is not finite" if math.isfinite(loss) else "the loss is not finite"
        )
        rows = sorted(int(row) for part in self.ranks.gather(row_ids[row_ids >= 0]) for row in part)
        if self.ranks.rank == 0:
            self.reporter.send(
                Event("step_skipped", self.attempt, step, {"reason": reason, "rows": rows})
            )
        if self.engine.loss_scale <= 1.0:  # a loss scale finds its level by overflowing
            self.numbers.skipped(step, reason, self.progress.saved_step)

    def _meet_spike(self, step: int, loss: float) -> None:
        text = f"the loss leapt to {loss:.4g} at step {step}"
        if self.ranks.rank == 0:
            self.reporter.send(Event("loss_spike", self.attempt, step, {"loss": loss}))
        if self.spec.numerics.spike == "rewind":
            self.saver.finish()
            raise LossSpike(
                step,
                f"{text}; the run goes back to its checkpoint before that, and leaves those rows "
                "out",
            )

    def _checkpoint_due(self, step: int) -> bool:
        every = self.spec.checkpoint.every_steps
        return bool(every) and step % (every or 1) == 0

    def _minutes_due(self) -> bool:
        return self.cadence is not None and self.cadence.is_due(self.progress.saved_at)

    def _validate(self, rows: ValidationRows) -> str:
        """One part of a validation pass. Returns how the run ended, if it did."""
        self.metrics = self.metrics or self.task.new_metrics()
        if (
            self.plan.zero_stage == 3
        ):  # its forward passes gather weights: no rank may still wait for its rows
            self.pulse.enter("agree")
            self.ranks.barrier()
        self.pulse.enter("validate")
        self.engine.train(False)
        with torch.no_grad(), closing(rows.batches) as batches:
            for batch in batches:
                on_device = send(batch, self.ranks.device)
                _, output = self.engine(on_device)
                self.metrics.update(on_device, output)
        if not rows.is_last:
            return ""
        out_of_patience = self._end_validation(rows.step, self.metrics)
        self.metrics = None
        return "early_stopped" if out_of_patience else ""

    def _end_validation(self, step: int, metrics: TaskMetrics) -> bool:
        """Merge the ranks' metrics and report them. Returns whether patience has run out.

        A value that is undefined says nothing of the model: it is neither better nor worse.
        """
        merged = self.task.new_metrics().merge(self.ranks.gather(metrics.state()))
        values = self.task.measured(merged, self.job.manifest.validation)
        progress, rule = self.progress, self.spec.validation
        progress.last_validation, progress.last_validation_step = values, step
        if self.ranks.rank == 0:
            self.reporter.send(ValidationReport(self.attempt, step, values))
        value = values.get(rule.metric)
        if value is None:
            self._tell_undefined(step, rule.metric, on_these_rows=rule.metric in merged.undefined())
            return False
        score = value * self.spec.metric_sign
        better = progress.best is None or score < progress.best
        progress.best = score if better else progress.best
        progress.validations_without_better = (
            0 if better else progress.validations_without_better + 1
        )
        return rule.patience is not None and progress.validations_without_better >= rule.patience

    def _tell_undefined(self, step: int, metric: str, *, on_these_rows: bool) -> None:
        """Say once an attempt that a validation could not rank the model, and why."""
        if self.ranks.rank != 0 or self.is_undefined_told:
            return
        self.is_undefined_told = True
        reason = "the held-out rows do not define it" if on_these_rows else "it is not finite"
        told = {"metric": metric, "reason": reason}
        self.reporter.send(Event("metric_undefined", self.attempt, step, told))

    def _save(self, *, last: bool = False) -> None:
        """Begin a checkpoint of the current step; the last one, and one before the group ends, are
        waited for.

        Raises GroupDissolved in the latter case, on every rank: steps past that checkpoint would
        only be done again.
        """
        progress, waits = self.progress, last or self.progress.notice
        self._settle()  # what is saved must be known to be sound
        self.pulse.enter("save")
        if progress.saved_step != progress.step:
            begun = time.perf_counter()
            self.reporter.flush()  # no step is committed whose metrics could still be lost
            waited = time.perf_counter() - begun
            self._report_save(self.saver.begin(progress.step, self._metadata(), waited))
            progress.saved_step, progress.saved_at, progress.save_due = (
                progress.step,
                time.monotonic(),
                False,
            )
        if waits:
            outcome = self.saver.finish(last=last)
            self._report_save(outcome)
        if progress.notice and not last:
            saved = outcome is None or not outcome.problem
            if self.ranks.rank == 0 and saved:
                self.reporter.send(Event("saved_on_notice", self.attempt, progress.step))
            raise GroupDissolved(
                f"the group was to end; step {progress.step} is {'' if saved else 'not '}saved"
            )

    def _report_save(self, outcome: Outcome | None) -> None:
        if outcome is None or self.ranks.rank != 0:
            return
        told: dict[str, Any] = {
            "seconds": outcome.seconds,
            "blocked_seconds": outcome.blocked_seconds,
        }
        if outcome.problem:
            told["problem"] = outcome.problem
        kind = "checkpoint_failed" if outcome.problem else "checkpoint"
        self.reporter.send(Event(kind, self.attempt, outcome.step, told))
        if self.cadence is not None and not outcome.problem:
            self.cadence.learn(outcome.blocked_seconds, outcome.seconds)
            self._tell_interval()
        if outcome.kept_for:
            self.reporter.send(
                Event("retention_failed", self.attempt, outcome.step, {"problem": outcome.kept_for})
            )

    def _tell_interval(self) -> None:
        """Say how often the run saves where it finds that out itself, once, and when that has
        changed by much."""
        news = self.cadence and self.cadence.news()
        if news:
            self.reporter.send(Event(INTERVAL, self.attempt, self.progress.step, news))

    def _metadata(self) -> dict[str, Any]:
        progress = self.progress
        shapes = {name: list(shape) for name, shape in self.engine.parameter_shapes.items()}
        shapes |= {name: list(buffer.shape) for name, buffer in self.engine.buffers().items()}
        others = self.engine.state_shapes
        return ({"state_shapes": others} if others else {}) | {
            "step": progress.step,
            "optimizer_step": self.engine.num_updates,
            "tokens": progress.tokens,
            "loss_scale": self.engine.loss_scale_state(),
            "fingerprint": self.spec.fingerprint(),
            "shapes": shapes,
            "zero_stage": self.plan.zero_stage,
            "num_ranks": self.ranks.num_ranks,
            "best": progress.best,
            "validations_without_better": progress.validations_without_better,
            "validation": progress.last_validation,
            "validation_step": progress.last_validation_step,
            "rows_chain": {"after": progress.chain_after, "digest": progress.chain},
        }


def verify_together(run: Run, reader: CheckpointReader, ranks: Ranks) -> None:
    """Hash all files, each on one rank. What one finds wrong another one reads again, on another
    node if there is one: a node with bad memory must not condemn what took days to compute.

    Raises CheckpointDamaged, with the checkpoint set aside, or ReadsDiffer.
    """
    mine = {
        index: f"{socket.gethostname()}, rank {ranks.rank}: {problem}"
        for index in range(ranks.rank, reader.num_files, ranks.num_ranks)
        for problem in reader.verify_files([index])
    }
    found = {index: problem for part in ranks.gather(mine) for index, problem in part.items()}
    if not found:
        return
    # Ranks count node by node, so the one half the group away is elsewhere wherever one is.
    others = {index: (index + max(1, ranks.num_ranks // 2)) % ranks.num_ranks for index in found}
    again = [
        problem
        for index, other in sorted(others.items())
        if other == ranks.rank
        for problem in reader.verify_files([index])
    ]
    confirmed = [problem for part in ranks.gather(again) for problem in part]
    if not confirmed:
        raise ReadsDiffer(
            f"{'; '.join(found.values())}; read again, by another rank if there is one, all is as "
            "it was committed: memory, disk cache or network there is not to be trusted, and "
            f"checkpoint {reader.path} stays in use"
        )
    if ranks.rank == 0:
        run.set_aside(reader.info, "; ".join(confirmed))
    raise CheckpointDamaged(
        f"checkpoint {reader.path} is damaged: {'; '.join(confirmed)}; it was set aside, and the "
        "one before is used"
    )


def make_dropout_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """64 bits from the place in a run, for whatever seed and however long a run: a sum of products
    would overflow, and give neighbouring places the same randomness."""
    place = struct.pack("<4Q", seed, step, rank, micro_batch)
    return int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little")


def _memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank: on a GPU what torch reserved, on a CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
