"""What is sent to the workers: a small frozen description of a run, where an attempt starts, and its stream of rows.

It is unpickled in every process that Ray Train starts, most of which never compute: it imports neither torch nor ray.
"""

from __future__ import annotations

from dataclasses import dataclass

from dray.corpus.manifest import Manifest
from dray.corpus.stream import RowStream
from dray.plan import Plan
from dray.spec import Spec
from dray.store import CheckpointInfo, Run


@dataclass(frozen=True)
class Job:
    """Everything that a rank needs to know; small, and safe to send."""

    spec: Spec
    plan: Plan
    corpus: str
    manifest: Manifest
    storage: str
    run_name: str


@dataclass(frozen=True)
class Attempt:
    """One start of the worker group: its number, and the checkpoint that it goes on from."""

    number: int
    checkpoint: CheckpointInfo | None

    @property
    def start_step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0


def begin_attempt(job: Job, num_ranks: int) -> Attempt:
    """Rank 0 decides for all where this attempt starts, and writes it down."""
    run = Run.open(job.storage, job.run_name)
    newest = run.latest_checkpoint()
    return Attempt(run.begin_attempt(num_ranks=num_ranks, start_step=newest.step if newest else 0), newest)


def make_stream(job: Job, num_ranks: int, start_step: int) -> RowStream:
    """What `num_ranks` ranks read from `start_step` on."""
    spec, batch, num_steps = job.spec, job.plan.batch, job.plan.num_steps
    if num_steps is None:
        raise ValueError("the plan was made without the corpus' size")
    every = spec.validation.every_steps
    due = {num_steps, *(range(every, num_steps, every) if every else ())}
    rows_per_rank = -(-spec.batch.global_rows // (num_ranks * batch.micro_rows)) * batch.micro_rows
    return RowStream(
        folder=job.corpus, manifest=job.manifest, seed=spec.seed, global_rows=spec.batch.global_rows,
        num_ranks=num_ranks, rows_per_rank=rows_per_rank, micro_rows=batch.micro_rows, start_step=start_step,
        num_steps=num_steps, validation_steps=tuple(sorted(due)), max_validation_rows=spec.validation.max_rows,
    )
