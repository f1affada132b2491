"""One line of a text file → one document: JSON lines, plain lines, csv and tsv.

Every form parses whole blocks at once through Arrow, and a line at a time where a block holds anything odd; both ways
give the same documents. A quoted newline in csv is not supported: one stray quote would swallow the rest of the file.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dray.corpus.bytes_in import read_first_line
from dray.corpus.labels import label_name, label_names
from dray.corpus.sources import InputFile
from dray.errors import CorpusError
from dray.spec import Source

LINE_FORMS = ("jsonl", "csv", "tsv", "lines")


MAX_EXACT = 2.0**53


class BadRecord(Exception):
    """One record is unreadable; the message says why."""


class LineParser(Protocol):
    skips_first_line: bool
    columns: list[str]

    def parse_block(self, data: bytes) -> tuple[pa.Array, pa.Array | None] | None:
        """Texts and labels of whole lines of valid UTF-8; None if anything in them is odd."""

    def parse_line(self, line: str) -> tuple[str, str]:
        """Text and label of one line. Raises BadRecord."""


def make_parser(file: InputFile, source: Source) -> LineParser:
    if file.form == "jsonl":
        return _JsonLines(source.text, source.label)
    if file.form == "lines":
        return _Lines()
    return _make_delimited(file, source)


def missing_column(where: str, source: Source, columns: Sequence[str]) -> CorpusError:
    wanted = [name for name in (source.text, source.label) if name is not None and name not in columns]
    kind = "text" if source.text in wanted else "label"
    known = f"columns: {', '.join(columns)}" if columns else "it has no columns"
    return CorpusError(where, f"no {kind} column {(wanted or [source.text])[0]!r}", known,
                       f"set `{kind}` of the source to one of them")


class _Lines:
    """A document a line, blank lines aside."""

    skips_first_line = False

    def __init__(self) -> None:
        self.columns: list[str] = []

    def parse_block(self, data: bytes) -> tuple[pa.Array, pa.Array | None] | None:
        texts = pc.split_pattern(pa.array([data], pa.large_binary()).cast(pa.large_string()), "\n").flatten()
        if b"\r" in data:
            texts = pc.utf8_rtrim(texts, characters="\r")
        return texts.filter(pc.not_equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0)), None

    def parse_line(self, line: str) -> tuple[str, str]:
        return line.rstrip("\r"), ""


class _JsonLines:
    """A JSON object a line."""

    skips_first_line = False

    def __init__(self, text: str, label: str | None) -> None:
        self._text, self._label = text, label
        self._label_types = [pa.string(), pa.int64(), pa.bool_(), pa.float64()] if label is not None else [None]
        self.columns: list[str] = []

    def parse_block(self, data: bytes) -> tuple[pa.Array, pa.Array | None] | None:
        if b"\\u0000" in data or not data:
            return None
        num_lines = data.count(b"\n") + (data[-1:] != b"\n")
        for label_type in list(self._label_types):
            table = _read_json(data, self._text, self._label, label_type)
            if table is None:
                continue
            # The type that fitted is tried first for the next block.
            self._label_types.sort(key=lambda known, fitted=label_type: known != fitted)  # type: ignore[misc]
            columns = [table[name] for name in table.column_names]
            if table.num_rows != num_lines or any(column.null_count for column in columns):
                return None
            texts = _whole(table[self._text], pa.large_string())
            labels = _named(table[self._label]) if self._label is not None else None
            return None if texts is None or (labels is not None and labels.null_count) else (texts, labels)
        return None

    def parse_line(self, line: str) -> tuple[str, str]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadRecord("broken JSON") from error
        if not isinstance(record, dict):
            raise BadRecord("not a JSON object")
        if len(self.columns) < 100:
            self.columns += [name for name in record if name not in self.columns]
        for name in (self._text, self._label):
            if name is not None and name not in record:
                raise BadRecord(f"no column {name!r}")
        text = record[self._text]
        if not isinstance(text, str):
            raise BadRecord(f"{self._text!r} is not a string")
        if "\0" in text:
            raise BadRecord("null byte")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRecord("lone surrogate") from error
        return text, "" if self._label is None else _label(record[self._label])


def _read_json(data: bytes, text: str, label: str | None, label_type: pa.DataType | None) -> pa.Table | None:
    import pyarrow.json as pj

    fields = [(text, pa.string())] + ([(label, label_type)] if label is not None else [])
    try:
        return pj.read_json(
            pa.BufferReader(data),
            read_options=pj.ReadOptions(use_threads=False, block_size=len(data) + 1),
            parse_options=pj.ParseOptions(explicit_schema=pa.schema(fields), unexpected_field_behavior="ignore"),
        )
    except pa.ArrowInvalid:
        return None


def _whole(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array | None:
    """A column as one array of the type; None if it holds invalid UTF-8."""
    array = pa.concat_arrays([chunk.cast(kind) for chunk in column.chunks]) if column.num_chunks else pa.array([], kind)
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        return None
    return array


def _named(column: pa.ChunkedArray) -> pa.Array:
    """The labels of a column by their names; null for what is none, or cannot be told from a neighbour."""
    if pa.types.is_floating(column.type):  # so large that other whole numbers would be read as the same
        column = pc.if_else(pc.less(pc.abs(column), MAX_EXACT), column, None)
    return label_names(pa.concat_arrays(column.chunks)) if column.num_chunks else pa.array([], pa.string())


def _label(value: Any) -> str:
    """The name of a label. Raises BadRecord."""
    try:
        return label_name(value)
    except ValueError as error:
        raise BadRecord(str(error)) from error


@dataclass
class _Delimited:
    """Values between commas or tabs. csv fields may be quoted, tsv fields are not; no newline inside a field."""

    delimiter: str
    skips_first_line: bool
    columns: list[str]
    num_columns: int
    text: int
    label: int | None

    def parse_block(self, data: bytes) -> tuple[pa.Array, pa.Array | None] | None:
        import pyarrow.csv as pacsv

        if not data:
            return None
        names = [str(index) for index in range(self.num_columns)]
        wanted = [self.text] if self.label is None else [self.text, self.label]
        quote = '"' if self.delimiter == "," else False
        if quote and not _quotes_close(data):
            return None
        try:
            table = pacsv.read_csv(
                pa.BufferReader(data),
                read_options=pacsv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=names),
                parse_options=pacsv.ParseOptions(delimiter=self.delimiter, quote_char=quote),
                convert_options=pacsv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False,
                    include_columns=[names[i] for i in dict.fromkeys(wanted)]),
            )
        except pa.ArrowInvalid:
            return None
        if table.num_rows != data.count(b"\n") + (data[-1:] != b"\n"):
            return None
        texts = _whole(table[names[self.text]], pa.large_string())
        labels = _named(table[names[self.label]]) if self.label is not None else None
        if texts is None or (labels is not None and labels.null_count):
            return None
        return texts, labels

    def parse_line(self, line: str) -> tuple[str, str]:
        try:
            fields = _split_fields(line.rstrip("\r"), self.delimiter)
        except csv.Error as error:
            raise BadRecord(f"broken line ({error})") from error
        if len(fields) != self.num_columns:
            raise BadRecord(f"{len(fields)} fields instead of {self.num_columns}")
        if self.label is None:
            return fields[self.text], ""
        return fields[self.text], _label(fields[self.label])


def _split_fields(line: str, delimiter: str) -> list[str]:
    """The fields of a line; none for an empty one. Raises csv.Error."""
    if delimiter == "\t":
        return line.split("\t") if line else []
    if line.count('"') % 2:
        raise csv.Error("a quote is not closed in the line")
    return next(csv.reader([line], strict=True), [])


def _quotes_close(data: bytes) -> bool:
    """Whether every line has an even number of quotes."""
    if b'"' not in data:
        return True
    content = np.frombuffer(data, np.uint8)
    ends = np.append(np.flatnonzero(content == ord("\n")), len(data))
    before = np.searchsorted(np.flatnonzero(content == ord('"')), ends)
    return not (before % 2).any()


def _make_delimited(file: InputFile, source: Source) -> _Delimited:
    """A parser for the columns that the file's first line shows. Raises CorpusError if one is missing."""
    csv.field_size_limit(2**31 - 1)
    delimiter = "," if file.form == "csv" else "\t"
    try:
        fields = _split_fields(read_first_line(file), delimiter)
    except csv.Error as error:
        raise CorpusError(file.name, f"its first line is broken ({error})",
                          "the first line shows the columns") from error
    columns = fields if source.header else [str(index) for index in range(len(fields))]
    places = {name: index for index, name in reversed(list(enumerate(columns)))}
    if not source.header or source.text.isdigit():
        places = {str(index): index for index in range(len(columns))} | places
    wanted = [source.text] if source.label is None else [source.text, source.label]
    if fields and any(name not in places for name in wanted):
        raise missing_column(file.name, source, columns)
    if not fields:  # an empty file has no records to parse
        return _Delimited(delimiter, source.header, columns, 0, 0, None)
    return _Delimited(delimiter, source.header, columns, len(fields), places[source.text],
                      None if source.label is None else places[source.label])
