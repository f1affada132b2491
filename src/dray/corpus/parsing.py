"""Records of text → documents: JSON lines, plain lines, csv and tsv.

Every form parses whole blocks at once through Arrow, and a record at a time where a block holds
anything odd; both ways give the same documents.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dray.corpus.bytes_in import Blocks, line_blocks
from dray.corpus.delimited import make_delimited
from dray.corpus.records import BadRecord, RecordParser, Wanted, named_column, whole_column
from dray.corpus.sources import InputFile
from dray.corpus.words import WordLines
from dray.spec import Source

LINE_FORMS = ("jsonl", "csv", "tsv", "lines")
QUOTED_FORMS = ("csv", "tsv")


def make_parser(file: InputFile, source: Source, wanted: Wanted) -> RecordParser:
    """What parses the records of a file. Raises CorpusError for one without a wanted column."""
    if file.form == "jsonl":
        return _JsonLines(wanted)
    if file.form == "lines":
        return _Lines()
    if file.form == "conll":
        return WordLines(wanted)
    return make_delimited(file, source, wanted)


class _ByLine:
    """A record is a line."""

    skips_first_record = False

    def __init__(self) -> None:
        self.columns: list[str] = []

    def cut(self, chunks: Iterator[bytes], limit: int) -> Blocks:
        return line_blocks(chunks, limit)

    def split(self, data: bytes) -> Iterator[bytes]:
        return iter(data.split(b"\n"))

    def is_blank(self, record: bytes) -> bool:
        return not record.strip()


class _Lines(_ByLine):
    """A document a line, blank lines aside."""

    def parse_block(self, data: bytes) -> tuple[pa.Array, pa.Array | None] | None:
        texts = pc.split_pattern(
            pa.array([data], pa.large_binary()).cast(pa.large_string()), "\n"
        ).flatten()
        if b"\r" in data:
            texts = pc.utf8_rtrim(texts, characters="\r")
        return texts.filter(pc.not_equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0)), None

    def parse_line(self, line: str) -> tuple[str, str]:
        return line.rstrip("\r"), ""


class _JsonLines(_ByLine):
    """A JSON object a line."""

    def __init__(self, wanted: Wanted) -> None:
        super().__init__()
        self._wanted = wanted
        self._text, self._label = wanted.text_column, wanted.target_column
        self._label_types = (
            [pa.string(), pa.int64(), pa.bool_(), pa.float64()]
            if self._label is not None
            else [None]
        )

    def parse_block(self, data: bytes) -> tuple[pa.Array, pa.Array | None] | None:
        if b"\\u0000" in data or not data or not self._wanted.is_plain:
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
            texts = whole_column(table[self._text], pa.large_string())
            labels = named_column(table[self._label]) if self._label is not None else None
            return (
                None
                if texts is None or (labels is not None and labels.null_count)
                else (texts, labels)
            )
        return None

    def parse_line(self, line: str) -> tuple[str, str]:
        try:
            record = json.loads(line, object_pairs_hook=_Record)
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"broken JSON{_guess_why(line)}") from error
        if not isinstance(record, _Record):
            raise BadRecord("not a JSON object")
        if len(self.columns) < 100:
            self.columns += [name for name in record if name not in self.columns]
        for name in self._wanted.columns:
            if name not in record:
                raise BadRecord(f"no column {name!r}")
        for name in record if self._wanted.is_whole else self._wanted.columns:
            if name in record.repeated:
                raise BadRecord(f"{name!r} is given twice")
        return self._wanted.read(record)


class _Record(dict[str, Any]):
    """A JSON object that knows which of its names were given more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = (
            {name for name, count in Counter(name for name, _ in pairs).items() if count > 1}
            if len(self) < len(pairs)
            else frozenset[str]()
        )


def _guess_why(line: str) -> str:
    """What is likely wrong with a line that is no JSON."""
    text = line.strip()
    if text.endswith("},"):
        return " (a comma behind the record)"
    if text in ("{", "}", "[", "]") or (text.startswith('"') and text.endswith((",", "{", "["))):
        return (
            " (records are objects, one a line, or one array of them; this one goes on over lines)"
        )
    return ""


def _read_json(
    data: bytes, text: str, label: str | None, label_type: pa.DataType | None
) -> pa.Table | None:
    import pyarrow.json as pj

    fields = [(text, pa.string())] + ([(label, label_type)] if label is not None else [])
    try:
        return pj.read_json(
            pa.BufferReader(data),
            read_options=pj.ReadOptions(use_threads=False, block_size=len(data) + 1),
            parse_options=pj.ParseOptions(
                explicit_schema=pa.schema(fields), unexpected_field_behavior="ignore"
            ),
        )
    except pa.ArrowInvalid:
        return None
