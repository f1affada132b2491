"""Documents gathered from several records each, such as what a person did one after the other.

Records are scattered over partitions by the key that those of one document share, and each
partition is sorted by itself: no more than one is ever in memory, and the result is the same
however the files were cut. Refuses nothing: what is no record was set aside when it was read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dray.corpus.cleaning import hash_texts
from dray.corpus.parts import Part, Preparation, staged
from dray.corpus.reading import Span
from dray.spec import Field, Gather, Source
from dray.storage.filesystem import make_folder, open_whole
from dray.tasks.rows import SEPARATOR

PARTITION_BYTES = 256 * 1024 * 1024
"""Estimated bytes of the records of one partition."""
BATCH_RECORDS = 1 << 18
"""Records of the documents that are given out at once."""
TOO_FEW = "few_records"
_SCHEMA = pa.schema(
    [("by", pa.large_string()), ("order", pa.float64()), ("name", pa.large_string())]
)


@dataclass(frozen=True)
class Scattered:
    """Some spans of a source whose records are scattered."""

    index: int
    source: int
    spans: tuple[Span, ...]
    num_partitions: int


def plan_gathering(
    parts: Sequence[Part], sources: Sequence[Any]
) -> tuple[list[Scattered], list[Part]]:
    """What is to be scattered of the parts that were cut, and the parts with partitions in place of
    it, numbered anew. `sources`: `CorpusSource` of the corpus."""
    scattered: list[Scattered] = []
    planned: list[Part] = []
    for number, source in enumerate(sources):
        mine = [part for part in parts if part.source == number]
        if source.source.gather is None:
            planned += [Part(len(planned) + place, number, p.spans) for place, p in enumerate(mine)]
            continue
        files = {span.file.path: span.file for part in mine for span in part.spans}
        size = sum(file.estimated_bytes for file in files.values())
        num_partitions = max(1, -(-size // PARTITION_BYTES))
        first = len(scattered)
        scattered += [
            Scattered(first + place, number, part.spans, num_partitions)
            for place, part in enumerate(mine)
        ]
        pieces = tuple(range(first, len(scattered)))
        planned += [
            Part(len(planned) + place, number, (), partition=place, scattered=pieces)
            for place in range(num_partitions)
        ]
    return scattered, planned


def record_source(source: Source, fields: Mapping[str, Field]) -> tuple[Source, dict[str, Field]]:
    """How a single record of a source that gathers is read, and its fields: the key and the name
    are a document's texts, the order is its target."""
    gather = source.gather
    if gather is None:
        raise ValueError("the source gathers nothing")
    (name,) = fields
    columns = {
        "by": gather.by,
        "name": str(fields[name].column_in(source, name)),
        "order": gather.order,
    }
    own = {"by": Field("name"), "name": Field("name"), "order": Field("number")}
    return source.model_copy(update={"columns": columns, "gather": None}), own


def make_records(texts: pa.Array, targets: pa.Array, names: Mapping[str, str]) -> pa.Table:
    """Records as a table of by, order and name; `names`: what ids are called."""
    parts = pc.split_pattern(texts, SEPARATOR)
    by, name = (pc.list_element(parts, place) for place in (0, 1))
    if names:
        encoded = name.dictionary_encode()
        called = [names.get(given, given) for given in encoded.dictionary.to_pylist()]
        name = pa.array(called, pa.large_string()).take(encoded.indices)
    order = targets.cast(pa.large_string()).cast(pa.float64())
    columns = [by.cast(pa.large_string()), order, name.cast(pa.large_string())]
    return pa.table(columns, schema=_SCHEMA)


def write_scattered(job: Preparation, piece: Scattered, tables: Sequence[pa.Table]) -> None:
    """Write the records of a piece, in reading order, as a file with a batch for each partition."""
    table = pa.concat_tables([_SCHEMA.empty_table(), *tables]).combine_chunks()
    of = _partitions(table.column("by"), piece.num_partitions)
    filesystem, path = staged(job, "scattered", f"{piece.index:06d}.arrow")
    make_folder(filesystem, path.rpartition("/")[0])
    with (
        open_whole(filesystem, path, durable=False) as stream,
        pa.ipc.new_file(stream, _SCHEMA) as writer,
    ):
        for partition in range(piece.num_partitions):
            chosen = table.take(pa.array(np.flatnonzero(of == partition))).combine_chunks()
            batches = chosen.to_batches()
            writer.write_batch(
                batches[0] if batches else pa.RecordBatch.from_pylist([], schema=_SCHEMA)
            )


def _partitions(keys: pa.ChunkedArray, num_partitions: int) -> Any:
    """The partition of each key: of its hash, so that it is the same wherever it was read."""
    chunks = [hash_texts(chunk)[1] % np.uint64(num_partitions) for chunk in keys.chunks]
    return np.concatenate(chunks) if chunks else np.empty(0, np.uint64)


def gathered_documents(job: Preparation, part: Part) -> Iterator[tuple[pa.Array, pa.Array, int]]:
    """The documents of a partition, some at a time, sorted by their keys: these, their joined
    names, and how many were dropped because they have too few records."""
    gather = job.sources[part.source].source.gather
    if gather is None or part.partition is None:
        raise ValueError("the part is no partition")
    pieces = []
    for index in part.scattered:
        filesystem, path = staged(job, "scattered", f"{index:06d}.arrow")
        with filesystem.open_input_file(path) as file:
            pieces.append(pa.ipc.open_file(file).get_batch(part.partition))
    yield from join_records(pa.Table.from_batches(pieces, _SCHEMA), gather)


def join_records(records: pa.Table, gather: Gather) -> Iterator[tuple[pa.Array, pa.Array, int]]:
    """Documents of a table of records in reading order, as `gathered_documents` gives them."""
    if not records.num_rows:
        return
    records = records.append_column("place", pa.array(np.arange(records.num_rows)))
    keys = [(name, "ascending") for name in ("by", "order", "place")]
    records = records.take(pc.sort_indices(records, sort_keys=keys)).combine_chunks()
    ids = records.column("by").combine_chunks().dictionary_encode().indices.to_numpy()
    # Sorted, so numbers of keys ascend: a document ends where the next number begins.
    ends = np.append(np.flatnonzero(np.diff(ids)) + 1, len(ids))
    starts = np.append(0, ends[:-1])
    stops = np.maximum(starts, ends - gather.leave_out)
    names = records.column("name").combine_chunks()
    first = 0
    while first < len(starts):
        last = max(
            first + 1, int(np.searchsorted(starts, starts[first] + BATCH_RECORDS, side="right")) - 1
        )
        last = len(starts) if starts[first] + BATCH_RECORDS >= len(ids) else last
        enough = np.flatnonzero(stops[first:last] - starts[first:last] >= gather.least) + first
        lengths = stops[enough] - starts[enough]
        inside = np.repeat(starts[enough] - (np.cumsum(lengths) - lengths), lengths)
        chosen = names.take(pa.array(inside + np.arange(int(lengths.sum()))))
        offsets = pa.array(np.append(0, np.cumsum(lengths)), pa.int64())
        lists = pa.LargeListArray.from_arrays(offsets, chosen)
        texts = pc.binary_join(lists, pa.scalar(SEPARATOR, pa.large_string()))
        owners = records.column("by").combine_chunks().take(pa.array(starts[enough]))
        yield owners, texts.cast(pa.large_string()), last - first - len(enough)
        first = last
