"""What every form of records has in common: the interface of a parser, and what it says of what it
cannot read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from dray.corpus.bytes_in import Blocks
from dray.corpus.labels import label_name, label_names
from dray.errors import CorpusError
from dray.spec import Source

MAX_EXACT = 2.0**53


class BadRecord(Exception):
    """One record is unreadable; the message says why."""


class RecordParser(Protocol):
    """Turns the bytes of a file into texts and labels. A record ends with a newline, or with the
    file."""

    skips_first_record: bool
    columns: list[str]

    def cut(self, chunks: Iterator[bytes], limit: int) -> Blocks:
        """Blocks of whole records, and what was lost between them."""

    def split(self, data: bytes) -> Iterator[bytes]:
        """The records of a block, without the newline behind each."""

    def is_blank(self, record: bytes) -> bool:
        """Whether a record is nothing but an empty line."""

    def parse_block(self, data: bytes) -> tuple[pa.Array, pa.Array | None] | None:
        """Texts and labels of whole records of valid UTF-8; None if anything in them is odd."""

    def parse_line(self, line: str) -> tuple[str, str]:
        """Text and label of one record. Raises BadRecord."""


def missing_column(where: str, source: Source, columns: Sequence[str]) -> CorpusError:
    """The error for a file without the text or the label column."""
    wanted = [
        name for name in (source.text, source.label) if name is not None and name not in columns
    ]
    kind = "text" if source.text in wanted else "label"
    known = f"columns: {', '.join(columns)}" if columns else "it has no columns"
    return CorpusError(
        where,
        f"no {kind} column {(wanted or [source.text])[0]!r}",
        known,
        f"set `{kind}` of the source to one of them",
    )


def repeated_column(where: str, name: str) -> CorpusError:
    """The error for a file of which two columns have the wanted name."""
    return CorpusError(
        where,
        f"two columns are named {name!r}",
        "a column has a name of its own",
        "rename one of them, or leave it out",
    )


def whole_column(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array | None:
    """A column as one array of the type; None if it holds invalid UTF-8."""
    array = (
        pa.concat_arrays([chunk.cast(kind) for chunk in column.chunks])
        if column.num_chunks
        else pa.array([], kind)
    )
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        return None
    return array


def named_column(column: pa.ChunkedArray) -> pa.Array:
    """The labels of a column by their names; null for what is none, or cannot be told from a
    neighbour."""
    if pa.types.is_floating(
        column.type
    ):  # so large that other whole numbers would be read as the same
        column = pc.if_else(pc.less(pc.abs(column), MAX_EXACT), column, None)
    return (
        label_names(pa.concat_arrays(column.chunks))
        if column.num_chunks
        else pa.array([], pa.string())
    )


def parse_label(value: Any) -> str:
    """The name of a label. Raises BadRecord."""
    try:
        return label_name(value)
    except ValueError as error:
        raise BadRecord(str(error)) from error
