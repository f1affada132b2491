"""Token shards: Arrow IPC files of rows, one record batch a group, read by group.

Uncompressed, so that reading is copying. Each group carries its own CRC-32, so that a bit that
flips under a run is noticed by whoever reads it. Refuses groups that the source does not have.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as pafs

from dray.corpus.manifest import Shard, SourceRows
from dray.corpus.packing import Values, Varying
from dray.errors import CorpusError
from dray.storage.filesystem import is_local, make_folder, write_whole
from dray.storage.retrying import first_safe_line, retry

CHECKSUM = b"crc32"
CACHED_BYTES = 64 * 1024 * 1024
"""Groups that a process keeps: those that the blocks of one segment share
(`stream.SEGMENT_BYTES`)."""
CACHED_SHARDS = 32
"""Shards that a process keeps open."""


@dataclass(frozen=True)
class Stored:
    """A column of rows as it is stored: numbers, one, `width`, or as many as each row has."""

    name: str
    dtype: str
    width: int | None = None
    """None: one number a row."""
    varies: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.width is None else (self.width,)

    @property
    def row_bytes(self) -> int:
        """Of a row, where it is the same for all."""
        return np.dtype(self.dtype).itemsize * (1 if self.width is None else self.width)


def stored_columns(
    task: Any, sequence_tokens: int, dtype: str, num_labels: int = 0
) -> list[Stored]:
    """The columns of a task's rows; `dtype` of the ids is uint16 or uint32."""
    found = [Stored("input_ids", dtype, sequence_tokens)] if task.tokenizes else []
    found.append(Stored("num_tokens", "int32"))
    for column in task.columns:
        width = sequence_tokens if column.each == "token" else None
        width = math.prod(column.shape) if column.shape else num_labels if column.hot else width
        found.append(Stored(column.name, column.dtype, width, column.varies))
    return found


def make_batch(columns: Sequence[Stored], values: Mapping[str, Values]) -> pa.RecordBatch:
    """Rows as a record batch, from their columns by name. Nothing is copied."""
    arrays = [_make_array(column, values[column.name]) for column in columns]
    fields = [
        pa.field(column.name, array.type, nullable=False)
        for column, array in zip(columns, arrays, strict=True)
    ]
    return pa.record_batch(arrays, schema=pa.schema(fields))


def _make_array(column: Stored, values: Values) -> pa.Array:
    if isinstance(values, Varying):
        return values.lists()
    kind = pa.from_numpy_dtype(np.dtype(column.dtype))
    array = pa.array(values.reshape(-1), kind)
    if column.width is None:
        return array
    kind = pa.list_(pa.field("item", kind, nullable=False), column.width)
    return pa.FixedSizeListArray.from_arrays(array, type=kind)


class _Measured:
    """A sink that counts and hashes what is written through it."""

    closed = False

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.num_bytes = 0
        self.hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._stream.write(view)
        self.hash.update(view)
        self.num_bytes += view.nbytes
        return view.nbytes

    def flush(self) -> None: ...

    def close(self) -> None: ...


def write_shard(
    filesystem: pafs.FileSystem, folder: str, file: str, rows: pa.RecordBatch, group_rows: int
) -> Shard:
    """Write rows as one shard `folder/file`, a record batch a group; the same rows give the same
    bytes."""

    def write(stream: Any) -> _Measured:
        sink = _Measured(stream)
        with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), rows.schema) as writer:
            for start in range(0, rows.num_rows, group_rows):
                group = rows.slice(start, group_rows)
                writer.write_batch(group, custom_metadata={CHECKSUM: _checksum(group)})
        return sink

    path = f"{folder}/{file}"
    make_folder(filesystem, path.rpartition("/")[0])
    written = write_whole(filesystem, path, write)
    return Shard(
        file=file,
        num_rows=rows.num_rows,
        num_bytes=written.num_bytes,
        sha256=written.hash.hexdigest(),
    )


def _checksum(group: pa.RecordBatch) -> bytes:
    """CRC-32 over the values of all columns, which have no nulls."""
    found = 0
    for column in group.columns:
        if pa.types.is_large_list(column.type):
            found = zlib.crc32(pc.list_value_length(column).to_numpy(), found)
        values = column.flatten() if pa.types.is_nested(column.type) else column
        found = zlib.crc32(values.to_numpy(zero_copy_only=True), found)
    return b"%08x" % found


def read_groups(
    filesystem: pafs.FileSystem,
    folder: str,
    source: SourceRows,
    groups: Sequence[int],
    group_rows: int,
) -> pa.Table:
    """Groups of a source by number, one after the other in the order asked for.

    Only their byte ranges are read, tried again while the storage fails, and a process keeps the
    groups that it used last. Raises IndexError for a group that is not there, CorpusError for a
    shard that is gone or no longer what it was, StorageFailed.
    """
    counts = [-(-shard.num_rows // group_rows) for shard in source.shards]
    ends = np.cumsum(counts) if counts else np.zeros(0, np.int64)
    wanted = np.asarray(groups, np.int64)
    if not len(wanted) or wanted.min() < 0 or not len(ends) or wanted.max() >= ends[-1]:
        raise IndexError(
            f"groups {list(groups)[:5]}… of source {source.name}, which has {sum(counts)}"
        )
    shard_of = np.searchsorted(ends, wanted, side="right")
    batches: dict[int, pa.RecordBatch] = {}
    with _kept.lock:
        for index in np.unique(shard_of).tolist():
            first = int(ends[index]) - counts[index]
            within = [group - first for group in np.unique(wanted[shard_of == index]).tolist()]
            found = _kept.groups(filesystem, folder, source.shards[index], within)
            batches |= {first + number: batch for number, batch in found.items()}
    return pa.Table.from_batches([batches[group] for group in wanted.tolist()])


def rewrite_shard(  # noqa: PLR0917
    filesystem: pafs.FileSystem,
    folder: str,
    shard: Shard,
    group_rows: int,
    columns: Sequence[Stored],
    tell: Callable[[pa.Table], Mapping[str, Values]],
) -> Shard:
    """Write a shard anew with some of its columns as `tell` has them for each group of its rows.

    What was told before is told again, so that work which was cut short may be done over.
    """
    alone = SourceRows(
        name=shard.file,
        weight=None,
        num_rows=shard.num_rows,
        num_documents=0,
        num_tokens=0,
        num_text_bytes=0,
        shards=(shard,),
    )
    tables: list[pa.Table] = []
    told: dict[str, list[Any]] = {}
    for group in range(-(-shard.num_rows // group_rows)):
        table = read_groups(filesystem, folder, alone, [group], group_rows)
        for name, values in tell(table).items():
            told.setdefault(name, []).append(values)
        tables.append(table)
    rows = pa.concat_tables(tables).combine_chunks().to_batches()[0]
    for column in columns:
        if (parts := told.get(column.name)) is None:
            continue
        values = (
            Varying.join(parts, column.dtype)
            if column.varies
            else np.concatenate(parts).astype(column.dtype)
        )
        (array,) = make_batch([column], {column.name: values}).columns
        place = rows.schema.get_field_index(column.name)
        rows = rows.set_column(place, rows.schema.field(place), array)
    return write_shard(filesystem, folder, shard.file, rows, group_rows)


_Place = tuple[str, str, str, tuple[int, ...]]
"""A shard: folder, file, digest, and which file on the disk it is (`_identity`)."""


class _Kept:
    """Groups and open shards that this process used last, each bounded; used by one thread at a
    time (`lock`)."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._groups: OrderedDict[tuple[_Place, int], pa.RecordBatch] = OrderedDict()
        self._num_bytes = 0
        self._shards: OrderedDict[_Place, pa.ipc.RecordBatchFileReader] = OrderedDict()

    def groups(
        self, filesystem: pafs.FileSystem, folder: str, shard: Shard, numbers: Sequence[int]
    ) -> dict[int, pa.RecordBatch]:
        """Groups by their number in the shard, each with the checksum that it was written with."""
        path = f"{folder}/{shard.file}"

        def read() -> dict[int, pa.RecordBatch]:
            try:
                place = folder, shard.file, shard.sha256, _identity(filesystem, path)
                return {number: self._group(filesystem, place, shard, number) for number in numbers}
            except (pa.ArrowInvalid, FileNotFoundError) as error:
                raise CorpusError(
                    path,
                    f"cannot be read ({first_safe_line(error)})",
                    "token shards stay as they were prepared for as long as runs use them",
                    f"delete {folder} and run `dray prepare`: the same shards come back",
                ) from error

        return retry(read, path)

    def _group(
        self, filesystem: pafs.FileSystem, place: _Place, shard: Shard, number: int
    ) -> pa.RecordBatch:
        batch = self._groups.pop((place, number), None)
        if batch is None:
            batch = self._load(filesystem, place, shard, number)
            self._num_bytes += batch.nbytes
        self._groups[place, number] = batch
        while self._num_bytes > CACHED_BYTES and len(self._groups) > 1:
            self._num_bytes -= self._groups.popitem(last=False)[1].nbytes
        return batch

    def _load(
        self, filesystem: pafs.FileSystem, place: _Place, shard: Shard, number: int
    ) -> pa.RecordBatch:
        reader = self._shards.pop(place, None)  # after an error it is opened anew
        reader = reader or _open_shard(filesystem, f"{place[0]}/{shard.file}", shard)
        found = reader.get_batch_with_custom_metadata(number)
        if (found.custom_metadata or {}).get(CHECKSUM) != _checksum(found.batch):
            raise pa.ArrowInvalid(f"group {number} is not what was written: its checksum differs")
        self._shards[place] = reader
        while len(self._shards) > CACHED_SHARDS:
            self._shards.popitem(last=False)
        return found.batch


_kept = _Kept()


def _identity(filesystem: pafs.FileSystem, path: str) -> tuple[int, ...]:
    """What changes when a local shard is written anew: a group that was read before is then read
    again."""
    if not is_local(filesystem):
        return ()
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _open_shard(
    filesystem: pafs.FileSystem, path: str, shard: Shard
) -> pa.ipc.RecordBatchFileReader:
    """The shard's record batches, if it still has the size that the manifest gives, and an Arrow
    file's form.

    Not mapped into memory: what has been verified must not change under those who keep it.
    """
    file = filesystem.open_input_file(path)
    if file.size() != shard.num_bytes:
        raise pa.ArrowInvalid(f"it has {file.size()} bytes instead of {shard.num_bytes}")
    return pa.ipc.open_file(file)
