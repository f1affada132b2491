"""Records as JSON: whole documents that are replaced, and append-only rows (JSONL) on any
filesystem.

On a local disk rows are appended and flushed, so that a killed process loses at most the line it
was writing. Object stores cannot append: there rows go into parts, the last of which is rewritten
until it is full. Full parts are compacted to Parquet.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from contextvars import copy_context
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from threading import Lock
from typing import Any, ClassVar, TypeVar

import pyarrow as pa
from pyarrow import fs as pafs

from dray.errors import StoreError
from dray.runs.compaction import make_parquet, read_parquet, read_summary
from dray.storage.filesystem import (
    TEMPORARY,
    RangeReader,
    append_line,
    delete_file,
    is_local,
    list_files,
    list_stamps,
    make_folder,
    read_bytes,
    write_bytes,
)
from dray.storage.retrying import first_safe_line, patience, retry

PART_BYTES = 64 * 1024
"""From which size on a part on an object store is closed: it is rewritten at every append."""
LOCAL_PART_BYTES = 8 * 1024 * 1024
"""The same on a disk, and what is compacted into one file: its rows are in memory for a moment."""
COMPACT_PARTS, FEWEST_PARTS = LOCAL_PART_BYTES // PART_BYTES, 4
"""So many closed parts on an object store are compacted; the fewer ones when nothing more is to
come."""
MAX_COMPACTED_BYTES = 8 * LOCAL_PART_BYTES
"""A larger part, of an earlier version, stays as it is."""
COMPACT_SECONDS = 10.0
"""How long a storage that fails is waited for: compacting can be done later."""
READ_BYTES = 4 * 1024 * 1024
WRITE_ROWS = 8192
TOGETHER, FEWEST_TOGETHER = 16, 4
"""How many requests to a storage are under way at once, and from how many on."""
KEPT_FOLDERS = 8
NUMBERS = ("step", "attempt")
"""By which rows are put in order: what has anything else there is no row of dray's."""
SHARED = "shared"
"""The writer of parts on a disk, where all processes append to the same ones."""

T = TypeVar("T")
_COMPACT_FILE = re.compile(r"(.+)-([0-9a-f]{8}|shared)-(\d{6,})-(\d{6,})\.parquet")
_PART_FILE = re.compile(r"(.+)-([0-9a-f]{8}|shared)-(\d{6,})\.jsonl")
_log = logging.getLogger("dray.runs")


def now() -> str:
    """The time as records carry it: UTC, ISO 8601, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def make_json(value: Mapping[str, Any], indent: int | None = None) -> bytes:
    """One JSON document; numbers of numpy and torch become plain ones."""
    return json.dumps(value, indent=indent, ensure_ascii=False, default=_plain).encode()


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no place in a record: {value!r}")


def load_json(filesystem: pafs.FileSystem, path: str) -> dict[str, Any]:
    """A JSON mapping. Raises FileNotFoundError, and StoreError if it is something else."""
    return parse_json(read_bytes(filesystem, path), path)


def parse_json(content: bytes, path: str) -> dict[str, Any]:
    """A file's content as a JSON mapping. Raises StoreError if it is something else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StoreError(
            path,
            f"not JSON ({error})",
            "dray writes this file whole",
            "restore it or use another run",
        ) from error
    if not isinstance(value, dict):
        raise StoreError(path, f"holds a {type(value).__name__}", "a JSON mapping is wanted")
    return value


def run_together(calls: Sequence[Callable[[], T]]) -> list[T]:
    """What the calls return, in their order; several at once, with the caller's patience. Raises
    the first error."""
    if len(calls) < FEWEST_TOGETHER:
        return [call() for call in calls]
    with ThreadPoolExecutor(TOGETHER) as pool:
        return list(
            pool.map(lambda pair: pair[0].run(pair[1]), [(copy_context(), call) for call in calls])
        )


def save_json(
    filesystem: pafs.FileSystem, path: str, value: Mapping[str, Any], durable: bool = True
) -> None:
    """Write a JSON mapping whole, replacing what is there."""
    write_bytes(filesystem, path, make_json(value, indent=1) + b"\n", durable)


class RecordCache:
    """The JSON records of a folder, of which a process reads each once: what lies there as it did
    is not read again.

    Shared by all objects of a process that are made for the same `place`.
    """

    _kept: ClassVar[OrderedDict[str, dict[str, tuple[tuple[int, int | None], bytes]]]] = (
        OrderedDict()
    )
    _lock: ClassVar[Lock] = Lock()

    def __init__(self, place: str, filesystem: pafs.FileSystem, folder: str) -> None:
        self._key, self.filesystem, self.folder = f"{place}|{folder}", filesystem, folder

    def load(self) -> dict[str, dict[str, Any]]:
        """File name → record: one listing, and a read of each record that is new or has changed."""
        stamps = {
            name: stamp
            for name, stamp in list_stamps(self.filesystem, self.folder).items()
            if name.endswith(".json") and not name.startswith(TEMPORARY)
        }
        with self._lock:
            before = self._kept.get(self._key, {})
        kept = {
            name: before[name]
            for name, stamp in stamps.items()
            if stamp[1] is not None and name in before and before[name][0] == stamp
        }
        new = sorted(stamps.keys() - kept.keys())
        kept |= {
            name: (stamps[name], content)
            for name, content in zip(new, self._read(new), strict=True)
        }
        with self._lock:
            self._kept[self._key] = kept
            self._kept.move_to_end(self._key)
            while len(self._kept) > KEPT_FOLDERS:
                self._kept.popitem(last=False)
        return {
            name: parse_json(content, f"{self.folder}/{name}")
            for name, (_, content) in kept.items()
        }

    def _read(self, names: Sequence[str]) -> list[bytes]:
        """The files' contents; many at once, since each waits for an answer."""
        return run_together(
            [partial(read_bytes, self.filesystem, f"{self.folder}/{name}") for name in names]
        )


@dataclass(frozen=True)
class _File:
    """A file of rows: the parts `first` to `last` of what a writer has appended to a log of that
    name."""

    name: str
    writer: str
    first: int
    last: int
    file: str
    num_bytes: int

    @property
    def is_compact(self) -> bool:
        return self.file.endswith(".parquet")


class RowLog:
    """Append-only rows in one folder. One object belongs to one process; many may write at once.

    Rows are JSON lines in parts. A part that is full is closed: nothing is appended to it any more.
    Closed parts become one Parquet file, whose name says which parts it holds: where it is, they
    are not read, so that a process that dies between writing it and deleting them loses and doubles
    nothing.
    """

    def __init__(self, filesystem: pafs.FileSystem, folder: str) -> None:
        self.filesystem, self.folder = filesystem, folder
        self._writer = SHARED if is_local(filesystem) else uuid.uuid4().hex[:8]
        self._parts: dict[str, tuple[int, bytes]] = {}
        self._compacted: dict[str, int] = {}

    # ---- writing --------------------------------------------------------------------------------

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows to the log called `name` (the start of the file's name); they are stored when
        this returns."""
        if not rows:
            return
        content = b"".join(make_json(row) + b"\n" for row in rows)
        if self._writer == SHARED:
            self._append_locally(name, content)
            return
        for other in [found for found, (_, kept) in self._parts.items() if found != name and kept]:
            self._parts[other] = (
                self._parts[other][0] + 1,
                b"",
            )  # an attempt is over: its last part is closed
            self._compact_when_due(other, FEWEST_PARTS)
        number, before = self._parts.get(name, (0, b""))
        if len(before) > PART_BYTES:
            number, before = number + 1, b""
        write_bytes(self.filesystem, f"{self.folder}/{self._file(name, number)}", before + content)
        self._parts[name] = number, before + content
        self._compact_when_due(name, COMPACT_PARTS)

    def _append_locally(self, name: str, content: bytes) -> None:
        """Processes share parts: the one that finds a part full goes on with the next, and
        compacts."""
        make_folder(self.filesystem, self.folder)
        number = self._parts[name][0] if name in self._parts else None
        while number is None or not append_line(
            f"{self.folder}/{self._file(name, number)}",
            content,
            LOCAL_PART_BYTES,
            create=number != self._parts.get(name, (None,))[0],
        ):
            self._parts.pop(name, None)
            number = max(
                (
                    file.last + 1
                    if file.is_compact or file.num_bytes >= LOCAL_PART_BYTES
                    else file.last
                    for file in self._files(name)
                ),
                default=0,
            )
        self._parts[name] = number, b""
        self._compact_when_due(name, 1)

    def _compact_when_due(self, name: str, fewest: int) -> None:
        """Compact once so many parts have been closed. A storage that fails is no hindrance: the
        rows are stored."""
        number = self._parts[name][0]
        if number - self._compacted.get(name, 0) < fewest:
            return
        self._compacted[name] = number
        try:
            with patience(COMPACT_SECONDS):
                self.compact(name)
        except (OSError, StoreError) as error:
            _log.warning(
                "%s: rows of %s stay in parts for now (%s)",
                self.folder,
                name,
                first_safe_line(error),
            )

    def compact(self, name: str) -> None:
        """Make Parquet files of the closed parts of a log, whoever wrote them, and delete the
        parts.

        Parts with a whole line that is no row stay as they are: what was in it may matter to
        somebody. Raises StoreError.
        """
        for compact in [file for file in self._files(name) if file.is_compact]:
            left = self._left_behind(compact, name)
            if (
                len(left) == compact.last - compact.first + 1
            ):  # whoever wrote it did not come to look at it
                self._compact_files(left)
            else:
                self._delete(left)
        files = [file for file in self._files(name) if not file.is_compact]
        for writer in {file.writer for file in files}:
            own = sorted(
                (file for file in files if file.writer == writer), key=lambda file: file.first
            )
            newest = (
                self._parts[name][0]
                if writer == self._writer and name in self._parts
                else own[-1].first
            )
            for batch in _batches(
                [
                    file
                    for file in own
                    if file.num_bytes <= MAX_COMPACTED_BYTES
                    and (
                        file.num_bytes >= LOCAL_PART_BYTES
                        if writer == SHARED
                        else file.first < newest
                    )
                ]
            ):
                self._compact_files(batch)

    def _compact_files(self, files: Sequence[_File]) -> None:
        rows: list[dict[str, Any]] = []
        parts: list[int] = []
        try:
            for file in files:
                content = read_bytes(self.filesystem, f"{self.folder}/{file.file}")
                found = list(_parsed(content))
                if len(found) != content.count(b"\n"):
                    return
                rows += found
                parts += [file.first] * len(found)
        except FileNotFoundError:  # another process was faster
            return
        first, last = files[0], files[-1]
        path = (
            f"{self.folder}/{first.name}-{first.writer}-{first.first:06d}-{last.last:06d}.parquet"
        )
        content = make_parquet(rows, parts)
        write_bytes(self.filesystem, path, content)
        if read_bytes(self.filesystem, path) != content:
            raise StoreError(
                path, "is not what was written", "rows are deleted only where they lie elsewhere"
            )
        self._delete(files)

    def _delete(self, files: Sequence[_File]) -> None:
        for file in files:
            delete_file(self.filesystem, f"{self.folder}/{file.file}")

    def _file(self, name: str, number: int) -> str:
        if self._writer == SHARED and not number:
            return f"{name}.jsonl"
        return f"{name}-{self._writer}-{number:06d}.jsonl"

    # ---- reading --------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """All rows, file by file in the order of their names; lines that a killed writer left torn
        are left out."""
        return list(self.iterate())

    def names(self) -> list[str]:
        """The logs that there are, in the order of their names."""
        return list(dict.fromkeys(file.name for file in self._files()))

    def iterate(
        self, name: str | None = None, columns: Sequence[str] | None = None
    ) -> Iterator[dict[str, Any]]:
        """`rows`, of all logs or one, one after another: of a file only a few megabytes are in
        memory at a time.

        `columns`: the keys that are wanted. Rows that are compacted meanwhile are neither lost nor
        given twice.
        """
        done: dict[tuple[str, str], tuple[int, int]] = {}  # (last part, rows given of it)
        while True:
            try:
                for file in self._files(name):
                    for part, row in self._after(
                        file, done.get((file.name, file.writer), (-1, 0)), columns
                    ):
                        before = done.get((file.name, file.writer), (-1, 0))
                        done[file.name, file.writer] = (
                            part,
                            before[1] + 1 if part == before[0] else 1,
                        )
                        yield row
                return
            except FileNotFoundError:
                continue  # it was compacted: the listing has what replaces it

    def newest_first(self, name: str) -> Iterator[list[dict[str, Any]]]:
        """The rows of a log file by file, the newest first; for those who need only the end. May
        raise FileNotFoundError where files are compacted meanwhile: begin again."""
        for file in reversed(self._files(name)):
            yield [row for _, row in self._after(file, (-1, 0), None)]

    def summaries(
        self, name: str
    ) -> Iterator[tuple[dict[str, Any], Callable[[], list[dict[str, Any]]]]]:
        """Of each file of a log, in order: its summary (`compaction.summarize`; empty where only
        the rows tell), and a call that reads its rows."""
        done: dict[str, int] = {}
        for file in self._files(name):
            before = done.get(file.writer, -1)
            done[file.writer] = max(before, file.last)
            summary = self._summary(file) if file.is_compact and file.first > before else {}
            yield (
                summary,
                lambda file=file, before=before: [  # type: ignore[misc]
                    row for part, row in self._read(file, None) if part > before
                ],
            )

    def _summary(self, file: _File) -> dict[str, Any]:
        def read() -> dict[str, Any]:
            with self.filesystem.open_input_file(f"{self.folder}/{file.file}") as stream:
                return read_summary(stream)

        try:
            return retry(read, file.file)
        except (pa.ArrowException, ValueError):  # damaged: the rows tell, or say so
            return {}

    def _files(self, name: str | None = None) -> list[_File]:
        """The files by name, writer and first part; of parts that a Parquet file holds only
        that."""
        kept: list[_File] = []
        for file in self._all_files(name):
            last = (
                kept[-1]
                if kept and (kept[-1].name, kept[-1].writer) == (file.name, file.writer)
                else None
            )
            if last is None or file.last > last.last:
                kept.append(file)
        return kept

    def _all_files(self, name: str | None) -> list[_File]:
        """Every file, also the parts that a process which died has left beside their Parquet
        file."""
        parsed = (_parse_file(*item) for item in list_files(self.filesystem, self.folder).items())
        return sorted(
            (file for file in parsed if file is not None and name in (None, file.name)),
            key=lambda file: (file.name, file.writer, file.first, -file.last, not file.is_compact),
        )

    def _left_behind(self, file: _File, name: str) -> list[_File]:
        """The parts of a log that lie there although they are in a Parquet file."""
        return [
            part
            for part in self._all_files(name)
            if not part.is_compact
            and part.writer == file.writer
            and file.first <= part.first
            and part.last <= file.last
        ]

    def _after(
        self, file: _File, done: tuple[int, int], columns: Sequence[str] | None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of a file that come after so many rows of the part `done`."""
        last, given = done
        if file.last < last:
            return
        for part, row in self._read(file, columns):
            if part == last and given:
                given -= 1
            elif part >= last:
                yield part, row

    def _read(
        self, file: _File, columns: Sequence[str] | None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        path = f"{self.folder}/{file.file}"
        if file.is_compact:
            yield from self._read_compact(file, path, columns)
            return
        torn, offset = b"", 0
        with closing(RangeReader(self.filesystem, path)) as reader:
            while content := reader.read_at(READ_BYTES, offset):
                lines, newline, rest = content.rpartition(b"\n")
                for row in _parsed(torn + lines + newline if newline else b""):
                    yield (
                        file.first,
                        row
                        if columns is None
                        else {key: row[key] for key in row if key in columns},
                    )
                torn, offset = rest if newline else torn + rest, offset + len(content)

    def _read_compact(
        self, file: _File, path: str, columns: Sequence[str] | None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of a Parquet file; of the parts themselves where it is damaged and they are
        there still."""
        given = 0
        try:
            # Local files are read in pieces, those elsewhere as a whole: they are small, and a read
            # can be repeated.
            source = path if is_local(self.filesystem) else read_bytes(self.filesystem, path)
            for part, row in read_parquet(source, columns):
                given += 1
                yield part, row
        except StoreError:
            parts = self._left_behind(file, file.name)
            if len(parts) != file.last - file.first + 1:
                raise
            _log.warning("%s is damaged; the parts it was made from are read", path)
            for number, found in enumerate(
                row for part in parts for row in self._read(part, columns)
            ):
                if number >= given:
                    yield found


def _parse_file(file: str, num_bytes: int) -> _File | None:
    if match := _COMPACT_FILE.fullmatch(file):
        return _File(match[1], match[2], int(match[3]), int(match[4]), file, num_bytes)
    if match := _PART_FILE.fullmatch(file):
        return _File(match[1], match[2], int(match[3]), int(match[3]), file, num_bytes)
    stem, dot, ending = file.rpartition(".")
    return _File(stem, SHARED, 0, 0, file, num_bytes) if dot and ending == "jsonl" else None


def _batches(files: Sequence[_File]) -> Iterator[list[_File]]:
    """Runs of parts without a gap, of a few megabytes each."""
    batch: list[_File] = []
    for file in files:
        if batch and (
            file.first != batch[-1].last + 1 or sum(f.num_bytes for f in batch) >= LOCAL_PART_BYTES
        ):
            yield batch
            batch = []
        batch.append(file)
    if batch:
        yield batch


def _parsed(content: bytes) -> Iterator[dict[str, Any]]:
    for line in content.split(b"\n")[:-1]:  # what follows the last newline is torn
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and not any(
            isinstance(row.get(name), (str, list, dict)) for name in NUMBERS
        ):
            yield row


def make_limits(start_steps: Mapping[int, int]) -> dict[int, float]:
    """Attempt → the last step of its that counts, infinite for the last attempt: what it did past
    that was undone.

    `start_steps`: attempt → the step it started from.
    """
    limits: dict[int, float] = {}
    limit = float("inf")
    for attempt in sorted(start_steps, reverse=True):
        limits[attempt] = limit
        limit = min(limit, start_steps[attempt])
    return limits


def make_history(
    rows: Iterable[Mapping[str, Any]], start_steps: Mapping[int, int]
) -> list[dict[str, Any]]:
    """One row a step, by step: what an attempt did past the start of a later attempt was undone,
    and is left out.

    `start_steps`: attempt → the step it started from.
    """
    limits = make_limits(start_steps)
    found: dict[int, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: int(row["attempt"])):
        if row["step"] <= limits.get(row["attempt"], float("inf")):
            found[int(row["step"])] = dict(row)
    return [found[step] for step in sorted(found)]


def write_table(rows: Callable[[], Iterator[Mapping[str, Any]]], stream: Any) -> None:
    """Write rows as Parquet with the columns of `make_table`, some thousands at a time. `rows` is
    called twice: the kinds of the values are found out first."""
    import pyarrow.parquet as pq

    kinds: dict[str, set[type]] = {}
    for row in rows():
        for name, value in row.items():
            kinds.setdefault(name, set()).add(type(value))
    schema = pa.schema([(name, _arrow_type(found - {type(None)})) for name, found in kinds.items()])
    with pq.ParquetWriter(stream, schema) as writer:
        remaining = rows()
        while chunk := list(islice(remaining, WRITE_ROWS)):
            writer.write_table(
                pa.table(
                    [
                        _make_array(
                            [row.get(field.name) for row in chunk],
                            field.type,
                            as_json=not _is_plain(kinds[field.name] - {type(None)}),
                        )
                        for field in schema
                    ],
                    schema=schema,
                )
            )


def _is_plain(kinds: set[type]) -> bool:
    return kinds <= {int, float} or (len(kinds) == 1 and kinds <= {bool, str})


def _arrow_type(kinds: set[type]) -> pa.DataType:
    if not kinds:
        return pa.null()
    if kinds <= {int, float}:
        return pa.float64() if float in kinds else pa.int64()
    return pa.bool_() if kinds == {bool} else pa.string()


def _make_array(values: Sequence[Any], arrow_type: pa.DataType, *, as_json: bool) -> pa.Array:
    if as_json:
        values = [None if value is None else json.dumps(value) for value in values]
    elif arrow_type == pa.float64():
        values = [None if value is None else float(value) for value in values]
    return pa.array(values, arrow_type)


def make_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The rows as a table with every column that any row has; nested or mixed values become JSON
    text."""
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if any(isinstance(value, float) for value in values):
            values = [float(value) if type(value) is int else value for value in values]
        try:
            if any(isinstance(value, (dict, list)) for value in values):
                raise pa.ArrowInvalid("nested")
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            columns[name] = pa.array(
                [None if value is None else json.dumps(value) for value in values]
            )
    return pa.table(columns)
