"""What is sent to the workers: a small frozen description of a run, and the stream of rows that follows from it.

It is unpickled in every process that Ray Train starts, most of which never compute: it imports neither torch nor ray.
"""

from __future__ import annotations

from dataclasses import dataclass

from dray.corpus.manifest import Manifest
from dray.corpus.stream import RowStream
from dray.plan import Plan
from dray.spec import Spec


@dataclass(frozen=True)
class Job:
    """Everything that a rank needs to know; small, and safe to send."""

    spec: Spec
    plan: Plan
    corpus: str
    manifest: Manifest
    storage: str
    run_name: str


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
