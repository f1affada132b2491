"""From input files to documents, with every record that cannot be read set aside by file and
offset.

Files are read as bytes and decoded a record at a time: a bad record costs itself, and a damaged
file what lies behind the damage, counted in documents or bytes. Memory stays bounded by a block and
the largest allowed record, whatever the file holds. Refuses files without the text or label column,
naming those there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dray.corpus.arrays import array_to_lines
from dray.corpus.bytes_in import (
    BLOCK_BYTES,
    DamagedFile,
    HashingStream,
    Lost,
    hash_file,
    open_bytes,
    open_content,
    range_chunks,
    too_long,
)
from dray.corpus.containers import (
    FOREIGN,
    HEAD_BYTES,
    find_compression,
    find_pointer,
    is_array,
    name_foreign,
)
from dray.corpus.idx import COLUMNS as IDX_COLUMNS
from dray.corpus.idx import make_image_file, parse_idx, path_of_labels
from dray.corpus.labels import RULE, label_names
from dray.corpus.pages import DroppedPage, page_text, require_page_packages
from dray.corpus.parsing import make_parser
from dray.corpus.records import (
    PLAIN,
    BadRecord,
    RecordParser,
    Wanted,
    absent_part,
    missing_column,
    repeated_column,
)
from dray.corpus.sources import InputFile
from dray.corpus.warc import COLUMNS as WARC_COLUMNS
from dray.corpus.warc import WarcRecord, read_warc
from dray.errors import CorpusError
from dray.spec import WHOLE, Field, Source
from dray.storage.retrying import first_safe_line, is_transient

FILE_COLUMNS = ("content", "folder", "name")
"""What a file that is a record has."""
PAGE_COLUMNS = ("text", "folder", "name")
"""What a file of HTML has."""
IMAGES_AT_ONCE = 1024
"""Of an IDX file that are given on together."""


class InputOutage(TimeoutError):
    """An input cannot be read for the moment: the piece of work that needs it is tried again
    (`store.retrying`)."""


@dataclass(frozen=True)
class Span:
    """A part of a file: bytes of a plain file of lines, or row groups of a parquet file; `stop`
    None: to the end.

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
    """Records that could not be read. `offset` counts bytes of the decompressed file, or rows of a
    parquet file."""

    file: str
    offset: int
    num_bytes: int
    reason: str
    num_documents: int = 1
    """As far as known: rows of a parquet file, else 1."""
    ends_file: bool = False
    """Whether the file is damaged from there on, so that nobody knows how much is missing."""


@dataclass
class Documents:
    """Documents in reading order, and the bad records among them."""

    texts: pa.Array
    labels: pa.Array | None
    bad: list[Bad] = dataclass_field(default_factory=list)
    num_bytes: int = 0
    """Bytes of content that they were read from, bad records included."""
    dropped: Counter[str] = dataclass_field(default_factory=Counter)
    """Documents that are left out before any cleaning, by reason."""

    @property
    def num_records(self) -> int:
        return len(self.texts) + len(self.bad) + self.dropped.total()


@dataclass
class FileCounts:
    """What was read of one file, or of a part of it."""

    form: str
    num_documents: int = 0
    num_bad: int = 0
    num_dropped: int = 0
    num_content_bytes: int = 0
    num_bad_bytes: int = 0
    problem: str = ""
    problem_offset: int = 0
    is_damaged: bool = False
    note: str = ""
    sha256: str = ""

    def add(self, documents: Documents) -> None:
        """Count what a block gave."""
        self.num_documents += len(documents.texts)
        self.num_dropped += documents.dropped.total()
        self.num_content_bytes += documents.num_bytes
        for bad in documents.bad:
            self.num_bad += bad.num_documents
            self.num_bad_bytes += bad.num_bytes
            self.is_damaged |= bad.ends_file
            if not self.problem:
                self.problem, self.problem_offset = bad.reason, bad.offset

    def merge(self, other: FileCounts) -> None:
        """Add what was read of a later part."""
        for name in (
            "num_documents", "num_bad", "num_dropped", "num_content_bytes", "num_bad_bytes"
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if not self.problem:
            self.problem, self.problem_offset = other.problem, other.problem_offset
        self.is_damaged |= other.is_damaged
        self.note, self.sha256 = self.note or other.note, self.sha256 or other.sha256


@dataclass
class SpanReader:
    """Reads one span. After reading, `sha256` is that of the whole file if the span begins it, and
    `note` what its content showed to be other than its name says."""

    span: Span
    source: Source
    max_record_bytes: int
    fields: Mapping[str, Field] = dataclass_field(default_factory=lambda: PLAIN)
    """What the task reads."""
    sha256: str = ""
    note: str = ""

    def read(self) -> Iterator[Documents]:
        """Documents in blocks of some megabytes. Raises CorpusError for a missing column or an
        unreadable file, and InputOutage."""
        form = self.span.file.form
        wanted = self.wanted
        columnless = ("text", "lines", "conll") if wanted.is_whole else ("text", "lines")
        if form in columnless and (wanted.target is not None or not wanted.is_plain):
            other = (wanted.target or wanted.texts[-1])[0]
            raise CorpusError(
                self.span.file.name,
                f"format {form} has no {other} column",
                f"{'labels' if other == 'label' else other} come from a column of jsonl, csv, tsv "
                "or parquet",
                "set the source's format",
            )
        if form == "conll" and not all(_is_number(column) for column in wanted.columns):
            raise CorpusError(
                self.span.file.name,
                f"columns of words have numbers, not names such as {wanted.columns[0]!r}",
                "0 is the first, -1 the last",
                "set `columns` of the source, or another format",
            )
        try:
            if form == "parquet":
                yield from _read_parquet(self.span, wanted, self.max_record_bytes)
            elif self.span.is_whole:
                yield from self._read_whole()
            else:
                base, chunks = range_chunks(self.span.file, self.span.start, self.span.stop)
                yield from self._read_records(base, chunks)
            if self.span.start == 0 and not self.sha256:
                self.sha256 = self.span.file.sha256 or hash_file(self.span.file)
        except (OSError, pa.ArrowException) as error:
            if is_transient(error):
                raise InputOutage(
                    f"{self.span.file.name} cannot be read ({first_safe_line(error)})"
                ) from error
            raise CorpusError(
                self.span.file.name, f"cannot be read ({error})", "inputs must be readable"
            ) from error

    @property
    def wanted(self) -> Wanted:
        """The columns that make its documents."""
        return Wanted.of(self.source, self.fields, self.span.file.form)

    def _read_whole(self) -> Iterator[Documents]:
        file = self.span.file
        stream = HashingStream(file.open().open_input_stream(file.path, compression=None))
        try:
            yield from self._read_stream(stream)
            self.sha256 = stream.finish()
        finally:
            stream.close()

    def _read_stream(self, stream: HashingStream) -> Iterator[Documents]:
        file = self.span.file
        try:
            whole = {
                "files": self._read_file,
                "idx": self._read_idx,
                "html": self._read_html,
                "warc": self._read_warc,
            }
            if file.form in whole:
                yield from whole[file.form](stream)
                return
            content = open_content(file, stream)
            self.note, chunks = content.note, content.chunks
            if file.form == "text":
                yield from self._read_text(chunks)
            elif file.form == "jsonl" and is_array(content.head):
                self.note = "; ".join(filter(None, (self.note, "one JSON array")))
                yield from self._read_records(content.offset, array_to_lines(chunks))
            else:
                yield from self._read_records(content.offset, chunks)
        except DamagedFile as error:
            size = file.num_bytes if error.num_bytes is None else error.num_bytes
            yield _damaged(file, self.wanted, 0, size, str(error))

    def _read_text(self, chunks: Iterator[bytes]) -> Iterator[Documents]:
        """The whole file as one document."""
        pieces: list[bytes] = []
        size = 0
        bad, damaged = "", False
        try:
            for chunk in chunks:
                size += len(chunk)
                if size > self.max_record_bytes:
                    bad = f"{too_long(self.max_record_bytes)} (format `lines` reads by line)"
                    break
                pieces.append(chunk)
        except DamagedFile as error:
            bad, damaged = str(error), True
        data = b"".join(pieces)
        offset = 0
        if not bad:
            bad, offset = unreadable(data)
        if bad:
            size = max(size, self.span.file.num_bytes)
            yield Documents(
                _strings([]), None, [Bad(self.span.file.name, offset, size, bad, 1, damaged)], size
            )
        else:
            yield Documents(_strings([data.decode()]), None, [], size)

    def _read_file(self, stream: HashingStream) -> Iterator[Documents]:
        """The whole file, as it lies, as one record."""
        file = self.span.file
        self._check_columns(FILE_COLUMNS)
        content = stream.read(self.max_record_bytes + 1)
        pointed = find_pointer(content[:HEAD_BYTES])
        if pointed is not None:
            raise DamagedFile("a git-LFS pointer in place of the file", pointed)
        folder, name = file.folder_and_name
        values = {"content": content, "folder": folder, "name": name}
        yield self._documents([(0, values)], max(len(content), file.num_bytes))

    def _read_html(self, stream: HashingStream) -> Iterator[Documents]:
        """The whole file as one page."""
        file = self.span.file
        require_page_packages(self.source, {file.form}, file.name)
        self._check_columns(PAGE_COLUMNS)
        pieces: list[bytes] = []
        size = 0
        for chunk in open_bytes(stream):
            size += len(chunk)
            if size > self.max_record_bytes:
                bad = Bad(file.name, 0, max(size, file.num_bytes), too_long(self.max_record_bytes))
                yield self._nothing(bad.num_bytes, [bad])
                return
            pieces.append(chunk)
        content = b"".join(pieces)
        for magic, name in FOREIGN.items():
            if content.startswith(magic):
                raise DamagedFile(f"{name}, where HTML is read")
        try:
            text = page_text(content, "", is_html=True, extract=self.source.extract)
        except DroppedPage as error:
            yield self._nothing(size, dropped=[str(error)])
            return
        folder, name = file.folder_and_name
        yield self._documents([(0, {"text": text, "folder": folder, "name": name})], size)

    def _read_warc(self, stream: HashingStream) -> Iterator[Documents]:
        """The pages of a WARC file, some megabytes of records at a time."""
        require_page_packages(self.source, {"warc"}, self.span.file.name)
        self._check_columns(WARC_COLUMNS)
        found: list[WarcRecord] = []
        size = 0
        for record in read_warc(open_bytes(stream), self.source.extract, self.max_record_bytes):
            found.append(record)
            size += record.num_bytes
            if size >= BLOCK_BYTES:
                yield self._pages(found)
                found, size = [], 0
        if found:
            yield self._pages(found)

    def _pages(self, found: Sequence[WarcRecord]) -> Documents:
        """The documents of some records of a WARC file."""
        name = self.span.file.name
        documents = self._documents(
            ((record.offset, record.values) for record in found if record.values is not None), 0
        )
        sizes = {record.offset: record.num_bytes for record in found}
        lost = [replace(bad, num_bytes=sizes[bad.offset]) for bad in documents.bad]
        lost += [
            Bad(name, record.offset, record.num_bytes, record.bad, ends_file=record.ends_file)
            for record in found
            if record.bad
        ]
        return replace(
            documents,
            bad=sorted(lost, key=lambda bad: bad.offset),
            num_bytes=sum(record.num_bytes for record in found),
            dropped=Counter(record.dropped for record in found if record.dropped),
        )

    def _nothing(
        self, num_bytes: int, bad: Sequence[Bad] = (), dropped: Iterable[str] = ()
    ) -> Documents:
        """No documents, and why."""
        targets = _no_targets(self.wanted)
        return Documents(_strings([]), targets, list(bad), num_bytes, Counter(dropped))

    def _read_idx(self, stream: HashingStream) -> Iterator[Documents]:
        """Images with their labels; nothing of a file of labels, which those of its images ask
        for."""
        self._check_columns(IDX_COLUMNS)
        images = _parse_idx(open_bytes(stream))
        if images.ndim == 1:
            return
        first, end = self.source.records or (0, len(images))
        if end > len(images):
            raise CorpusError(
                self.span.file.name,
                f"has {len(images):,} images, and the source's records are [{first}, {end}]",
                way_out=f"give records: [{min(first, len(images) - 1)}, {len(images)}]",
            )
        labels = self._labels(len(images)) if self.wanted.target is not None else None
        for start in range(first, end, IMAGES_AT_ONCE):
            numbers = range(start, min(end, start + IMAGES_AT_ONCE))
            values = (
                (n, {"image": make_image_file(images[n]), "label": labels and int(labels[n])})
                for n in numbers
            )
            yield self._documents(values, len(numbers) * images[0].nbytes)

    def _labels(self, num_images: int) -> Sequence[int]:
        """What the file of labels beside one of images holds. Raises CorpusError."""
        file = self.span.file
        beside = replace(file, path=path_of_labels(file.path))
        rule = "images-idx3 and labels-idx1 of one name belong together"
        if beside.path == file.path:
            raise CorpusError(file.name, "has no `images` in its name", rule, "rename both")
        try:
            with closing(HashingStream(beside.open().open_input_stream(beside.path, None))) as raw:
                labels = _parse_idx(open_bytes(raw))
        except FileNotFoundError as error:
            raise CorpusError(beside.name, "is not there", rule, "put it there") from error
        except DamagedFile as error:
            raise CorpusError(beside.name, f"cannot be read ({error})", rule) from error
        if labels.shape != (num_images,):
            raise CorpusError(
                beside.name, f"has {len(labels):,} labels of {num_images:,} images", rule
            )
        found: list[int] = labels.tolist()
        return found

    def _check_columns(self, columns: Sequence[str]) -> None:
        """Raise CorpusError for a column that such files have not."""
        for part in self.wanted.parts:
            if part[1] not in columns:
                raise missing_column(self.span.file.name, part, columns)

    def _documents(
        self, records: Iterable[tuple[int, Mapping[str, Any]]], num_bytes: int
    ) -> Documents:
        """Documents of records by their numbers."""
        texts: list[str] = []
        targets: list[str] = []
        bad: list[Bad] = []
        for number, values in records:
            try:
                text, target = self.wanted.read(values)
                if len(text) > self.max_record_bytes:
                    raise BadRecord(too_long(self.max_record_bytes))
                texts.append(text)
                targets.append(target)
            except BadRecord as error:
                bad.append(Bad(self.span.file.name, number, num_bytes, str(error)))
        found = pa.array(targets, pa.string()) if self.wanted.target else None
        return Documents(_strings(texts), found, bad, num_bytes)

    def _read_records(self, base: int, chunks: Iterator[bytes]) -> Iterator[Documents]:
        parser = make_parser(self.span.file, self.source, self.wanted)
        name = self.span.file.name
        skip = self.span.start == 0 and parser.skips_first_record
        num_found, reasons = 0, set[str]()
        for offset, data, lost in parser.cut(chunks, self.max_record_bytes):
            size = len(data) + sum(item.num_bytes for item in lost)
            if skip and data:
                end = len(next(parser.split(data))) + 1
                data, offset, skip = data[end:], offset + end, False
            documents = self._parse(parser, data, base + offset)
            documents.bad += [_bad(name, base, item) for item in lost]
            documents.num_bytes = size
            num_found += len(documents.texts)
            if not num_found:
                told = (item.reason for item in documents.bad)
                reasons.update(reason for reason in told if reason.startswith("no column"))
            yield documents
        absent = None if num_found else absent_part(self.wanted, parser.columns, reasons)
        if absent is not None:
            raise missing_column(name, absent, parser.columns)

    def _parse(self, parser: RecordParser, data: bytes, offset: int) -> Documents:
        """A block of whole records: at once if nothing in it is odd, else one by one."""
        if len(data) <= self.max_record_bytes and b"\0" not in data and _is_utf8(data):
            parsed = parser.parse_block(data)
            if parsed is not None:
                return Documents(*parsed)
        texts: list[str] = []
        labels: list[str] = []
        bad: list[Bad] = []
        for record in parser.split(data):
            try:
                if not parser.is_blank(record):
                    text, label = parser.parse_line(_decode(record, self.max_record_bytes))
                    texts.append(text)
                    labels.append(label)
            except BadRecord as error:
                bad.append(Bad(self.span.file.name, offset, len(record), str(error)))
            offset += len(record) + 1
        return Documents(
            _strings(texts), pa.array(labels, pa.string()) if self.wanted.target else None, bad
        )


def _parse_idx(chunks: Iterator[bytes]) -> Any:
    """The array of an IDX file. Raises DamagedFile."""
    content = b"".join(chunks)
    try:
        return parse_idx(content)
    except ValueError as error:
        raise DamagedFile(str(error)) from error


def _bad(name: str, base: int, lost: Lost) -> Bad:
    return Bad(name, base + lost.offset, lost.num_bytes, lost.reason, ends_file=lost.ends_file)


def _damaged(
    file: InputFile, wanted: Wanted, offset: int, num_bytes: int, reason: str
) -> Documents:
    """No documents of a file that is no use from `offset` on."""
    return Documents(
        _strings([]),
        _no_targets(wanted),
        [Bad(file.name, offset, num_bytes, reason, ends_file=True)],
    )


def find_bounds(
    file: InputFile,
    source: Source,
    max_record_bytes: int,
    size: int,
    fields: Mapping[str, Field] = PLAIN,
) -> list[int]:
    """Offsets about `size` bytes apart where records of a plain file begin, by one pass over its
    quotes."""
    base, chunks = range_chunks(file, 0, None)
    bounds: list[int] = []
    last = 0
    parser = make_parser(file, source, Wanted.of(source, fields, file.form))
    for offset, data, _ in parser.cut(chunks, max_record_bytes):
        end = base + offset + len(data)
        if data and end - last >= size and file.num_bytes - end > size // 2:
            bounds.append(end)
            last = end
    return bounds


def _decode(line: bytes, limit: int) -> str:
    if len(line) > limit:
        raise BadRecord(too_long(limit))
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
        pa.Array.from_buffers(pa.large_string(), 1, [None, offsets, pa.py_buffer(data)]).validate(
            full=True
        )
    except pa.ArrowInvalid:
        return False
    return True


def _strings(texts: Sequence[str]) -> pa.Array:
    return pa.array(texts, pa.large_string())


def _no_targets(wanted: Wanted) -> pa.Array | None:
    return pa.array([], pa.string()) if wanted.target else None


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdigit()


def _read_parquet(span: Span, wanted: Wanted, limit: int) -> Iterator[Documents]:
    """Row group by row group: a damaged one costs itself."""
    import pyarrow.parquet as pq

    name = span.file.name
    with span.file.open().open_input_file(span.file.path) as stream:
        try:
            file = pq.ParquetFile(stream)
        except (pa.ArrowException, OSError) as error:
            _raise_if_unreadable(error)
            stream.seek(0)
            yield _damaged(
                span.file, wanted, 0, *_explain_parquet(stream.read(HEAD_BYTES), span.file, error)
            )
            return
        _check_columns(file.schema_arrow, name, wanted)
        row = sum(file.metadata.row_group(group).num_rows for group in range(span.start))
        for group in range(span.start, file.num_row_groups if span.stop is None else span.stop):
            yield from _read_group(file, group, row, name=name, wanted=wanted, limit=limit)
            row += file.metadata.row_group(group).num_rows


def _raise_if_unreadable(error: Exception) -> None:
    """Raises what the storage says again. Parquet's own complaints are OSErrors, too, but have no
    number."""
    if isinstance(error, OSError) and (error.errno is not None or is_transient(error)):
        raise error


def _explain_parquet(head: bytes, file: InputFile, error: Exception) -> tuple[int, str]:
    """How many bytes are lost with a parquet file without a footer, and why."""
    pointed = find_pointer(head)
    if pointed is not None:
        return pointed, "a git-LFS pointer in place of the file; fetch it: git lfs pull"
    if not head:
        return 0, "empty, where parquet is read"
    if find_compression(head):
        return file.num_bytes, f"{find_compression(head)} around parquet; unpack it"
    foreign = (
        ""
        if head.startswith(b"PAR1")
        else name_foreign(head).replace("text is read", "parquet is read")
    )
    return file.num_bytes, foreign or f"damaged parquet ({error})"[:200]


def _read_group(
    file: Any, group: int, row: int, *, name: str, wanted: Wanted, limit: int
) -> Iterator[Documents]:
    """The documents of a row group from row number `row` on."""
    columns = None if wanted.is_whole else list(wanted.columns)
    metadata = file.metadata.row_group(group)
    read = 0
    try:
        for batch in file.iter_batches(1024, [group], columns, use_threads=False):
            make = _parquet_documents if wanted.is_plain else _parquet_records
            yield make(batch, name, row + read, wanted, limit)
            read += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        _raise_if_unreadable(error)
        left = metadata.num_rows - read
        size = metadata.total_byte_size * left // max(1, metadata.num_rows)
        reason = f"damaged parquet, row group {group} ({error})"[:200]
        yield Documents(
            _strings([]), _no_targets(wanted), [Bad(name, row + read, size, reason, left)], size
        )


def _check_columns(schema: pa.Schema, name: str, wanted: Wanted) -> None:
    """Raises CorpusError for columns that are missing, there twice, or of another kind than text
    and labels."""
    for part in wanted.parts:
        column = part[1]
        if column == WHOLE:
            continue
        if column not in schema.names:
            raise missing_column(name, part, schema.names)
        if schema.names.count(column) > 1:
            raise repeated_column(name, column)
    strings = (*STRINGS, pa.types.is_binary, pa.types.is_large_binary)
    for field, column, kind in wanted.parts:
        if column == WHOLE:
            continue
        held = schema.field(column).type
        if kind == "text" and not _holds(schema, column, strings):
            raise CorpusError(
                name, f"the {field} column {column!r} holds {held}", "a text column holds strings"
            )
        if kind == "bytes" and not (
            _holds(schema, column, strings)
            or pa.types.is_null(held)
            or (pa.types.is_struct(held) and held.get_field_index("bytes") >= 0)
        ):
            raise CorpusError(
                name,
                f"the {field} column {column!r} holds {held}",
                "bytes are binary, base64, or records of `bytes`",
                f"set `columns.{field}` of the source to another column",
            )
        if kind == "label" and pa.types.is_nested(held):
            raise CorpusError(name, f"the {field} column {column!r} holds {held}", RULE)


STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


def _holds(schema: pa.Schema, column: str, kinds: Sequence[Callable[[pa.DataType], bool]]) -> bool:
    """Whether a column, or what its dictionary holds, is of one of the kinds."""
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(test(kind) for test in kinds)


def _parquet_documents(
    batch: pa.RecordBatch, name: str, row: int, wanted: Wanted, limit: int
) -> Documents:
    raw = batch.column(wanted.text_column).cast(pa.large_binary())
    lengths = pc.binary_length(raw)
    target = wanted.target_column
    labels = None if target is None else batch.column(target)
    odd = pc.greater(lengths, limit)
    checks: list[tuple[pa.Array, Callable[[int], str]]] = [
        (pc.is_null(raw), lambda i: f"{wanted.text_column!r} is null"),
        (pc.fill_null(odd, False), lambda i: too_long(limit)),
    ]
    if labels is not None:
        labels = label_names(labels)
        checks.append((pc.is_null(labels), lambda i: "no label"))
    reasons = {
        i: reason(i) for mask, reason in checks for i in pc.indices_nonzero(mask).to_pylist()
    }
    if not _clean_text(raw):
        for i, value in enumerate(raw.to_pylist()):
            reason, _ = unreadable(value or b"")
            if reason:
                reasons.setdefault(i, reason)
    if reasons:
        good = pa.array([i for i in range(len(raw)) if i not in reasons], pa.int64())
        raw, labels = raw.take(good), labels.take(good) if labels is not None else None
    bad = [
        Bad(name, row + i, lengths[i].as_py() or 0, reason) for i, reason in sorted(reasons.items())
    ]
    return Documents(raw.cast(pa.large_string()), labels, bad, pc.sum(lengths).as_py() or 0)


def _parquet_records(
    batch: pa.RecordBatch, name: str, row: int, wanted: Wanted, limit: int
) -> Documents:
    """One by one: what texts and targets are made of is no single column of strings."""
    texts: list[str] = []
    targets: list[str] = []
    bad: list[Bad] = []
    size = 0
    for nth, record in enumerate(batch.to_pylist()):
        try:
            text, target = wanted.read(record)
            num_bytes = len(text.encode())
            size += num_bytes
            if num_bytes > limit:
                raise BadRecord(too_long(limit))
            texts.append(text)
            targets.append(target)
        except BadRecord as error:
            bad.append(Bad(name, row + nth, 0, str(error)))
    return Documents(
        _strings(texts), pa.array(targets, pa.string()) if wanted.target else None, bad, size
    )


def _clean_text(raw: pa.Array) -> bool:
    """Whether no value has a null byte or invalid UTF-8."""
    try:
        text = raw.cast(pa.large_string())
    except pa.ArrowInvalid:
        return False
    return not pc.any(pc.match_substring(text, "\0")).as_py()
