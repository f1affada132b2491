"""Where training rows came from, and when they were learnt.

A corpus keeps no names of files beside its rows. So the raw files are read once more, and a
document that becomes the same row is the one, or one that is equal to it. Steps are those of the
ledger's history: what a restart undid is not among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from dray.corpus.documents import edited
from dray.corpus.encoded import check_encoded
from dray.corpus.parsing import LINE_FORMS
from dray.corpus.planning import is_divisible
from dray.corpus.prepare import list_inputs
from dray.corpus.reading import Documents, Span, SpanReader
from dray.corpus.sources import InputFile
from dray.corpus.tables import make_table
from dray.corpus.tools import Tools
from dray.ledger import find_steps
from dray.release.opened import Opened
from dray.runs import Run
from dray.spec import Source, Spec

MOST_PLACES = 5
"""Of one row: equal documents further on are not looked for."""


@dataclass(frozen=True)
class Place:
    """A document in a raw file."""

    file: str
    document: int
    """Which of the documents that can be read there it is, from 1 on."""
    offset: int | None = None
    """The byte at which its record begins, of files whose lines may be read from anywhere."""


@dataclass
class Traced:
    """What is known of a training row."""

    row: int
    places: list[Place] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def trace(trained: Opened, run: Run, rows: pa.Table) -> dict[int, Traced]:
    """Where rows of the run's corpus came from and the steps that learnt them, by row id. A row
    whose raw file is gone, or was changed since, has no places. Raises CorpusError for sources that
    are gone."""
    ids = [int(row) for row in rows.column("row_id").to_pylist()]
    found = {row: Traced(row) for row in ids}
    wanted: dict[bytes, list[Traced]] = {}
    for mark, row in zip(_marks(rows), ids, strict=True):
        wanted.setdefault(mark, []).append(found[row])
    for source, file in _files(trained.spec):
        if all(len(one.places) >= MOST_PLACES for one in found.values()):
            break
        for mark, place in _find_in(trained, source, file, wanted.keys()):
            for one in wanted[mark]:
                if len(one.places) < MOST_PLACES:
                    one.places.append(place)
    for row, steps in find_steps(run, ids).items():
        found[row].steps = steps
    return found


def _files(spec: Spec) -> Iterator[tuple[Source, InputFile]]:
    inputs = list_inputs(spec)
    for source, files in zip(inputs.sources, inputs.files, strict=True):
        if source.split == "train" and source.source.gather is None:
            for file in files:
                yield source.source, file


def _find_in(
    trained: Opened, source: Source, file: InputFile, wanted: Any
) -> Iterator[tuple[bytes, Place]]:
    """Documents of a file that become one of the rows."""
    number = first = 0
    for documents in _read(trained.spec, source, Span(file)):
        end = first + documents.num_bytes
        for place, mark in _marked(trained, source, documents):
            if mark in wanted:
                offset = _find_offset(trained, source, file, (first, end), place, mark)
                yield mark, Place(file.name, number + place + 1, offset)
        number, first = number + len(documents.texts), end


def _read(spec: Spec, source: Source, span: Span) -> Iterator[Documents]:
    yield from SpanReader(span, source, spec.data.max_record_bytes, spec.task.fields).read()


def _marked(trained: Opened, source: Source, documents: Documents) -> Iterator[tuple[int, bytes]]:
    """Documents of a block by their place, and what their rows are known by. One that becomes
    several rows is known by none."""
    if not len(documents.texts):
        return
    spec, manifest = trained.spec, trained.manifest
    texts, labels = edited(spec, source, documents.texts, documents.labels)
    folder, info = trained.tokenizer_folder, trained.tokenizer
    tools = Tools(folder, info, manifest.sequence_tokens, manifest.labels)
    encoded = check_encoded(
        spec.task,
        spec.task.encode(texts, labels, tools),
        len(texts),
        vocab_size=manifest.vocab_size,
    )
    table, _ = make_table(
        spec.task, trained.tokenizer, manifest.sequence_tokens, len(manifest.labels), encoded
    )
    records = np.arange(len(texts)) if encoded.records is None else encoded.records
    alone = np.bincount(records, minlength=len(texts))[records] == 1
    for record, mark, single in zip(records.tolist(), _marks(table), alone, strict=True):
        if single:
            yield record, mark


def _marks(rows: pa.Table) -> list[bytes]:
    """What rows are known by: their tokens, or their pixels."""
    name = "input_ids" if "input_ids" in rows.column_names else "pixels"
    if name not in rows.column_names:
        return [b""] * rows.num_rows
    sizes = rows.column("num_tokens").to_numpy()
    values = rows.column(name).combine_chunks()
    flat = values.flatten().to_numpy().reshape(rows.num_rows, -1)
    if name == "pixels":
        return [row.tobytes() for row in flat]
    return [row[:size].tobytes() for row, size in zip(flat, sizes, strict=True)]


def _find_offset(  # noqa: PLR0917
    trained: Opened,
    source: Source,
    file: InputFile,
    block: tuple[int, int],
    number: int,
    mark: bytes,
) -> int | None:
    """The byte at which the record of a block's n-th document begins, where a file's lines may be
    read from anywhere: halves of the block are counted, then halves of the one that has it. What
    is found is read once more, and is None where it is not that document."""
    quotes = file.form in ("csv", "tsv") and source.quoting != "none"
    if file.form not in LINE_FORMS or quotes or not is_divisible(file):
        return None

    def read(start: int, stop: int) -> Iterator[Documents]:
        return _read(trained.spec, source, Span(file, start, stop))

    (first, end), before = block, number
    while end - first > 1:
        middle = (first + end) // 2
        inside = sum(len(documents.texts) for documents in read(first, middle))
        if before < inside:
            end = middle
        else:
            first, before = middle, before - inside
    found = [own for some in read(first, first + 1) for _, own in _marked(trained, source, some)]
    return first if found == [mark] else None
