"""The training loop that every rank runs, readable top to bottom.

A rank restores, then takes its blocks as they come: steps of training, and at the right places parts of a validation
pass. It reports what it measured, commits checkpoints together with the others, and stops when all agree to. It knows
neither Ray nor the command line.
"""

from __future__ import annotations

import hashlib
import math
import resource
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import torch

from dray.corpus.stream import RowStream, check_rows
from dray.engine import Engine, Update, build_engine, import_deepspeed
from dray.errors import DrayError
from dray.job import Attempt, Job
from dray.models import (
    build_model,
    enable_activation_checkpointing,
    import_transformers,
    make_kept_config,
    parameter_groups,
    restore_rotary_buffers,
)
from dray.numerics import LossSpike, Watch
from dray.order import NO_STEPS, Ints, Segment, chain_digest, format_digest, row_digest
from dray.process import prepare_heap
from dray.pulse import Pulse
from dray.ranks import Ranks
from dray.saving import Outcome, Saver
from dray.schedule import learning_rate
from dray.store import LOWER_IS_BETTER, CheckpointReader, Run, inspect_checkpoint
from dray.tasks import Batch, Task, TaskMetrics, build_task
from dray.tasks.causal_lm import bits_per_byte
from dray.watchdog import agreement_seconds

_MEASURED_STEPS = 6  # the first of them is not typical
_LEAST_TIMEOUT_SECONDS, _TIMEOUT_STEPS = 300.0, 50  # of a collective, once steps are measured


def preload() -> None:
    """Import what a rank on CPUs uses, for the fork server."""
    prepare_heap()
    import_transformers()
    import_deepspeed("cpu")


class CheckpointDamaged(DrayError):
    """A checkpoint was committed and is no longer what it was; it is set aside by now."""


class ReadsDiffer(DrayError):
    """A rank reads a checkpoint otherwise than another rank does, who reads what was committed."""


class GroupDissolved(DrayError):
    """A machine is about to be taken away, or the group is to have another size; what was reached is saved."""


class Reporter(Protocol):
    """Where a rank's records go, and where a wish to stop comes from."""

    def send(self, record: dict[str, Any]) -> None: ...

    def stop_requested(self) -> bool: ...

    def notice_given(self) -> bool:
        """Whether a machine of the group is about to be taken away, or the group is to have another size."""

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
    """Chained digest of the rows of all steps after `chain_after`: what the weights were trained on."""
    best: float | None = None
    validations_without_better: int = 0
    last_validation: dict[str, float] = field(default_factory=dict)
    last_validation_step: int = 0
    saved_at: float = field(default_factory=time.monotonic)
    saved_step: int = -1
    save_due: bool = False
    notice: bool = False
    """The group is about to end: the step is to be saved for that, and no other one begun."""


def train_rank(job: Job, ranks: Ranks, attempt: Attempt, reporter: Reporter, *, stream: RowStream,
               blocks: Iterable[pa.Table], pulse: Pulse) -> str:
    """Train from where the attempt starts to the end, on this rank's blocks of the stream.

    Returns how it ended: completed, early_stopped or interrupted.
    """
    run = Run.open(job.storage, job.run_name)
    pulse.enter("build", attempt.start_step)
    loop = _Loop(job, ranks, reporter, run=run, attempt=attempt, pulse=pulse)
    pulse.enter("restore")
    loop.restore()
    pulse.enter("data")
    reporter.send({"kind": "ready", "rank": ranks.rank, "attempt": attempt.number, "step": stream.start_step,
                   "num_ranks": ranks.num_ranks})
    ended = loop.follow(check_rows(stream, blocks, ranks.rank), stream)
    if ranks.rank == 0:
        run.end_attempt(attempt.number, ended, loop.progress.step)
    reporter.flush()
    return ended


class _Loop:
    def __init__(self, job: Job, ranks: Ranks, reporter: Reporter, *, run: Run, attempt: Attempt,
                 pulse: Pulse) -> None:
        self.job, self.ranks, self.reporter, self.pulse = job, ranks, reporter, pulse
        self.run, self.attempt = run, attempt.number
        path = attempt.checkpoint and run.find_path(attempt.checkpoint)
        self.newest = inspect_checkpoint(run.filesystem, path) if path else None
        self.spec, self.plan = job.spec, attempt.plan
        self.task: Task = build_task(job.spec, job.manifest)
        self.engine: Engine = build_engine(self._build_model, self._make_groups, self.spec.optimizer, self.plan, ranks,
                                           make_objective=self._make_objective)
        self.saver = Saver(run, self.attempt, self.spec, engine=self.engine, ranks=ranks,
                           wait_stored=reporter.wait_stored)
        self.numbers = Watch(self.spec.numerics)
        self.step_seconds: list[float] = []
        self._bound_collectives(agreement_seconds(self.spec.watchdog))  # compilation takes its time
        restore_rotary_buffers(self.engine.module)  # half precision casts them, and long rows need their digits
        self.progress = _Progress(step=attempt.start_step, saved_step=attempt.start_step if self.newest else -1)
        self.metrics: TaskMetrics | None = None

    def _build_model(self, constructing: Any, gathering: Any) -> torch.nn.Module:
        manifest = self.job.manifest
        model: torch.nn.Module = build_model(
            self.spec, vocab_size=manifest.vocab_size, num_labels=len(manifest.labels) or 2, labels=manifest.labels,
            pad_token_id=manifest.pad_token_id, eos_token_id=manifest.eos_token_id,
            constructing=constructing, gathering=gathering, initial_weights=self.newest is None,
            config=self.job.config, weights=self.job.weights,
        )
        if self.job.config is None and self.ranks.rank == 0:
            self.run.keep_model(make_kept_config(model))
        if self.plan.activation_checkpointing:
            enable_activation_checkpointing(model)
        return model

    def _make_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        return parameter_groups(model, self.spec.optimizer.weight_decay)

    def _make_objective(self, model: torch.nn.Module) -> torch.nn.Module:
        return self.task.objective(model, self.spec.regularization.label_smoothing)

    def restore(self) -> None:
        """Copy the newest checkpoint into the engine, if there is one. Nothing unverified is read."""
        if self.newest is None:
            return
        with self.run.hold(self.newest), CheckpointReader(self.run, self.newest) as reader:
            verify_together(self.run, reader, self.ranks)
            state = reader.metadata
            self.engine.restore(reader, state["optimizer_step"], state["loss_scale"])
        for name in ("tokens", "best", "validations_without_better"):
            setattr(self.progress, name, state[name])
        self._restore_chain(state.get("rows_chain"))
        self.progress.last_validation = state["validation"]
        self.progress.last_validation_step = state["validation_step"]

    def _restore_chain(self, saved: dict[str, Any] | None) -> None:
        """Go on with the checkpoint's chain; anew where it has none, or is another run's, whose rows are not ours."""
        own = self.newest is not None and self.newest.path.startswith(f"{self.run.path}/")
        if saved and own:
            self.progress.chain_after, self.progress.chain = saved["after"], saved["digest"]
        else:
            self.progress.chain_after = self.progress.step

    def follow(self, segments: Iterator[tuple[Segment, pa.Table]], stream: RowStream) -> str:
        """Consume the stream to its end, or until all ranks agree to stop."""
        waiting_since = time.perf_counter()
        for segment, block in segments:
            data_wait = time.perf_counter() - waiting_since
            if segment.kind == "train":
                ended = self._train_steps(segment, block, stream, data_wait)
            else:
                ended = self._validate(segment, block, stream)
            if ended:
                self._save(last=True)
                return ended
            waiting_since = time.perf_counter()
            self.pulse.enter("data")
        self._save(last=True)
        return "completed"

    def _train_steps(self, segment: Segment, block: pa.Table, stream: RowStream, data_wait: float) -> str:
        """The steps of one block. Returns how the run ended, if it did."""
        for step in range(segment.first, segment.last + 1):
            rows = block.slice((step - segment.first) * stream.rows_per_rank, stream.rows_per_rank)
            stop = self._train_step(step, rows, data_wait if step == segment.first else 0.0)
            if stop:
                return "interrupted"
            # A step that is also validated is saved after that, with its metrics.
            if self.progress.save_due and not stream.validates_after(step):
                self._save()
        return ""

    def _train_step(self, step: int, rows: pa.Table, data_wait: float) -> bool:
        """One optimiser update. Returns whether all ranks agree to stop after it."""
        begun = time.perf_counter()
        micro_rows = self.plan.batch.micro_rows
        batches = [self.task.collate(rows.slice(at, micro_rows)) for at in range(0, rows.num_rows, micro_rows)]
        targets = sum(self.task.num_targets(batch) for batch in batches)
        row_ids = rows.column("row_id").to_numpy()
        tokens = int(rows.column("num_tokens").to_numpy()[row_ids >= 0].sum())
        # One small agreement a step: what the loss is divided by, what the batch was, and what to do after it.
        self.pulse.enter("agree", step)
        all_targets, all_tokens, all_digests, stops, saves, notices = self.ranks.sum(
            [targets, tokens, row_digest(row_ids), int(self.reporter.stop_requested()), int(self._minutes_due()),
             int(self.reporter.notice_given())])
        rate = learning_rate(self.spec.schedule, step, self.plan.num_steps or step, self.spec.optimizer.learning_rate)
        loss_sum, forward_seconds = self._forward_backward(step, batches, all_targets)
        self.pulse.enter("step")
        # Gradients are shared, losses are not: a bad one on one rank keeps all of them from the update.
        total_loss = self.ranks.total(loss_sum)
        update = self.engine.step(rate, withhold=not math.isfinite(total_loss))
        self.progress.step = step
        self.progress.chain = chain_digest(self.progress.chain, all_digests)
        self.progress.notice |= notices > 0
        self.progress.save_due |= saves > 0 or self._checkpoint_due(step) or self.progress.notice
        self.progress.tokens += all_tokens
        self.reporter.send({
            "kind": "step", "rank": self.ranks.rank, "attempt": self.attempt, "step": step,
            "num_ranks": self.ranks.num_ranks, "loss_sum": loss_sum, "num_targets": all_targets,
            "learning_rate": rate, "grad_norm": update.grad_norm, "applied": update.applied,
            "rows_digest": format_digest(all_digests),
            "tokens": self.progress.tokens, "step_tokens": all_tokens,
            "seconds": time.perf_counter() - begun + data_wait,
            "data_wait_seconds": data_wait, "forward_seconds": forward_seconds, "time": time.time(),
            "memory_bytes": _memory_bytes(self.ranks.device),
        })
        self._measure_step(time.perf_counter() - begun)
        self._watch_numbers(step, total_loss / max(1, all_targets), update, row_ids)
        return stops > 0

    def _forward_backward(self, step: int, batches: list[Batch], all_targets: int) -> tuple[float, float]:
        """The gradients of one step. Returns this rank's summed loss, and the seconds of its forward passes."""
        self.engine.train(True)
        loss_sum, seconds = torch.zeros((), dtype=torch.float64), 0.0
        for index, batch in enumerate(batches):
            # Dropout's randomness belongs to the place in the run, so there is no generator to save.
            torch.manual_seed(make_dropout_seed(self.spec.seed, step, self.ranks.rank, index))
            batch = {name: tensor.to(self.ranks.device, non_blocking=True) for name, tensor in batch.items()}
            self.pulse.enter("forward")
            started = time.perf_counter()
            terms, _ = self.engine(batch)
            summed, _ = terms["loss"]
            seconds += time.perf_counter() - started  # alone, below ZeRO-3: tells a slow rank from a waiting one
            # DeepSpeed averages gradients over ranks; the sum over all targets wants their number instead.
            mean = summed * (self.ranks.num_ranks / max(1, all_targets))
            self.pulse.enter("backward")
            self.engine.backward(mean, last=index == len(batches) - 1)
            loss_sum += summed.detach().double().cpu()
        return float(loss_sum), seconds

    def _measure_step(self, seconds: float) -> None:
        """Once steps are measured, a collective of the model's that takes many times as long is a hang, and raises."""
        if len(self.step_seconds) < _MEASURED_STEPS:
            self.step_seconds.append(seconds)
            if len(self.step_seconds) == _MEASURED_STEPS:
                slowest = max(self.ranks.gather(max(self.step_seconds[1:])))
                self._bound_collectives(max(_LEAST_TIMEOUT_SECONDS, _TIMEOUT_STEPS * slowest))

    def _bound_collectives(self, compute_seconds: float) -> None:
        """Agreements wait for rows and storage too, and the model's collectives for nothing but computing: all ranks
        have agreed on the step, or met before a part of a validation pass, when they come to those."""
        self.ranks.bound(compute_seconds=compute_seconds, agree_seconds=agreement_seconds(self.spec.watchdog))

    def _watch_numbers(self, step: int, loss: float, update: Update, row_ids: Ints) -> None:
        """Record a step without an update, with its rows, and a loss that leaps. Raises BadNumbers and LossSpike."""
        if update.applied:
            if self.numbers.is_spike(loss):
                self._meet_spike(step, loss)
            return
        reason = "the gradient norm is not finite" if math.isfinite(loss) else "the loss is not finite"
        rows = sorted(int(row) for part in self.ranks.gather(row_ids[row_ids >= 0]) for row in part)
        if self.ranks.rank == 0:
            self.reporter.send({"kind": "step_skipped", "attempt": self.attempt, "step": step, "reason": reason,
                                "rows": rows})
        if self.engine.loss_scale <= 1.0:  # a loss scale finds its level by overflowing
            self.numbers.skipped(step, reason, self.progress.saved_step)

    def _meet_spike(self, step: int, loss: float) -> None:
        text = f"the loss leapt to {loss:.4g} at step {step}"
        if self.ranks.rank == 0:
            self.reporter.send({"kind": "loss_spike", "attempt": self.attempt, "step": step, "loss": loss})
        if self.spec.numerics.spike == "rewind":
            self.saver.finish()
            raise LossSpike(step, f"{text}; the run goes back to its checkpoint before that, and leaves those rows out")

    def _checkpoint_due(self, step: int) -> bool:
        every = self.spec.checkpoint.every_steps
        return bool(every) and step % (every or 1) == 0

    def _minutes_due(self) -> bool:
        minutes = self.spec.checkpoint.every_minutes
        return self.ranks.rank == 0 and minutes is not None and time.monotonic() - self.progress.saved_at > minutes * 60

    def _validate(self, segment: Segment, rows: pa.Table, stream: RowStream) -> str:
        """One block of a validation pass. Returns how the run ended, if it did."""
        self.metrics = self.metrics or self.task.new_metrics()
        if self.plan.zero_stage == 3:  # its forward passes gather weights: no rank may still wait for its rows
            self.pulse.enter("agree")
            self.ranks.barrier()
        self.pulse.enter("validate")
        self.engine.train(False)
        with torch.no_grad():
            for at in range(0, rows.num_rows, self.plan.batch.micro_rows):
                batch = self.task.collate(rows.slice(at, self.plan.batch.micro_rows))
                batch = {name: tensor.to(self.ranks.device) for name, tensor in batch.items()}
                _, output = self.engine(batch)
                self.metrics.update(batch, output)
        if segment.stop_row < stream.num_validation_rows:
            return ""
        out_of_patience = self._end_validation(segment.first, self.metrics)
        self.metrics = None
        if out_of_patience:
            return "early_stopped"
        if self.progress.save_due:
            self._save()
        return ""

    def _end_validation(self, step: int, metrics: TaskMetrics) -> bool:
        """Merge the ranks' metrics and report them. Returns whether patience has run out."""
        values = self.task.new_metrics().merge(self.ranks.gather(metrics.state())).compute()
        progress, rule, held_out = self.progress, self.spec.validation, self.job.manifest.validation
        if self.spec.packs_rows and held_out is not None:
            values["bits_per_byte"] = bits_per_byte(values["loss"], held_out.num_tokens, held_out.num_text_bytes)
        progress.last_validation, progress.last_validation_step = values, step
        if self.ranks.rank == 0:
            self.reporter.send({"kind": "validation", "attempt": self.attempt, "step": step, **values})
        score = values[rule.metric] * (1 if rule.metric in LOWER_IS_BETTER else -1)
        better = progress.best is None or score < progress.best
        progress.best = score if better else progress.best
        progress.validations_without_better = 0 if better else progress.validations_without_better + 1
        return rule.patience is not None and progress.validations_without_better >= rule.patience

    def _save(self, *, last: bool = False) -> None:
        """Begin a checkpoint of the current step; the last one, and one before the group ends, are waited for.

        Raises GroupDissolved in the latter case, on every rank: steps past that checkpoint would only be done again.
        """
        progress, waits = self.progress, last or self.progress.notice
        self.pulse.enter("save")
        if progress.saved_step != progress.step:
            self.reporter.flush()  # no step is committed whose metrics could still be lost
            self._report_save(self.saver.begin(progress.step, self._metadata()))
            progress.saved_step, progress.saved_at, progress.save_due = progress.step, time.monotonic(), False
        if waits:
            outcome = self.saver.finish(last=last)
            self._report_save(outcome)
        if progress.notice and not last:
            saved = outcome is None or not outcome.problem
            if self.ranks.rank == 0 and saved:
                self.reporter.send({"kind": "saved_on_notice", "attempt": self.attempt, "step": progress.step})
            raise GroupDissolved(f"the group was to end; step {progress.step} is {'' if saved else 'not '}saved")

    def _report_save(self, outcome: Outcome | None) -> None:
        if outcome is None or self.ranks.rank != 0:
            return
        found = {"attempt": self.attempt, "step": outcome.step, "seconds": outcome.seconds,
                 "blocked_seconds": outcome.blocked_seconds}
        kind = "checkpoint_failed" if outcome.problem else "checkpoint"
        self.reporter.send({"kind": kind, **found, **({"problem": outcome.problem} if outcome.problem else {})})
        if outcome.kept_for:
            self.reporter.send({"kind": "retention_failed", "attempt": self.attempt, "step": outcome.step,
                                "problem": outcome.kept_for})

    def _metadata(self) -> dict[str, Any]:
        progress = self.progress
        shapes = {name: list(shape) for name, shape in self.engine.parameter_shapes.items()}
        shapes |= {name: list(buffer.shape) for name, buffer in self.engine.buffers().items()}
        return {
            "step": progress.step, "optimizer_step": self.engine.num_updates, "tokens": progress.tokens,
            "loss_scale": self.engine.loss_scale_state(), "fingerprint": self.spec.fingerprint(), "shapes": shapes,
            "zero_stage": self.plan.zero_stage, "num_ranks": self.ranks.num_ranks, "best": progress.best,
            "validations_without_better": progress.validations_without_better, "validation": progress.last_validation,
            "validation_step": progress.last_validation_step,
            "rows_chain": {"after": progress.chain_after, "digest": progress.chain},
        }


def verify_together(run: Run, reader: CheckpointReader, ranks: Ranks) -> None:
    """Hash all files, each on one rank. What one finds wrong another one reads again, on another node if there is
    one: a node with bad memory must not condemn what took days to compute.

    Raises CheckpointDamaged, with the checkpoint set aside, or ReadsDiffer.
    """
    mine = {index: f"{socket.gethostname()}, rank {ranks.rank}: {problem}"
            for index in range(ranks.rank, reader.num_files, ranks.num_ranks)
            for problem in reader.verify_files([index])}
    found = {index: problem for part in ranks.gather(mine) for index, problem in part.items()}
    if not found:
        return
    # Ranks count node by node, so the one half the group away is elsewhere wherever one is.
    others = {index: (index + max(1, ranks.num_ranks // 2)) % ranks.num_ranks for index in found}
    again = [problem for index, other in sorted(others.items()) if other == ranks.rank
             for problem in reader.verify_files([index])]
    confirmed = [problem for part in ranks.gather(again) for problem in part]
    if not confirmed:
        raise ReadsDiffer(f"{'; '.join(found.values())}; read again, by another rank if there is one, all is as it "
                          f"was committed: memory, disk cache or network there is not to be trusted, and checkpoint "
                          f"{reader.path} stays in use")
    if ranks.rank == 0:
        run.set_aside(reader.info, "; ".join(confirmed))
    raise CheckpointDamaged(f"checkpoint {reader.path} is damaged: {'; '.join(confirmed)}; it was set aside, and the "
                            "one before is used")


def make_dropout_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """64 bits from the place in a run, for whatever seed and however long a run: a sum of products would overflow, and
    give neighbouring places the same randomness."""
    place = struct.pack("<4Q", seed, step, rank, micro_batch)
    return int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little")


def _memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank: on a GPU what torch reserved, on a CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
