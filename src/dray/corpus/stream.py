"""The stream: token shards to the ranks, in the order's order, through Ray Data or through a plain
iterator.

A `RowStream` is a small frozen description of what a worker group reads from one step on. It is cut
into segments (some steps, or a part of a validation pass), and these into loads: a load is one
block a rank, of one long segment or of several short ones. Ray Data runs one read task a block and
hands block k to rank k mod num_ranks; the worker checks every row id it receives against the order,
so that a stream that were ever out of order would fail instead of training on the wrong rows.

Nothing here grows with the run or the corpus: segments are made as they are needed, Ray Data plans
a window of loads at a time, and a read task names the corpus, whose manifest each process loads
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dray.corpus.manifest import Manifest, Split, load_manifest
from dray.corpus.rewriting import Rewriter
from dray.corpus.shards import read_groups
from dray.corpus.tables import take_rows
from dray.errors import CorpusError
from dray.order import PADDING, Ints, LeftOut, Order, Segment, SourceCount, make_segments
from dray.processes.ahead import run_ahead
from dray.storage.filesystem import share_filesystem

BLOCK_BYTES = 4 * 1024 * 1024
"""Bytes of rows in one rank's block: large enough that Ray's cost per block (milliseconds)
vanishes."""
SEGMENT_BYTES = 64 * 1024 * 1024
"""Bytes of rows in the blocks of all ranks together: the groups that they share stay in a reader's
memory."""
LOAD_SEGMENTS = 32
"""Segments in one load at most. Where steps are small and validated often, a read task for each of
them costs more than the step."""
WINDOW_TASKS, LEAST_WINDOW = 2048, 32
"""Read tasks that Ray Data plans at a time, and the loads that a window holds at least."""

Load = tuple[Segment, ...]
"""Consecutive segments, whose rows for a rank come in one block."""


def make_order(manifest: Manifest, seed: int) -> Order:
    """The order of a corpus' training rows under a seed."""
    sources = [SourceCount(source.num_rows, source.weight) for source in manifest.train.sources]
    return Order(sources, manifest.group_rows, seed)


_manifests: dict[str, Manifest] = {}
"""Of the corpora that this process has met, by folder."""


def remember_manifest(folder: str, manifest: Manifest) -> None:
    """Keep a manifest that this process has, so that its streams need not read it again."""
    _manifests[folder] = manifest


def recall_manifest(folder: str, key: str) -> Manifest:
    """The manifest of the corpus in a folder, read once a process. Raises CorpusError if it is
    none, or another one."""
    if folder not in _manifests or _manifests[folder].key != key:
        remember_manifest(folder, load_manifest(*share_filesystem(folder)))
    manifest = _manifests[folder]
    if manifest.key != key:
        raise CorpusError(
            folder,
            f"holds the corpus {manifest.key}",
            f"the run reads the corpus {key}",
            "put the run's own corpus there again",
        )
    return manifest


@dataclass(frozen=True)
class RowStream:
    """What one worker group reads: from `start_step` (already done) to `num_steps`.

    It is sent with every read task and names the corpus instead of holding its manifest.
    `left_out`: batches of the endless sequence that are never read (`order.LeftOut`), ascending.
    """

    folder: str
    key: str
    """Of the corpus, as its manifest has it."""
    seed: int
    global_rows: int
    num_ranks: int
    rows_per_rank: int
    micro_rows: int
    start_step: int
    num_steps: int
    validate_every: int | None = None
    """Steps between validation passes; the last step always has one, if there are validation
    rows."""
    max_validation_rows: int | None = None
    left_out: tuple[int, ...] = ()
    rewriter: Rewriter | None = None
    """What training rows become as they are read; None: they are read as they lie."""
    block_bytes: int = BLOCK_BYTES
    window_tasks: int = WINDOW_TASKS

    @property
    def manifest(self) -> Manifest:
        return recall_manifest(self.folder, self.key)

    @cached_property
    def order(self) -> Order:
        return make_order(self.manifest, self.seed)

    @cached_property
    def _left_out(self) -> LeftOut:
        return LeftOut(self.left_out)

    @cached_property
    def num_validation_rows(self) -> int:
        rows = self.manifest.validation.num_rows if self.manifest.validation else 0
        return min(rows, self.max_validation_rows or rows)

    def validates_after(self, step: int) -> bool:
        """Whether a validation pass follows this step: not where there are no validation rows."""
        due = step == self.num_steps or bool(
            self.validate_every and step % self.validate_every == 0
        )
        return due and self.num_validation_rows > 0

    @cached_property
    def _most_rows(self) -> tuple[int, int]:
        """Rows of one rank's block, and of the blocks of all ranks together."""
        row_bytes = self.manifest.row_bytes
        return max(1, self.block_bytes // row_bytes), max(1, SEGMENT_BYTES // row_bytes)

    def segments(self) -> Iterator[Segment]:
        """Steps and parts of validation passes, in the order in which they are consumed."""
        rows_per_block, rows_per_segment = self._most_rows
        micro_batches = max(
            1, min(rows_per_block, rows_per_segment // self.num_ranks) // self.micro_rows
        )
        return make_segments(
            start_step=self.start_step,
            num_steps=self.num_steps,
            steps_per_block=max(
                1, min(rows_per_block // self.rows_per_rank, rows_per_segment // self.global_rows)
            ),
            validate_every=self.validate_every,
            num_validation_rows=self.num_validation_rows,
            validation_rows_per_block=micro_batches * self.micro_rows * self.num_ranks,
        )

    def loads(self) -> Iterator[Load]:
        """The segments, as many together as fit into a block a rank."""
        rows_per_block, rows_per_segment = self._most_rows
        load, held = list[Segment](), 0
        for segment in self.segments():
            rows = self.rows_of(segment)
            if load and (
                held + rows > rows_per_block
                or (held + rows) * self.num_ranks > rows_per_segment
                or len(load) == LOAD_SEGMENTS
            ):
                yield tuple(load)
                load, held = [], 0
            load.append(segment)
            held += rows
        if load:
            yield tuple(load)

    def windows(self) -> Iterator[list[Load]]:
        """The loads, as many at a time as Ray Data plans at once."""
        loads = self.loads()
        while window := list(islice(loads, max(LEAST_WINDOW, self.window_tasks // self.num_ranks))):
            yield window

    def rows_of(self, segment: Segment) -> int:
        """Rows of a segment in one rank's block, the empty slots included."""
        if segment.kind == "train":
            return (segment.last - segment.first + 1) * self.rows_per_rank
        num_rows = segment.stop_row - segment.start_row
        return -(-num_rows // (self.num_ranks * self.micro_rows)) * self.micro_rows

    def row_ids(self, segment: Segment, rank: int) -> Ints:
        """Row ids of a segment for one rank; PADDING where a slot is empty. `rows_of` long, a
        multiple of `micro_rows`."""
        if segment.kind == "train":
            positions, filled = self._positions(segment, rank)
            ids = np.full(filled.shape, PADDING, dtype=np.int64)
            ids[filled] = self.order.rows_at(positions)
            return ids
        num_rows, share = segment.stop_row - segment.start_row, self.rows_of(segment)
        slots = rank * share + np.arange(share, dtype=np.int64)
        return np.where(slots < num_rows, segment.start_row + slots, PADDING)

    def _positions(self, segment: Segment, rank: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """The positions of the order that a rank reads in a training segment, and which of its
        slots hold one."""
        steps = np.arange(segment.first, segment.last + 1, dtype=np.int64)
        slots = rank * self.rows_per_rank + np.arange(self.rows_per_rank, dtype=np.int64)
        taken = slots < self.global_rows
        positions = self._left_out.batches_at(steps)[:, None] * self.global_rows + slots[taken]
        return positions.reshape(-1), np.tile(taken, len(steps))

    def _epochs(self, segment: Segment, rank: int) -> Ints:
        """The epoch in which each slot of a training segment is read; 0 where it holds no row."""
        positions, filled = self._positions(segment, rank)
        epochs = np.zeros(filled.shape, np.int64)
        epochs[filled] = self.order.epochs_at(positions)[1]
        return epochs

    def read_block(self, load: Load, rank: int) -> pa.Table:
        """One rank's block: the columns of the token shards, as augmentation has those of training
        rows, and `row_id` (int64; PADDING for rows to ignore), segment after segment."""
        pieces: dict[Segment, pa.Table] = {}
        for kind, split in (
            ("train", self.manifest.train),
            ("validation", self.manifest.validation),
        ):
            segments = [segment for segment in load if segment.kind == kind]
            if not segments:
                continue
            if split is None:
                raise ValueError(f"the corpus {self.key} has no validation rows for {segments[0]}")
            ids = np.concatenate([self.row_ids(segment, rank) for segment in segments])
            rows = read_rows(self.folder, self.manifest, split, ids)
            if self.rewriter is not None and kind == "train":
                epochs = np.concatenate([self._epochs(segment, rank) for segment in segments])
                rows = self.rewriter.rewrite(rows, epochs, self.folder, self.manifest)
            elif self.rewriter is not None:
                rows = self.rewriter.leave(rows)
            pieces |= dict(self.cut(rows, segments))
        block = pa.concat_tables(pieces[segment] for segment in load)
        return block if len(load) == 1 else block.combine_chunks()

    def cut(self, block: pa.Table, load: Iterable[Segment]) -> Iterator[tuple[Segment, pa.Table]]:
        """The rows of each segment of a block, none of them copied."""
        start = 0
        for segment in load:
            yield segment, block.slice(start, self.rows_of(segment))
            start += self.rows_of(segment)

    def blocks(self, rank: int) -> Iterator[pa.Table]:
        """One rank's blocks without Ray."""
        for load in self.loads():
            yield self.read_block(load, rank)


def read_rows(folder: str, manifest: Manifest, split: Split, ids: Ints) -> pa.Table:
    """Rows of a split by id, in the order of `ids`; a PADDING slot repeats some row, marked by its
    id."""
    group_rows = manifest.group_rows
    filesystem, path = share_filesystem(folder)
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
        pieces.append(take_rows(table, nth * group_rows + local % group_rows))
        places.append(chosen)
    rows = pieces[0] if len(pieces) == 1 else pa.concat_tables(pieces)
    if len(pieces) > 1:
        rows = take_rows(rows, np.argsort(np.concatenate(places), kind="stable"))
    return rows.append_column("row_id", pa.array(ids))


def build_dataset(
    stream: RowStream, num_cpus: float = 1.0, concurrency: int | None = None, **options: Any
) -> Any:
    """The stream as a Ray Dataset of one block a load and rank, in the order of consumption.

    Each execution gives the next window of the stream; `streaming_split` executes a dataset anew
    whenever all ranks begin an iteration, so `iterate_windows` asks for one window after the other.
    `num_cpus`: logical CPUs of one read task; as many run at once as there are left over where the
    `options`, Ray's, say that they may be, but no more than `concurrency`.
    """
    import ray.data

    dataset = ray.data.read_datasource(
        build_datasource(stream),
        override_num_blocks=1,
        num_cpus=num_cpus,
        concurrency=concurrency,
        ray_remote_args=options or None,
    )
    dataset.context.execution_options = ray.data.ExecutionOptions(preserve_order=True)
    dataset.context.target_max_block_size = None  # a block stays whole, whatever its size
    return dataset


def build_datasource(stream: RowStream) -> Any:
    """What gives Ray Data its read tasks: those of the next window at each execution, one a load
    and rank."""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class _Rows(Datasource):  # type: ignore[misc]
        windows: Iterator[list[Load]] | None = None

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
        ) -> list[ReadTask]:
            if (
                data_context is None
            ):  # planning asks what a task is like; an execution tells its context
                return [_task(next(reader.loads()), 0)]
            if self.windows is None:
                self.windows = reader.windows()
            return [
                _task(load, rank)
                for load in next(self.windows, [])
                for rank in range(reader.num_ranks)
            ]

    def _task(load: Load, rank: int) -> ReadTask:
        metadata = BlockMetadata(
            num_rows=None, size_bytes=BLOCK_BYTES, input_files=None, exec_stats=None
        )
        return ReadTask(lambda: [reader.read_block(load, rank)], metadata)

    # The tasks are pickled one by one: without what it has cached the stream is small.
    reader = replace(stream)
    return _Rows()


def iterate_windows(
    stream: RowStream, iterate: Callable[[], Iterable[pa.Table]]
) -> Iterator[pa.Table]:
    """One rank's blocks through Ray Data: `iterate` begins an iteration over its split, which holds
    one window.

    A thread goes one block ahead of the consumer, so that the next window is under way before this
    one is used up. It starts at once.
    """
    blocks = (block for _ in stream.windows() for block in iterate())
    return run_ahead(blocks, 1, name="stream")


def check_rows(
    stream: RowStream, blocks: Iterable[pa.Table], rank: int
) -> Iterator[tuple[Segment, pa.Table]]:
    """Each segment with its rows, after the proof that its block holds exactly the rows that the
    order asks for."""
    arrived = iter(blocks)
    for load in stream.loads():
        block = next(arrived, None)
        at = f"{load[0].kind} of step {load[0].first}"
        if block is None:
            raise RuntimeError(f"the stream ended before {at}")
        wanted = np.concatenate([stream.row_ids(segment, rank) for segment in load])
        if not np.array_equal(block.column("row_id").to_numpy(), wanted):
            raise RuntimeError(f"the stream is out of order at {at} on rank {rank}")
        yield from stream.cut(block, load)
