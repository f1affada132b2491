"""From the bytes of a file to documents, with every record that cannot be read set aside by file and offset.

Files are read as bytes and decoded a line at a time: a bad record costs itself. Memory stays bounded by a block and the
largest allowed record, whatever the file holds. A quoted newline in csv is not supported: one stray quote would otherwise
swallow the rest of the file. Refuses files without the text or label column, naming the columns that exist.
"""

from __future__ import annotations

import csv
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import pyarrow as pa
import pyarrow.compute as pc

from dray.corpus.sources import InputFile
from dray.errors import CorpusError
from dray.spec import Source

BLOCK_BYTES = 4 * 1024 * 1024
READ_BYTES = 256 * 1024
ZSTD_FEED_BYTES = 4096
"""Compressed bytes given to zstd at once: its output is bounded by 128 KiB for every 4 bytes."""
HEADER_BYTES = 1024 * 1024
BOM = b"\xef\xbb\xbf"
LINE_FORMS = ("jsonl", "csv", "tsv", "lines")


@dataclass(frozen=True)
class Span:
    """A part of a file: bytes of an uncompressed file of lines, or row groups of a parquet file; `stop` None: to the end.

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


class _BadRecord(Exception):
    """One record is unreadable; the message says why."""


class _Damaged(Exception):
    """The rest of a file cannot be decompressed; the message says why."""


@dataclass
class SpanReader:
    """Reads one span. `sha256` is that of the whole file, known after reading when the span begins the file."""

    span: Span
    source: Source
    max_record_bytes: int
    sha256: str = ""

    def read(self) -> Iterator[Documents]:
        """Documents in blocks of some megabytes. Raises CorpusError for a missing column or an unreadable file."""
        form = self.span.file.form
        stream = None
        try:
            if form == "parquet":
                yield from _read_parquet(self.span, self.source, self.max_record_bytes)
            elif self.span.is_whole:
                stream = _Hashing(self.span.file.open().open_input_stream(self.span.file.path, compression=None))
                chunks = _decompress(stream, self.span.file.compression)
                yield from self._read_text(chunks) if form == "text" else self._read_lines(0, chunks)
            else:
                yield from self._read_lines(*_range_chunks(self.span))
            if self.span.start == 0:
                self.sha256 = stream.finish() if stream else _sha256(self.span.file)
        except (OSError, pa.ArrowException) as error:
            raise CorpusError(self.span.file.name, f"cannot be read ({error})", "the corpus must be readable") from error
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
                    bad = f"longer than data.max_record_bytes = {self.max_record_bytes} (format `lines` reads it by line)"
                    break
                pieces.append(chunk)
        except _Damaged as error:
            bad = str(error)
        data = b"".join(pieces).removeprefix(BOM)
        offset = 0
        if not bad:
            bad, offset = _unreadable(data)
        if bad:
            yield Documents(_strings([]), _no_labels(self.source), [Bad(self.span.file.name, offset, size, bad)])
        else:
            yield Documents(_strings([data.decode()]), _no_labels(self.source))

    def _read_lines(self, base: int, chunks: Iterator[bytes]) -> Iterator[Documents]:
        parser = _make_parser(self.span.file, self.source)
        name = self.span.file.name
        skip = self.span.start == 0 and parser.skips_first_line
        num_found, num_missing = 0, 0
        for offset, data, bad in _blocks(chunks, self.max_record_bytes):
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
            raise _missing_column(name, self.source, parser.columns)

    def _parse(self, parser: _Parser, data: bytes, offset: int) -> Documents:
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
            except _BadRecord as error:
                bad.append(Bad(self.span.file.name, offset, len(line), str(error)))
            offset += len(line) + 1
        return Documents(_strings(texts), pa.array(labels, pa.string()) if self.source.label else None, bad)


def _decode(line: bytes, limit: int) -> str:
    if len(line) > limit:
        raise _BadRecord(f"longer than data.max_record_bytes = {limit}")
    reason, _ = _unreadable(line)
    if reason:
        raise _BadRecord(reason)
    return line.decode()


def _unreadable(data: bytes) -> tuple[str, int]:
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


# --- bytes -------------------------------------------------------------------------------------------------------------


class _Hashing:
    """A stream that hashes the bytes read from it."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._hash = stream, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = cast(bytes, self._stream.read(size))
        self._hash.update(data)
        return data

    def finish(self) -> str:
        """Reads on to the end; the digest of all bytes."""
        while self.read(READ_BYTES):
            pass
        return self._hash.hexdigest()

    def close(self) -> None:
        self._stream.close()


def _sha256(file: InputFile) -> str:
    stream = _Hashing(file.open().open_input_stream(file.path, compression=None))
    try:
        return stream.finish()
    finally:
        stream.close()


def _decompress(stream: Any, compression: str) -> Iterator[bytes]:
    """The content in chunks of about BLOCK_BYTES. Raises _Damaged after all that could be decompressed."""
    pieces: list[bytes] = []
    size = 0
    damaged: _Damaged | None = None
    inflate = {"": _read_plain, "gzip": _inflate_gzip, "zstd": _inflate_zstd}[compression]
    try:
        for piece in inflate(stream):
            pieces.append(piece)
            size += len(piece)
            if size >= BLOCK_BYTES:
                yield b"".join(pieces)
                pieces, size = [], 0
    except _Damaged as error:
        damaged = error
    if pieces:
        yield b"".join(pieces)
    if damaged:
        raise damaged


def _read_plain(stream: Any) -> Iterator[bytes]:
    while data := stream.read(BLOCK_BYTES):
        yield data


def _inflate_gzip(stream: Any) -> Iterator[bytes]:
    """Members one after the other; zero padding between them is allowed."""
    member: Any = None
    while data := stream.read(READ_BYTES):
        while data:
            if member is None:
                data = data.lstrip(b"\0")
                if not data:
                    break
                member = zlib.decompressobj(wbits=31)
            try:
                piece = member.decompress(data, BLOCK_BYTES)
            except zlib.error as error:
                raise _Damaged(f"damaged gzip ({error})") from error
            if piece:
                yield piece
            data = member.unused_data if member.eof else member.unconsumed_tail
            if member.eof:
                member = None
    if member is not None:
        yield member.flush()
        raise _Damaged("truncated gzip")


def _inflate_zstd(stream: Any) -> Iterator[bytes]:
    import zstandard

    frame: Any = None
    while block := stream.read(READ_BYTES):
        for start in range(0, len(block), ZSTD_FEED_BYTES):
            data = block[start:start + ZSTD_FEED_BYTES]
            while data:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj()
                try:
                    piece = frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise _Damaged(f"damaged zstd ({error})") from error
                if piece:
                    yield piece
                data = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
    if frame is not None:
        raise _Damaged("truncated zstd")


def _range_chunks(span: Span) -> tuple[int, Iterator[bytes]]:
    """Offset of the first line that starts in the span, and the bytes of all that do."""
    file = span.file.open().open_input_file(span.file.path)
    base = span.start
    if base:
        base -= 1
        file.seek(base)
        while data := file.read(READ_BYTES):
            newline = data.find(b"\n")
            base += len(data) if newline < 0 else newline + 1
            if newline >= 0:
                break
    return base, _read_range(file, base, span.stop)


def _read_range(file: Any, start: int, stop: int | None) -> Iterator[bytes]:
    with file:
        file.seek(start)
        last = b""
        while stop is None or start < stop:
            data = file.read(BLOCK_BYTES if stop is None else min(BLOCK_BYTES, stop - start))
            if not data:
                return
            start, last = start + len(data), data[-1:]
            yield data
        while last and last != b"\n":  # the line that began in the span goes on behind it
            data = file.read(READ_BYTES)
            cut = data.find(b"\n") + 1
            if data:
                yield data[:cut] if cut else data
            if cut or not data:
                return


def _blocks(chunks: Iterator[bytes], limit: int) -> Iterator[tuple[int, bytes, list[tuple[int, int, str]]]]:
    """(offset, whole lines, [(offset, bytes, reason) of bad records]). Lines far over the limit are never held."""
    too_long = f"longer than data.max_record_bytes = {limit}"
    offset, size, carry, skipping, damage = 0, 0, list[bytes](), False, ""
    try:
        for chunk in chunks:
            cut = chunk.rfind(b"\n") + 1
            if not cut:
                size += len(chunk)
                carry.append(chunk)
            else:
                if skipping:
                    first = chunk.find(b"\n") + 1
                    yield offset, b"", [(offset, size + first - 1, too_long)]
                    offset, chunk, cut = offset + size + first, chunk[first:], cut - first
                else:
                    chunk, cut = b"".join([*carry, chunk]), cut + size
                if cut:
                    yield offset, chunk[:cut], []
                offset, carry, size, skipping = offset + cut, [chunk[cut:]], len(chunk) - cut, False
            if skipping or size > limit:
                carry, skipping = [], True
    except _Damaged as error:
        damage = str(error)
    if skipping:
        yield offset, b"", [(offset, size, too_long)]
    elif damage:
        yield offset, b"", [(offset, size, damage)]
    elif size:
        yield offset, b"".join(carry), []


# --- lines -------------------------------------------------------------------------------------------------------------


class _Parser(Protocol):
    skips_first_line: bool
    columns: list[str]

    def parse_block(self, data: bytes) -> tuple[pa.Array, pa.Array | None] | None:
        """Texts and labels of whole lines of valid UTF-8; None if anything in them is odd."""

    def parse_line(self, line: str) -> tuple[str, str]:
        """Text and label of one line. Raises _BadRecord."""


def _make_parser(file: InputFile, source: Source) -> _Parser:
    if file.form == "jsonl":
        return _JsonLines(source.text, source.label)
    if file.form == "lines":
        return _Lines(source)
    return _make_delimited(file, source)


def _missing_column(where: str, source: Source, columns: Sequence[str]) -> CorpusError:
    wanted = [name for name in (source.text, source.label) if name is not None and name not in columns]
    kind = "text" if source.text in wanted else "label"
    known = f"columns: {', '.join(columns)}" if columns else "it has no columns"
    return CorpusError(where, f"no {kind} column {(wanted or [source.text])[0]!r}", known,
                       f"set `{kind}` of the source to one of them")


class _Lines:
    """A document a line, blank lines aside."""

    skips_first_line = False
    columns: list[str]

    def __init__(self, source: Source) -> None:
        self.columns = []
        self._labelled = source.label is not None

    def parse_block(self, data: bytes) -> tuple[pa.Array, pa.Array | None] | None:
        if self._labelled:
            return None
        texts = pc.split_pattern(pa.array([data], pa.large_binary()).cast(pa.large_string()), "\n").flatten()
        if b"\r" in data:
            texts = pc.utf8_rtrim(texts, characters="\r")
        return texts.filter(pc.not_equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0)), None

    def parse_line(self, line: str) -> tuple[str, str]:
        if self._labelled:
            raise _BadRecord("no column for the label")
        return line.rstrip("\r"), ""


class _JsonLines:
    """A JSON object a line."""

    skips_first_line = False

    def __init__(self, text: str, label: str | None) -> None:
        self._text, self._label = text, label
        self._label_types = [pa.string(), pa.int64(), pa.bool_()] if label is not None else [None]
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
            labels = _whole(table[self._label], pa.string()) if self._label is not None else None
            return None if texts is None else (texts, labels)
        return None

    def parse_line(self, line: str) -> tuple[str, str]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _BadRecord("broken JSON") from error
        if not isinstance(record, dict):
            raise _BadRecord("not a JSON object")
        if len(self.columns) < 100:
            self.columns += [name for name in record if name not in self.columns]
        for name in (self._text, self._label):
            if name is not None and name not in record:
                raise _BadRecord(f"no column {name!r}")
        text = record[self._text]
        if not isinstance(text, str):
            raise _BadRecord(f"{self._text!r} is not a string")
        if "\0" in text:
            raise _BadRecord("null byte")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _BadRecord("lone surrogate") from error
        return text, "" if self._label is None else _label_name(record[self._label])


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


def _label_name(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, str) and value):
        return str(value)
    raise _BadRecord("the label is neither a string nor an integer")


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
        try:
            table = pacsv.read_csv(
                pa.BufferReader(data),
                read_options=pacsv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=names),
                parse_options=pacsv.ParseOptions(delimiter=self.delimiter, quote_char=quote),
                convert_options=pacsv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()), include_columns=[names[i] for i in dict.fromkeys(wanted)],
                    strings_can_be_null=False),
            )
        except pa.ArrowInvalid:
            return None
        if table.num_rows != data.count(b"\n") + (data[-1:] != b"\n"):
            return None
        texts = _whole(table[names[self.text]], pa.large_string())
        labels = _whole(table[names[self.label]], pa.string()) if self.label is not None else None
        if texts is None or (labels is not None and pc.any(pc.equal(labels, "")).as_py()):
            return None
        return texts, labels

    def parse_line(self, line: str) -> tuple[str, str]:
        quoting = csv.QUOTE_MINIMAL if self.delimiter == "," else csv.QUOTE_NONE
        try:
            fields = next(csv.reader([line.rstrip("\r")], delimiter=self.delimiter, quoting=quoting, strict=True))
        except (csv.Error, StopIteration) as error:
            raise _BadRecord(f"broken line ({error})") from error
        if len(fields) != self.num_columns:
            raise _BadRecord(f"{len(fields)} fields instead of {self.num_columns}")
        if self.label is None:
            return fields[self.text], ""
        if not fields[self.label]:
            raise _BadRecord("no label")
        return fields[self.text], fields[self.label]


def _make_delimited(file: InputFile, source: Source) -> _Delimited:
    """A parser for the columns that the file's first line shows. Raises CorpusError if one is missing."""
    csv.field_size_limit(2**31 - 1)
    delimiter = "," if file.form == "csv" else "\t"
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    line = _first_line(file)
    fields = next(csv.reader([line], delimiter=delimiter, quoting=quoting), [])
    columns = fields if source.header else [str(index) for index in range(len(fields))]
    places = {name: index for index, name in reversed(list(enumerate(columns)))}
    if not source.header or source.text.isdigit():
        places = {str(index): index for index in range(len(columns))} | places
    wanted = [source.text] if source.label is None else [source.text, source.label]
    if fields and any(name not in places for name in wanted):
        raise _missing_column(file.name, source, columns)
    if not fields:  # an empty file has no records to parse
        return _Delimited(delimiter, source.header, columns, 0, 0, None)
    return _Delimited(delimiter, source.header, columns, len(fields), places[source.text],
                      None if source.label is None else places[source.label])


def _first_line(file: InputFile) -> str:
    stream = file.open().open_input_stream(file.path, compression=None)
    data = b""
    try:
        for chunk in _decompress(stream, file.compression):
            data += chunk
            if b"\n" in data or len(data) > HEADER_BYTES:
                break
    except _Damaged:
        pass
    finally:
        stream.close()
    line = data.removeprefix(BOM).partition(b"\n")[0]
    return line[:HEADER_BYTES].decode(errors="replace").rstrip("\r")


# --- parquet -----------------------------------------------------------------------------------------------------------


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
            raise _missing_column(name, source, schema.names)
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
        if pa.types.is_floating(labels.type):
            raise CorpusError(name, f"the label column {source.label!r} holds {labels.type}", "labels: strings or integers")
        labels = labels.cast(pa.string())
        checks.append((pc.is_null(labels), lambda i: "no label"))
    reasons = {i: reason(i) for mask, reason in checks for i in pc.indices_nonzero(mask).to_pylist()}
    if not _clean_text(raw):
        for i, value in enumerate(raw.to_pylist()):
            reason, _ = _unreadable(value or b"")
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
