"""A rank's rows as batches, made in a thread ahead of the step that wants them.

Rows are proven to be those of the order, collated, counted and, for a GPU, pinned, while the step
before is computed. What a step is agreed on by, its targets, tokens and row ids, is known here,
without any device. At most READY_PIECES are ready at once.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from dray.corpus.manifest import Manifest
from dray.corpus.stream import RowStream, check_rows
from dray.order import Ints
from dray.processes.ahead import run_ahead
from dray.rank.device import pin
from dray.rank.group import Ranks
from dray.tasks import Batch, Task, draw_of
from dray.tasks.rows import HIDDEN

READY_PIECES = 2

T = TypeVar("T")


@dataclass(frozen=True)
class StepRows:
    """This rank's share of one step."""

    step: int
    batches: list[Batch]
    """Its micro batches, pinned where there is a GPU."""
    num_targets: int
    num_tokens: int
    row_ids: Ints
    micro_rows: int
    """Rows of a micro batch."""

    def ids_of(self, index: int) -> Ints:
        """The rows of a micro batch; those that hold no row are negative."""
        return self.row_ids[index * self.micro_rows : (index + 1) * self.micro_rows]


@dataclass(frozen=True)
class ValidationRows:
    """This rank's share of a part of the validation pass that follows a step."""

    step: int
    batches: Generator[Batch]
    """Its micro batches, made as they are asked for: a part of a pass may hold many."""
    is_last: bool


def feed(
    stream: RowStream, blocks: Iterable[pa.Table], task: Task, ranks: Ranks, seed: int = 0
) -> Generator[StepRows | ValidationRows]:
    """What a rank has to do, in order; closing it ends the thread. Raises what reading raises.

    `seed`: of what tasks draw for their rows.
    """
    return _run_ahead(_make_pieces(stream, blocks, task, ranks, seed))


def _make_pieces(
    stream: RowStream, blocks: Iterable[pa.Table], task: Task, ranks: Ranks, seed: int
) -> Iterator[StepRows | ValidationRows]:
    def collate(rows: pa.Table, step: int) -> Iterator[Batch]:
        draw = draw_of(seed, step)
        for at in range(0, rows.num_rows, stream.micro_rows):
            some = rows.slice(at, stream.micro_rows)
            batch = task.collate(some, draw)
            if step:
                batch = hide_tokens(task.vary(batch, some, draw), some, stream.manifest)
            yield pin(batch, ranks.device)

    for segment, block in check_rows(stream, blocks, ranks.rank):
        if segment.kind == "validation":
            is_last = segment.stop_row >= stream.num_validation_rows
            yield ValidationRows(segment.first, _run_ahead(collate(block, 0)), is_last)
            continue
        for step in range(segment.first, segment.last + 1):
            rows = block.slice((step - segment.first) * stream.rows_per_rank, stream.rows_per_rank)
            batches, row_ids = list(collate(rows, step)), rows.column("row_id").to_numpy()
            tokens = rows.column("num_tokens").to_numpy()[row_ids >= 0].sum()
            yield StepRows(
                step,
                batches,
                sum(task.num_targets(batch) for batch in batches),
                int(tokens),
                row_ids,
                stream.micro_rows,
            )


def hide_tokens(batch: Batch, rows: pa.Table, manifest: Manifest) -> Batch:
    """A batch whose model sees a mask in the place of the tokens that augmentation hides; labels
    stay as they are."""
    if HIDDEN not in rows.column_names:
        return batch
    if manifest.mask_token_id is None:
        raise ValueError(f"the corpus {manifest.key} hides tokens, and has no mask token")
    lists = rows.column(HIDDEN).combine_chunks()
    places = torch.from_numpy(lists.flatten().to_numpy().astype("int64"))
    sizes = pc.list_value_length(lists).to_numpy()
    row = torch.from_numpy(np.repeat(np.arange(rows.num_rows), sizes))
    ids = batch["input_ids"].clone()
    inside = places < ids.shape[1]
    ids[row[inside], places[inside]] = manifest.mask_token_id
    return {**batch, "input_ids": ids}


def _run_ahead(pieces: Iterator[T]) -> Generator[T]:
    """Ahead of the step, but not before the first piece is asked for."""
    yield from run_ahead(pieces, READY_PIECES, name="feeder")
