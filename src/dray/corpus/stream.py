"""The stream: token shards to the ranks, in the order's order, through Ray Data or through a plain iterator.

A `RowStream` is a small frozen description of what a worker group reads from one step on. It is cut into segments (some
steps, or a part of a validation pass), and each segment into one block a rank. Ray Data runs one read task a block and
hands block k to rank k mod num_ranks; the worker checks every row id it receives against the order, so that a stream
that were ever out of order would fail instead of training on the wrong rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from dray.corpus.manifest import Manifest, Split
from dray.corpus.shards import read_groups
from dray.order import (
    PADDING,
    Ints,
    LeftOut,
    Order,
    Segment,
    SourceCount,
    batch_positions,
    deal_to_ranks,
    make_segments,
)
from dray.store.filesystem import open_filesystem

BLOCK_BYTES = 4 * 1024 * 1024
"""Bytes of rows in one rank's block: large enough that Ray's cost per block (milliseconds) vanishes."""


def make_order(manifest: Manifest, seed: int) -> Order:
    """The order of a corpus' training rows under a seed."""
    sources = [SourceCount(source.num_rows, source.weight) for source in manifest.train.sources]
    return Order(sources, manifest.group_rows, seed)


@dataclass(frozen=True)
class RowStream:
    """What one worker group reads: from `start_step` (already done) to `num_steps`.

    `left_out`: batches of the endless sequence that are never read (`order.LeftOut`), ascending.
    """

    folder: str
    manifest: Manifest
    seed: int
    global_rows: int
    num_ranks: int
    rows_per_rank: int
    micro_rows: int
    start_step: int
    num_steps: int
    validation_steps: tuple[int, ...] = ()
    max_validation_rows: int | None = None
    left_out: tuple[int, ...] = ()

    @cached_property
    def order(self) -> Order:
        return make_order(self.manifest, self.seed)

    @cached_property
    def _left_out(self) -> LeftOut:
        return LeftOut(self.left_out)

    @property
    def num_validation_rows(self) -> int:
        rows = self.manifest.validation.num_rows if self.manifest.validation else 0
        return min(rows, self.max_validation_rows or rows)

    def validates_after(self, step: int) -> bool:
        """Whether a validation pass follows this step: not where there are no validation rows."""
        return self.num_validation_rows > 0 and step in self._validated_steps

    @cached_property
    def _validated_steps(self) -> frozenset[int]:
        return frozenset(self.validation_steps)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The blocks of every rank, in the order in which they are consumed."""
        row_bytes = self.manifest.sequence_tokens * (2 if self.manifest.vocab_size <= 65536 else 4) + 24
        rows_per_block = max(1, BLOCK_BYTES // row_bytes)
        micro_batches = max(1, rows_per_block // self.micro_rows)
        # Few tasks even in the longest runs: Ray Data plans them all when it starts.
        fewest = -(-(self.num_steps - self.start_step) // 4000)
        return tuple(make_segments(
            start_step=self.start_step,
            num_steps=self.num_steps,
            steps_per_block=max(1, rows_per_block // self.rows_per_rank, fewest),
            validation_steps=self.validation_steps if self.num_validation_rows else (),
            num_validation_rows=self.num_validation_rows,
            validation_rows_per_block=micro_batches * self.micro_rows * self.num_ranks,
        ))

    def row_ids(self, segment: Segment, rank: int) -> Ints:
        """Row ids of one rank's block; PADDING where a slot is empty. A multiple of `micro_rows` long."""
        if segment.kind == "train":
            batches = self._left_out.batches_at(np.arange(segment.first, segment.last + 1, dtype=np.int64))
            rows = self.order.rows_at(batch_positions(batches, self.global_rows))
            steps = rows.reshape(-1, self.global_rows)
            return np.concatenate([deal_to_ranks(step, self.num_ranks, self.rows_per_rank)[rank] for step in steps])
        rows = np.arange(segment.start_row, segment.stop_row, dtype=np.int64)
        share = -(-len(rows) // (self.num_ranks * self.micro_rows)) * self.micro_rows
        dealt: Ints = deal_to_ranks(rows, self.num_ranks, share)[rank]
        return dealt

    def read_block(self, segment: Segment, rank: int) -> pa.Table:
        """One rank's block: the columns of the token shards and `row_id` (int64; PADDING for rows to ignore)."""
        ids = self.row_ids(segment, rank)
        split = self.manifest.train if segment.kind == "train" else self.manifest.validation
        if split is None:
            raise ValueError("the corpus has no validation rows")
        return read_rows(self.folder, self.manifest, split, ids)

    def blocks(self, rank: int) -> Iterator[pa.Table]:
        """One rank's blocks without Ray."""
        for segment in self.segments:
            yield self.read_block(segment, rank)


def read_rows(folder: str, manifest: Manifest, split: Split, ids: Ints) -> pa.Table:
    """Rows of a split by id, in the order of `ids`; a PADDING slot repeats some row, marked by its id."""
    group_rows = manifest.group_rows
    filesystem, path = open_filesystem(folder)
    offsets = np.cumsum([0, *(source.num_rows for source in split.sources)])
    # Padding needs some row to be there; any will do, since it has no targets.
    wanted = np.where(ids == PADDING, max(0, int(ids.max(initial=0))), ids)
    pieces: list[pa.Table] = []
    places: list[Ints] = []
    for index, source in enumerate(split.sources):
        chosen = np.flatnonzero((wanted >= offsets[index]) & (wanted < offsets[index + 1]))
        if not len(chosen):
            continue
        local = wanted[chosen] - offsets[index]
        groups, nth = np.unique(local // group_rows, return_inverse=True)
        table = read_groups(filesystem, path, source, groups.tolist(), group_rows)
        pieces.append(_take(table, nth * group_rows + local % group_rows))
        places.append(chosen)
    rows = pieces[0] if len(pieces) == 1 else pa.concat_tables(pieces)
    if len(pieces) > 1:
        rows = _take(rows, np.argsort(np.concatenate(places), kind="stable"))
    return rows.append_column("row_id", pa.array(ids))


def _take(table: pa.Table, indices: Ints) -> pa.Table:
    """Rows by index. numpy gathers fixed-size lists several times faster than Arrow's take."""
    columns = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = column.chunk(0)
        if pa.types.is_fixed_size_list(column.type):
            width = column.type.list_size
            values = column.flatten().to_numpy(zero_copy_only=True).reshape(-1, width)
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values[indices].reshape(-1)), width)
        else:
            columns[name] = column.take(pa.array(indices))
    return pa.table(columns)


def build_dataset(stream: RowStream, num_cpus: float = 1.0) -> Any:
    """The stream as a Ray Dataset of one block a segment and rank, in the order of consumption.

    `num_cpus`: logical CPUs of one read task; as many run at once as the cluster has left over.
    """
    import ray.data
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class _Rows(Datasource):  # type: ignore[misc]
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
            return [_task(segment, rank) for segment in stream.segments for rank in range(stream.num_ranks)]

    def _task(segment: Segment, rank: int) -> ReadTask:
        metadata = BlockMetadata(num_rows=None, size_bytes=BLOCK_BYTES, input_files=None, exec_stats=None)
        return ReadTask(lambda: [reader.read_block(segment, rank)], metadata)

    # The tasks are pickled one by one: without its cached segments the stream is small.
    reader = replace(stream)
    count = len(stream.segments) * stream.num_ranks
    return ray.data.read_datasource(_Rows(), override_num_blocks=count, num_cpus=num_cpus)


def check_rows(stream: RowStream, blocks: Iterable[pa.Table], rank: int) -> Iterator[tuple[Segment, pa.Table]]:
    """Pairs each segment with its block, and proves that the block holds exactly the rows that the order asks for."""
    arrived = iter(blocks)
    for segment in stream.segments:
        block = next(arrived, None)
        if block is None:
            raise RuntimeError(f"the stream ended before {segment.kind} of step {segment.first}")
        if not np.array_equal(block.column("row_id").to_numpy(), stream.row_ids(segment, rank)):
            raise RuntimeError(f"the stream is out of order at {segment.kind} of step {segment.first} on rank {rank}")
        yield segment, block
