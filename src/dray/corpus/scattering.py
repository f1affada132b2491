"""The records of a source that gathers, scattered over partitions (`gathering.py`): read, counted
and set aside like those of any other source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from dray.corpus.chunks import Tally, read_batches
from dray.corpus.contents import check_unchanged
from dray.corpus.gathering import (
    Scattered,
    join_records,
    make_records,
    record_source,
    write_scattered,
)
from dray.corpus.parts import CorpusSource, Preparation, save_record
from dray.corpus.reading import Bad, Span, SpanReader
from dray.corpus.sources import InputFile
from dray.errors import CorpusError
from dray.spec import Field, Names, Source
from dray.tasks.rows import SEPARATOR


def scatter_part(job: Preparation, piece: Scattered) -> dict[str, Any]:
    """Read the records of some spans and write them by partition. Returns the record of the work.
    Raises CorpusError."""
    own = job.sources[piece.source]
    source, fields = record_source(own.source, job.task.fields)
    gather = own.source.gather
    names = (
        read_names(own.names, gather.names, job.max_record_bytes)
        if gather is not None and gather.names is not None
        else {}
    )
    check_unchanged(dict.fromkeys(span.file for span in piece.spans))
    tally = Tally()
    tables = [
        make_records(batch.texts, batch.labels, names)
        for batch in read_batches(piece.spans, source, job.max_record_bytes, tally, fields)
    ]
    check_unchanged(dict.fromkeys(span.file for span in piece.spans))
    write_scattered(job, piece, tables)
    tally.write_quarantine(job, "scattered", piece.index)
    return save_record(job, "scattered", piece.index, tally.record())


def gather_here(
    own: CorpusSource,
    files: Sequence[InputFile],
    fields: Mapping[str, Field],
    max_record_bytes: int,
) -> Iterator[tuple[pa.Array, pa.Array, list[Bad], int]]:
    """The documents of a source, all in this process: their keys, their joined names, in the first
    piece what could not be read, and how many had too few records to be documents."""
    gather = own.source.gather
    if gather is None:
        raise ValueError("the source gathers nothing")
    names = read_names(own.names, gather.names, max_record_bytes) if gather.names else {}
    source, parts = record_source(own.source, fields)
    tables: list[pa.Table] = []
    bad: list[Bad] = []
    for file in files:
        for documents in SpanReader(Span(file), source, max_record_bytes, parts).read():
            bad += documents.bad
            if len(documents.texts):
                tables.append(make_records(documents.texts, documents.labels, names))
    pieces = join_records(pa.concat_tables(tables), gather) if tables else iter(())
    for keys, texts, num_short in pieces:
        yield keys, texts, bad, num_short
        bad = []
    if bad:
        yield pa.array([]), pa.array([]), bad, 0


def read_names(
    files: Sequence[InputFile], names: Names, max_record_bytes: int
) -> Mapping[str, str]:
    """What ids are called, by id; the first name of one counts. Raises CorpusError for a record
    that cannot be read: whoever gave a name to it would look for it in vain."""
    source = Source(path=names.path, columns={"id": names.id, "name": names.name})
    fields = {"id": Field("name"), "name": Field("name")}
    found: dict[str, str] = {}
    for file in files:
        for documents in SpanReader(Span(file), source, max_record_bytes, fields).read():
            for bad in documents.bad:
                raise CorpusError(
                    bad.file,
                    f"{bad.reason} at {bad.offset}",
                    "every id has a name",
                    "mend the file",
                )
            for text in documents.texts.to_pylist():
                own, _, name = text.partition(SEPARATOR)
                found.setdefault(own, name)
    return found
