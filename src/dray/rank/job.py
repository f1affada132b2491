"""What is sent to the workers: a small frozen description of a run, where an attempt starts, and
its stream of rows.

It is unpickled in every process that Ray Train starts, most of which never compute: it imports
neither torch nor ray.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dray.corpus.manifest import Manifest
from dray.corpus.rewriting import Rewriter
from dray.corpus.stream import RowStream, remember_manifest
from dray.doctor.budget import SmallerBatch
from dray.errors import StorageNotShared
from dray.models.counting import make_counted_plan
from dray.origin import Origin
from dray.plan import Plan, Shape
from dray.runs import Run, find_resume_checkpoint
from dray.runs.records import AttemptRecord
from dray.spec import Spec
from dray.storage.filesystem import shown


@dataclass(frozen=True)
class Job:
    """Everything that a rank needs to know; small, and safe to send."""

    spec: Spec
    plan: Plan
    corpus: str
    manifest: Manifest
    storage: str
    run_name: str
    config: Mapping[str, Any] | None = None
    """The model's configuration as the run keeps it; none: made from the spec, and kept by the
    first attempt."""
    weights: Origin | None = None
    """What the run starts from; none: its weights are drawn, or it keeps nothing of a folder."""
    driver: int | None = None
    """Number of the driver whose attempts these are: none of an earlier one's commits once it has
    taken over."""
    until_step: int | None = None
    """The ranks save and leave once they have done this step; none: they go to the end."""
    run_nonce: str = ""
    """What the run's record holds as the driver sees it: a node that sees another one has a storage
    of its own."""

    @property
    def flat_name(self) -> str:
        """The run's name as that of a file: a trial has its sweep's before a slash."""
        return self.run_name.replace("/", "-")


def check_shared(job: Job) -> None:
    """Raise StorageNotShared where this process does not see the driver's run. A node may have
    joined since the driver looked at all of them."""
    found = Run.find(job.storage, job.run_name)
    if found is None or str(found.record().get("nonce", "")) != job.run_nonce:
        raise not_shared(job.storage, [socket.gethostname()])


def not_shared(storage: str, nodes: Sequence[str]) -> StorageNotShared:
    """What is to be said of nodes that do not see the driver's storage."""
    return StorageNotShared(
        shown(storage),
        f"is not the same folder on {', '.join(nodes)} as on the driver's node",
        "every node writes its part of a checkpoint there",
        "name a shared file system or a bucket with --storage, or mount it there, too",
    )


@dataclass(frozen=True)
class Attempt:
    """One start of the worker group, as its record in the run has it."""

    number: int
    num_ranks: int
    start_step: int
    checkpoint: str
    """Path, below the storage, of the checkpoint that it goes on from; empty: from the initial
    weights."""
    plan: Plan
    """The job's plan for this number of ranks, and for the micro batch that memory allows by
    now."""
    left_out: tuple[int, ...] = ()
    """Batches that are never read (`order.LeftOut`): a rewind left them out."""


def make_corpus_plan(spec: Spec, shape: Shape, manifest: Manifest, **settings: Any) -> Plan:
    """The plan with the corpus' real counts; `settings` are those of `make_plan`. Without
    `counted` among them the model is counted, where no formula is exact."""
    pad = manifest.eos_token_id if manifest.pad_token_id is None else manifest.pad_token_id
    return make_counted_plan(
        spec,
        shape,
        num_rows=manifest.train.num_rows,
        num_tokens=manifest.train.num_tokens,
        vocab_size=manifest.vocab_size,
        num_labels=len(manifest.labels) or None,
        pad_token_id=pad,
        **settings,
    )


def begin_attempt(job: Job, num_ranks: int) -> AttemptRecord:
    """Decide for all ranks where this attempt starts, and write it down. Returns its record; called
    by rank 0.

    Raises CheckpointsLost where the run would have to begin again.
    """
    run = Run.open(job.storage, job.run_name)
    newest = find_resume_checkpoint(run)
    start_step = newest.step if newest else 0
    fields: dict[str, Any] = {"checkpoint": run.keep_path(newest.path) if newest else ""}
    remembered = run.record()
    if remembered.get("left_out"):
        fields["left_out"] = tuple(remembered["left_out"])
    smaller = SmallerBatch.from_record(remembered)
    if smaller and smaller.is_needed(start_step):
        fields["micro_rows"] = smaller.micro_rows
    number = run.begin_attempt(num_ranks, start_step, job.driver, **fields)
    return AttemptRecord(number, num_ranks, start_step, driver=job.driver or 0, **fields)


def make_attempt(job: Job, record: AttemptRecord) -> Attempt:
    """An attempt from its record; the same on every rank."""
    plan, num_ranks, micro_rows = job.plan, record.num_ranks, record.micro_rows
    spec, manifest = job.spec, job.manifest
    if micro_rows is not None:
        spec = spec.model_copy(
            update={"batch": spec.batch.model_copy(update={"micro_rows": micro_rows})}
        )
    if num_ranks != plan.num_ranks or micro_rows is not None:
        plan = make_corpus_plan(
            spec,
            plan.shape,
            manifest,
            num_ranks=num_ranks,
            config=job.config,
            counted=plan.counted,
        )
    return Attempt(
        record.number, num_ranks, record.start_step, record.checkpoint, plan, record.left_out
    )


def make_stream(job: Job, attempt: Attempt) -> RowStream:
    """What the attempt's ranks read, from where it starts."""
    spec, batch, num_steps = job.spec, attempt.plan.batch, attempt.plan.num_steps
    num_ranks, start_step = attempt.num_ranks, attempt.start_step
    if num_steps is None:
        raise ValueError(f"{job.run_name}: the plan was made without the corpus' size")
    if job.until_step is not None:
        num_steps = min(num_steps, job.until_step)
    rows_per_rank = -(-spec.batch.global_rows // (num_ranks * batch.micro_rows)) * batch.micro_rows
    remember_manifest(job.corpus, job.manifest)
    return RowStream(
        folder=job.corpus,
        key=job.manifest.key,
        seed=spec.seed,
        global_rows=spec.batch.global_rows,
        num_ranks=num_ranks,
        rows_per_rank=rows_per_rank,
        micro_rows=batch.micro_rows,
        start_step=start_step,
        num_steps=num_steps,
        validate_every=spec.validation.every_steps,
        max_validation_rows=spec.validation.max_rows,
        left_out=attempt.left_out,
        rewriter=None
        if spec.augmentation is None
        else Rewriter(spec.augmentation, spec.task, spec.seed),
    )
