"""From input files to documents, with every record that cannot be read set aside by file and offset.

Files are read as bytes and decoded a line at a time: a bad record costs itself. Memory stays bounded by a block and the
largest allowed record, whatever the file holds. Refuses files without the text or label column, naming those there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from dray.corpus.bytes_in import BOM, DamagedFile, HashingStream, decompress, hash_file, line_blocks, range_chunks
from dray.corpus.labels import RULE, label_names
from dray.corpus.parsing import BadRecord, LineParser, make_parser, missing_column
from dray.corpus.sources import InputFile
from dray.errors import CorpusError
from dray.spec import Source
from dray.store.retrying import first_line, is_transient


class InputOutage(TimeoutError):
    """An input cannot be read for the moment: the piece of work that needs it is tried again (`store.retrying`)."""


@dataclass(frozen=True)
class Span:
    """A part of a file: bytes of a plain file of lines, or row groups of a parquet file; `stop` None: to the end.

    A line belongs to the span in which it starts.
    """

    file: InputFile
    start: int = 0
    stop: int | None = None

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.stop is None


@dataclass(frozen=True)
class Bad:
    """A record that could not be read. `offset` counts bytes of the decompressed file, or rows of a parquet file."""

    file: str
    offset: int
    num_bytes: int
    reason: str


@dataclass
class Documents:
    """Documents in reading order, and the bad records among them."""

    texts: pa.Array
    labels: pa.Array | None
    bad: list[Bad] = field(default_factory=list)

    @property
    def num_records(self) -> int:
        return len(self.texts) + len(self.bad)


@dataclass
class SpanReader:
    """Reads one span. `sha256` is that of the whole file, known after reading when the span begins the file."""

    span: Span
    source: Source
    max_record_bytes: int
    sha256: str = ""

    def read(self) -> Iterator[Documents]:
        """Documents in blocks of some megabytes. Raises CorpusError for a missing column or an unreadable file, and
        InputOutage."""
        form = self.span.file.form
        if form in ("text", "lines") and self.source.label is not None:
            raise CorpusError(self.span.file.name, f"format {form} has no label column",
                              "labels come from a column of jsonl, csv, tsv or parquet", "set the source's format")
        stream = None
        try:
            if form == "parquet":
                yield from _read_parquet(self.span, self.source, self.max_record_bytes)
            elif self.span.is_whole:
                stream = HashingStream(self.span.file.open().open_input_stream(self.span.file.path, compression=None))
                chunks = decompress(stream, self.span.file.compression)
                yield from self._read_text(chunks) if form == "text" else self._read_lines(0, chunks)
            else:
                yield from self._read_lines(*range_chunks(self.span.file, self.span.start, self.span.stop))
            if self.span.start == 0:
                known = self.span.file.sha256
                self.sha256 = stream.finish() if stream else known or hash_file(self.span.file)
        except (OSError, pa.ArrowException) as error:
            if is_transient(error):
                raise InputOutage(f"{self.span.file.name} cannot be read ({first_line(error)})") from error
            raise CorpusError(self.span.file.name, f"cannot be read ({error})", "inputs must be readable") from error
        finally:
            if stream:
                stream.close()

    def _read_text(self, chunks: Iterator[bytes]) -> Iterator[Documents]:
        """The whole file as one document."""
        pieces: list[bytes] = []
        size = 0
        bad = ""
        try:
            for chunk in chunks:
                size += len(chunk)
                if size > self.max_record_bytes:
                    bad = f"longer than data.max_record_bytes = {self.max_record_bytes} (format `lines` reads by line)"
                    break
                pieces.append(chunk)
        except DamagedFile as error:
            bad = str(error)
        data = b"".join(pieces).removeprefix(BOM)
        offset = 0
        if not bad:
            bad, offset = unreadable(data)
        if bad:
            yield Documents(_strings([]), None, [Bad(self.span.file.name, offset, size, bad)])
        else:
            yield Documents(_strings([data.decode()]), None)

    def _read_lines(self, base: int, chunks: Iterator[bytes]) -> Iterator[Documents]:
        parser = make_parser(self.span.file, self.source)
        name = self.span.file.name
        skip = self.span.start == 0 and parser.skips_first_line
        num_found, num_missing = 0, 0
        for offset, data, bad in line_blocks(chunks, self.max_record_bytes):
            if offset == 0 and base == 0 and data.startswith(BOM):
                data, offset = data[len(BOM):], len(BOM)
            if skip and data:
                end = data.find(b"\n") + 1 or len(data)
                data, offset, skip = data[end:], offset + end, False
            documents = self._parse(parser, data, base + offset)
            documents.bad += [Bad(name, base + start, size, reason) for start, size, reason in bad]
            num_found += len(documents.texts)
            num_missing += sum(item.reason.startswith("no column") for item in documents.bad)
            if documents.num_records:
                yield documents
        if num_missing and not num_found:
            raise missing_column(name, self.source, parser.columns)

    def _parse(self, parser: LineParser, data: bytes, offset: int) -> Documents:
        """A block of whole lines: at once if nothing in it is odd, else line by line."""
        if len(data) <= self.max_record_bytes and b"\0" not in data and _is_utf8(data):
            parsed = parser.parse_block(data)
            if parsed is not None:
                return Documents(*parsed)
        texts: list[str] = []
        labels: list[str] = []
        bad: list[Bad] = []
        for line in data.split(b"\n"):
            try:
                if line.strip():
                    text, label = parser.parse_line(_decode(line, self.max_record_bytes))
                    texts.append(text)
                    labels.append(label)
            except BadRecord as error:
                bad.append(Bad(self.span.file.name, offset, len(line), str(error)))
            offset += len(line) + 1
        return Documents(_strings(texts), pa.array(labels, pa.string()) if self.source.label else None, bad)


def _decode(line: bytes, limit: int) -> str:
    if len(line) > limit:
        raise BadRecord(f"longer than data.max_record_bytes = {limit}")
    reason, _ = unreadable(line)
    if reason:
        raise BadRecord(reason)
    return line.decode()


def unreadable(data: bytes) -> tuple[str, int]:
    """Why bytes are no text, and where; an empty reason if they are."""
    if b"\0" in data:
        return "null byte", data.index(b"\0")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return "invalid UTF-8", error.start
    return "", 0


def _is_utf8(data: bytes) -> bool:
    offsets = pa.array([0, len(data)], pa.int64()).buffers()[1]
    try:
        pa.Array.from_buffers(pa.large_string(), 1, [None, offsets, pa.py_buffer(data)]).validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _strings(texts: Sequence[str]) -> pa.Array:
    return pa.array(texts, pa.large_string())


def _no_labels(source: Source) -> pa.Array | None:
    return pa.array([], pa.string()) if source.label else None


def _read_parquet(span: Span, source: Source, limit: int) -> Iterator[Documents]:
    import pyarrow.parquet as pq

    name = span.file.name
    row = 0
    try:
        with span.file.open().open_input_file(span.file.path) as stream:
            file = pq.ParquetFile(stream)
            _check_columns(file.schema_arrow, name, source)
            stop = file.num_row_groups if span.stop is None else span.stop
            row = sum(file.metadata.row_group(group).num_rows for group in range(span.start))
            columns = [source.text] if source.label is None else [source.text, source.label]
            for batch in file.iter_batches(1024, list(range(span.start, stop)), columns, use_threads=False):
                yield _parquet_documents(batch, name, row, source, limit)
                row += batch.num_rows
    except pa.ArrowException as error:
        yield Documents(_strings([]), _no_labels(source), [Bad(name, row, 0, f"damaged parquet ({error})"[:200])])


def _check_columns(schema: pa.Schema, name: str, source: Source) -> None:
    for column in (source.text, source.label):
        if column is not None and column not in schema.names:
            raise missing_column(name, source, schema.names)
    if source.label is not None and pa.types.is_nested(schema.field(source.label).type):
        raise CorpusError(name, f"the label column {source.label!r} holds {schema.field(source.label).type}", RULE)
    kind = schema.field(source.text).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    textual = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    if not any(test(kind) for test in textual):
        raise CorpusError(name, f"the text column {source.text!r} holds {kind}", "a text column holds strings")


def _parquet_documents(batch: pa.RecordBatch, name: str, row: int, source: Source, limit: int) -> Documents:
    raw = batch.column(source.text).cast(pa.large_binary())
    lengths = pc.binary_length(raw)
    labels = None if source.label is None else batch.column(source.label)
    odd = pc.greater(lengths, limit)
    checks: list[tuple[pa.Array, Callable[[int], str]]] = [
        (pc.is_null(raw), lambda i: f"{source.text!r} is null"),
        (pc.fill_null(odd, False), lambda i: f"longer than data.max_record_bytes = {limit}"),
    ]
    if labels is not None:
        labels = label_names(labels)
        checks.append((pc.is_null(labels), lambda i: "no label"))
    reasons = {i: reason(i) for mask, reason in checks for i in pc.indices_nonzero(mask).to_pylist()}
    if not _clean_text(raw):
        for i, value in enumerate(raw.to_pylist()):
            reason, _ = unreadable(value or b"")
            if reason:
                reasons.setdefault(i, reason)
    if reasons:
        good = pa.array([i for i in range(len(raw)) if i not in reasons], pa.int64())
        raw, labels = raw.take(good), labels.take(good) if labels is not None else None
    bad = [Bad(name, row + i, lengths[i].as_py() or 0, reason) for i, reason in sorted(reasons.items())]
    return Documents(raw.cast(pa.large_string()), labels, bad)


def _clean_text(raw: pa.Array) -> bool:
    """Whether no value has a null byte or invalid UTF-8."""
    try:
        text = raw.cast(pa.large_string())
    except pa.ArrowInvalid:
        return False
    return not pc.any(pc.match_substring(text, "\0")).as_py()
