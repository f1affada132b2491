"""Batch arithmetic: global rows = ranks × micro rows × accumulation, and how a run's duration
becomes steps.

Pure numbers. A fixed number of workers must divide the batch exactly; an elastic group fills up
with rows that have no targets, which cost time but never change the loss.
"""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict

from dray.errors import PlanError
from dray.spec import Duration


class BatchPlan(BaseModel):
    """How one optimiser update is cut: num_ranks × rows_per_rank = global_rows + padded_rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_ranks: int
    micro_rows: int
    accumulation: int
    rows_per_rank: int
    global_rows: int
    padded_rows: int


def make_batch(global_rows: int, num_ranks: int, micro_rows: int, *, elastic: bool) -> BatchPlan:
    """Cut a global batch. Raises PlanError where a fixed group cannot divide it, naming what
    would."""
    unit = num_ranks * micro_rows
    if global_rows % unit and not elastic:
        raise _indivisible(global_rows, num_ranks, micro_rows)
    accumulation = -(-global_rows // unit)
    rows_per_rank = accumulation * micro_rows
    return BatchPlan(
        num_ranks=num_ranks,
        micro_rows=micro_rows,
        accumulation=accumulation,
        rows_per_rank=rows_per_rank,
        global_rows=global_rows,
        padded_rows=rows_per_rank * num_ranks - global_rows,
    )


def micro_candidates(global_rows: int, num_ranks: int, *, elastic: bool) -> list[int]:
    """Micro batches that a rank may take, greatest first: those that pad no more rows than they
    must.

    Raises PlanError if a fixed group cannot share the rows out equally.
    """
    if global_rows % num_ranks and not elastic:
        raise _indivisible(global_rows, num_ranks, 1)
    rows_per_rank = -(-global_rows // num_ranks)
    small = [rows for rows in range(1, math.isqrt(rows_per_rank) + 1) if rows_per_rank % rows == 0]
    return sorted({*small, *(rows_per_rank // rows for rows in small)}, reverse=True)


def num_steps_of(
    duration: Duration, global_rows: int, tokens_per_step: int, num_rows: int | None
) -> int | None:
    """Optimiser updates of a run; None when epochs are wanted and the number of rows is not known
    yet."""
    if duration.steps is not None:
        return duration.steps
    if duration.tokens is not None:
        return max(1, math.ceil(duration.tokens / tokens_per_step))
    if num_rows is None:
        return None
    # The last batch of a pass is filled up from the next one, so that no row is dropped.
    return max(1, math.ceil((duration.epochs or 0.0) * num_rows / global_rows))


def _indivisible(global_rows: int, num_ranks: int, micro_rows: int) -> PlanError:
    unit = num_ranks * micro_rows
    below, above = global_rows // unit * unit, -(-global_rows // unit) * unit
    # At 100 rows on 128 the nearest is 128: a batch of 0 rows is none.
    nearest = f"{above}" if not below else f"{below} or {above}"
    factors = f"{num_ranks} rank{'s' * (num_ranks > 1)} × {micro_rows} row{'s' * (micro_rows > 1)}"
    fewer = [ranks for ranks in range(num_ranks, 0, -1) if global_rows % (ranks * micro_rows) == 0]
    other = f", or resources.workers = {fewer[0]}" if fewer else ""
    return PlanError(
        f"batch.global_rows = {global_rows}",
        f"not a multiple of {factors} ({unit})",
        way_out=f"nearest: {nearest}{other}",
    )
