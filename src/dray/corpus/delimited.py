"""csv and tsv: records of fields between delimiters, quoted as RFC 4180 says or not at all.

A field that begins with a quote ends at the next quote that is not doubled; it may hold delimiters,
newlines and doubled quotes. A quote anywhere else is a character like others. A record that breaks
this is one bad record, and reading goes on behind it: where a quote never closes, at the next line
with as many fields as the first record has; where it closes amid a field some lines later, and all
these have as many fields, at the first of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dray.corpus.bytes_in import Blocks, DamagedFile, Lost, line_blocks, read_head, too_long
from dray.corpus.records import (
    BadRecord,
    Wanted,
    missing_column,
    named_column,
    repeated_column,
    whole_column,
)
from dray.corpus.sources import InputFile
from dray.errors import CorpusError
from dray.spec import WHOLE, Source

DELIMITERS = {"csv": ",", "tsv": "\t"}
QUOTE, NEWLINE, RETURN = (ord(character) for character in '"\n\r')
UNQUOTED = "`quoting: none` of the source reads quotes as they are"
_QUOTED_FIELD = re.compile(r'"([^"]*+(?:""[^"]*+)*+)"')


# --- where records end --------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _quoted_fields(delimiter: str) -> re.Pattern[bytes]:
    """A quoted field where a field begins; the group is empty if it does not close."""
    return re.compile(rb'(?:(?<=[\n%s])|\A)"[^"]*+(?:""[^"]*+)*+("?)' % delimiter.encode())


def _opens_regularly(
    content: npt.NDArray[np.uint8], quotes: npt.NDArray[np.int64], delimiter: str
) -> bool:
    """Whether every odd quote begins a field or doubles the one before it: then parity tells inside
    from outside."""
    before = content[quotes[::2] - 1]
    regular = (
        (before == ord(delimiter)) | (before == NEWLINE) | (before == QUOTE) | (quotes[::2] == 0)
    )
    return bool(regular.all())


def _find_end(data: bytes, delimiter: str) -> tuple[int, bool]:
    """Where the last whole record of data that begins with a record ends; whether the rest ends in
    a quoted field."""
    if b'"' not in data:
        return data.rfind(b"\n") + 1, False
    content = np.frombuffer(data, np.uint8)
    quotes = np.flatnonzero(content == QUOTE)
    if not _opens_regularly(content, quotes, delimiter):
        gaps = list(_gaps(data, delimiter))
        is_open = gaps[-1][1] < 0
        return max(
            data.rfind(b"\n", start, stop if stop >= 0 else start) for start, stop in gaps
        ) + 1, is_open
    end = data.rfind(b"\n")
    while end >= 0:
        before = int(np.searchsorted(quotes, end))
        if before % 2 == 0:
            break
        end = data.rfind(b"\n", 0, int(quotes[before - 1]))
    return end + 1, len(quotes) % 2 == 1


def _gaps(data: bytes, delimiter: str) -> Iterator[tuple[int, int]]:
    """The stretches outside quoted fields; the last one ends at -1 if the last quoted field does
    not close."""
    start = 0
    for field in _quoted_fields(delimiter).finditer(data):
        yield start, field.start()
        start = field.end()
        if not field[1]:
            yield start, -1
            return
    yield start, len(data)


def split_records(data: bytes, delimiter: str) -> Iterator[bytes]:
    """The records of a block that begins and ends with one, without the newlines between them."""
    begin = 0
    for start, stop in _gaps(data, delimiter):
        while stop >= 0 and (end := data.find(b"\n", start, stop)) >= 0:
            yield data[begin:end]
            begin = start = end + 1
    if begin < len(data):
        yield data[begin:]


def split_fields(record: str, delimiter: str, quoted: bool) -> list[str]:
    """The fields of a record; none for an empty one. Raises BadRecord."""
    if not record:
        return []
    if not quoted or '"' not in record:
        return record.split(delimiter)
    fields: list[str] = []
    place = 0
    while True:
        if record.startswith('"', place):
            field = _QUOTED_FIELD.match(record, place)
            if field is None:
                raise BadRecord(f"a quote is not closed; {UNQUOTED}")
            fields.append(field[1].replace('""', '"'))
            end = field.end()
            if end < len(record) and record[end] != delimiter:
                raise BadRecord(f"text behind a closing quote; {UNQUOTED}")
        else:
            end = record.find(delimiter, place)
            end = len(record) if end < 0 else end
            fields.append(record[place:end])
        if end >= len(record):
            return fields
        place = end + 1


class _Cutter:
    """Cuts a stream into blocks of whole records. `rest` begins at `offset`, where a record
    does."""

    def __init__(self, limit: int, delimiter: str, num_fields: int) -> None:
        self._limit, self._delimiter, self._num_fields = limit, delimiter, num_fields
        self.offset, self.rest = 0, b""
        self._lost_from = -1
        """Where a record began that is being skipped, up to the end of its line or to a line that
        fits."""
        self._reason = ""
        self._seeks = False

    def feed(self, chunk: bytes, ended: bool) -> Blocks:
        """What the stream so far gives; all of it if it has ended."""
        self.rest += chunk
        while self.rest:
            if self._lost_from >= 0:
                if not (self._seek(ended) if self._seeks else self._skip()):
                    break
                yield self.lost(self._reason, trim=True)
            end, is_open = _find_end(self.rest, self._delimiter)
            overlong = self._find_overlong(end) if end > self._limit else -1
            if overlong >= 0:
                end, is_open = overlong, True
            elif ended and not is_open:
                end = len(self.rest)
            if end:
                yield self.offset, self._take(end), []
            if not self.rest or (len(self.rest) <= self._limit and not ended and overlong < 0):
                break
            self._lost_from, self._seeks = self.offset, is_open
            self._reason = (
                f"a quote does not close within data.max_record_bytes = {self._limit}; {UNQUOTED}"
                if is_open
                else too_long(self._limit)
            )
            if is_open:
                self._seeks = self._skip()
        if ended and self._lost_from >= 0:
            yield self.lost(self._reason)

    def lost(
        self, reason: str, *, trim: bool = False, ends_file: bool = False
    ) -> tuple[int, bytes, list[Lost]]:
        """The piece that was skipped, up to here; `trim`: without its last newline."""
        start, self._lost_from = self._lost_from if self._lost_from >= 0 else self.offset, -1
        return start, b"", [Lost(start, self.offset - start - trim, reason, ends_file)]

    def take_rest(self) -> None:
        """Pass over what is left."""
        self._take(len(self.rest))

    def _take(self, count: int) -> bytes:
        taken, self.rest = self.rest[:count], self.rest[count:]
        self.offset += len(taken)
        return taken

    def _find_overlong(self, stop: int) -> int:
        """Where a record begins that goes on over lines beyond the limit: however the stream
        arrived, its quote counts as one that does not close. -1 if there is none."""
        start = 0
        for record in split_records(self.rest[:stop], self._delimiter):
            if len(record) > self._limit and b"\n" in record:
                return start
            start += len(record) + 1
        return -1

    def _skip(self) -> bool:
        """Pass over the rest of a line; whether its end was there."""
        end = self.rest.find(b"\n") + 1
        self._take(end or len(self.rest))
        return end > 0

    def _seek(self, ended: bool) -> bool:
        """Pass over lines up to one that has as many fields as a record; whether there was one."""
        start = 0
        while (end := self.rest.find(b"\n", start)) >= 0 or (ended and start < len(self.rest)):
            end = len(self.rest) if end < 0 else end
            if self._fits(self.rest[start:end]):
                self._take(start)
                return True
            start = end + 1
        self._take(start)
        if len(self.rest) > self._limit:  # a long line is none that fits
            self._seeks = self._skip()
        return False

    def _fits(self, line: bytes) -> bool:
        try:
            fields = split_fields(line.decode("latin-1").rstrip("\r"), self._delimiter, quoted=True)
        except BadRecord:
            return False
        return len(fields) == self._num_fields


def record_blocks(chunks: Iterator[bytes], limit: int, delimiter: str, num_fields: int) -> Blocks:
    """Blocks of whole records, and what was lost between them. Nothing far over the limit is held.

    `num_fields`: fields of a record, by which reading finds its way back behind a quote that never
    closes.
    """
    cutter = _Cutter(limit, delimiter, num_fields)
    try:
        for chunk in chunks:
            yield from cutter.feed(chunk, ended=False)
    except DamagedFile as error:
        cutter.take_rest()
        yield cutter.lost(str(error), ends_file=True)
        return
    yield from cutter.feed(b"", ended=True)


# --- what records hold --------------------------------------------------------------------------


@dataclass
class Delimited:
    """Values between commas or tabs."""

    delimiter: str
    quoted: bool
    skips_first_record: bool
    columns: list[str]
    num_columns: int
    wanted: Wanted
    places: dict[str, int]
    """Of the wanted columns."""

    def cut(self, chunks: Iterator[bytes], limit: int) -> Blocks:
        """Blocks of whole records."""
        if self.quoted:
            return record_blocks(chunks, limit, self.delimiter, self.num_columns)
        return line_blocks(chunks, limit)

    def split(self, data: bytes) -> Iterator[bytes]:
        """The records of a block. A quote that only closes amid a later line costs the line that it
        stands in."""
        if not self.quoted or b'"' not in data:
            yield from data.split(b"\n")
            return
        for record in split_records(data, self.delimiter):
            if b"\n" in record and self._strays(record):
                yield from record.split(b"\n")
            else:
                yield record

    def is_blank(self, record: bytes) -> bool:
        """Whether a record is nothing but an empty line; spaces alone are a text where there is one
        column."""
        return not record.strip(b" \r" if self.num_columns > 1 else b"\r")

    def _strays(self, record: bytes) -> bool:
        """Whether a record over several lines is broken, and all of them would be records but for
        the first quote."""
        text = record.decode("latin-1").removesuffix("\r")
        first, *others = text.replace("\r\n", "\n").split("\n")
        if (
            self.num_columns < 2
            or first.count(self.delimiter) != self.num_columns - 1
            or self._count_fields(text)
        ):
            return False
        return all(self._count_fields(line) == self.num_columns for line in others)

    def _count_fields(self, record: str) -> int:
        try:
            return len(split_fields(record, self.delimiter, quoted=True))
        except BadRecord:
            return 0

    def parse_block(self, data: bytes) -> tuple[pa.Array, pa.Array | None] | None:
        """Texts and labels at once; None if anything is odd."""
        import pyarrow.csv as pacsv

        num_records = self._count(data) if self.wanted.is_plain else None
        if num_records is None:
            return None
        names = [str(index) for index in range(self.num_columns)]
        wanted = [self.places[column] for column in self.wanted.columns]
        try:
            table = pacsv.read_csv(
                pa.BufferReader(data),
                read_options=pacsv.ReadOptions(
                    use_threads=False, block_size=len(data) + 1, column_names=names
                ),
                parse_options=pacsv.ParseOptions(
                    delimiter=self.delimiter,
                    quote_char='"' if self.quoted else False,
                    newlines_in_values=self.quoted,
                ),
                convert_options=pacsv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()),
                    strings_can_be_null=False,
                    include_columns=[names[i] for i in dict.fromkeys(wanted)],
                ),
            )
        except pa.ArrowInvalid:
            return None
        if table.num_rows != num_records:
            return None
        texts = whole_column(table[names[wanted[0]]], pa.large_string())
        labels = named_column(table[names[wanted[-1]]]) if self.wanted.target else None
        if texts is None or (labels is not None and labels.null_count):
            return None
        return texts, labels

    def _count(self, data: bytes) -> int | None:
        """The records of a block; none if Arrow might read it otherwise than one by one."""
        if not data or data.count(b"\r") != data.count(
            b"\r\n"
        ):  # Arrow ends a line at a lone carriage return
            return None
        open_end = data[-1:] != b"\n"
        if not self.quoted or b'"' not in data:
            return data.count(b"\n") + open_end
        content = np.frombuffer(data, np.uint8)
        quotes = np.flatnonzero(content == QUOTE)
        if len(quotes) % 2 or not _opens_regularly(content, quotes, self.delimiter):
            return None
        behind = np.append(content, np.uint8(NEWLINE))[quotes[1::2] + 1]
        if not np.isin(behind, (ord(self.delimiter), NEWLINE, RETURN, QUOTE)).all():
            return None
        newlines = np.flatnonzero(content == NEWLINE)
        return int((np.searchsorted(quotes, newlines) % 2 == 0).sum()) + open_end

    def parse_line(self, line: str) -> tuple[str, str]:
        """Text and label of one record. Raises BadRecord."""
        fields = split_fields(line.removesuffix("\r"), self.delimiter, self.quoted)
        if len(fields) != self.num_columns:
            raise BadRecord(f"{len(fields)} fields instead of {self.num_columns}")
        return self.wanted.read({column: fields[place] for column, place in self.places.items()})


def make_delimited(file: InputFile, source: Source, wanted: Wanted) -> Delimited:
    """A parser for the columns that the file's first record shows. Raises CorpusError if one is
    missing."""
    delimiter, quoted = DELIMITERS[file.form], source.quoting != "none"
    try:
        head = read_head(file).head
        records = split_records(head, delimiter) if quoted else iter(head.split(b"\n"))
        first = next(records, b"").decode(errors="replace").removesuffix("\r")
        fields = split_fields(first, delimiter, quoted)
    except DamagedFile:  # reading it will say so
        fields = []
    except BadRecord as error:
        raise CorpusError(
            file.name, f"its first line is broken ({error})", "the first line shows the columns"
        ) from error
    columns = fields if source.header else [str(index) for index in range(len(fields))]
    places = {name: index for index, name in reversed(list(enumerate(columns)))}
    if not source.header or wanted.text_column.isdigit():
        places = {str(index): index for index in range(len(columns))} | places
    known = {*places, WHOLE}
    absent = next((part for part in wanted.parts if part[1] not in known), None)
    if fields and absent is not None:
        raise missing_column(file.name, absent, columns)
    for name in wanted.columns:
        if columns.count(name) > 1:
            raise repeated_column(file.name, name)
    if not fields:  # an empty file has no records to parse
        return Delimited(delimiter, quoted, source.header, columns, 0, wanted, {})
    needed = tuple(columns) if wanted.is_whole else wanted.columns
    own = {name: places[name] for name in needed}
    return Delimited(delimiter, quoted, source.header, columns, len(fields), wanted, own)
