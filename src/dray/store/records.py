"""Records as JSON: whole documents that are replaced, and append-only rows (JSONL) on any filesystem.

On a local disk rows are appended and flushed, so that a killed process loses at most the line it was writing. Object
stores cannot append: there rows go into parts, the last of which is rewritten until it is full.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from dray.errors import StoreError
from dray.store.filesystem import (
    RangeReader,
    append_line,
    is_local,
    list_files,
    make_folder,
    read_bytes,
    write_bytes,
)

PART_BYTES = 64 * 1024
READ_BYTES = 4 * 1024 * 1024


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
    try:
        value = json.loads(read_bytes(filesystem, path))
    except ValueError as error:
        raise StoreError(path, f"not JSON ({error})", "dray writes this file whole", "restore it or use another run"
                         ) from error
    if not isinstance(value, dict):
        raise StoreError(path, f"holds a {type(value).__name__}", "a JSON mapping is wanted")
    return value


def save_json(filesystem: pafs.FileSystem, path: str, value: Mapping[str, Any], durable: bool = True) -> None:
    """Write a JSON mapping whole, replacing what is there."""
    write_bytes(filesystem, path, make_json(value, indent=1) + b"\n", durable)


class RowLog:
    """Append-only rows in one folder of JSONL files. One object belongs to one process; many may write at once."""

    def __init__(self, filesystem: pafs.FileSystem, folder: str) -> None:
        self.filesystem, self.folder = filesystem, folder
        self._writer = uuid.uuid4().hex[:8]
        self._parts: dict[str, tuple[int, bytes]] = {}

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows to the log called `name` (the start of the file's name); they are stored when this returns."""
        if not rows:
            return
        content = b"".join(make_json(row) + b"\n" for row in rows)
        if is_local(self.filesystem):
            make_folder(self.filesystem, self.folder)
            append_line(f"{self.folder}/{name}.jsonl", content)
            return
        number, before = self._parts.get(name, (0, b""))
        if len(before) > PART_BYTES:
            number, before = number + 1, b""
        path = f"{self.folder}/{name}-{self._writer}-{number:06d}.jsonl"
        write_bytes(self.filesystem, path, before + content)
        self._parts[name] = (number, before + content)

    def rows(self) -> list[dict[str, Any]]:
        """All rows, file by file in the order of their names; lines that a killed writer left torn are left out."""
        return list(self.iterate())

    def iterate(self) -> Iterator[dict[str, Any]]:
        """`rows`, one after another: of a file only a few megabytes are in memory at a time."""
        names = sorted(name for name in list_files(self.filesystem, self.folder) if name.endswith(".jsonl"))
        for name in names:
            torn, offset = b"", 0
            with closing(RangeReader(self.filesystem, f"{self.folder}/{name}")) as reader:
                while content := reader.read_at(READ_BYTES, offset):
                    lines, newline, rest = content.rpartition(b"\n")
                    yield from _parsed(torn + lines + newline if newline else b"")
                    torn, offset = rest if newline else torn + rest, offset + len(content)


def _parsed(content: bytes) -> Iterator[dict[str, Any]]:
    for line in content.split(b"\n")[:-1]:  # what follows the last newline is torn
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def make_limits(start_steps: Mapping[int, int]) -> dict[int, float]:
    """Attempt → the last step of its that counts, infinite for the last attempt: what it did past that was undone.

    `start_steps`: attempt → the step it started from.
    """
    limits: dict[int, float] = {}
    limit = float("inf")
    for attempt in sorted(start_steps, reverse=True):
        limits[attempt] = limit
        limit = min(limit, start_steps[attempt])
    return limits


def make_history(rows: Iterable[Mapping[str, Any]], start_steps: Mapping[int, int]) -> list[dict[str, Any]]:
    """One row a step, by step: what an attempt did past the start of a later attempt was undone, and is left out.

    `start_steps`: attempt → the step it started from.
    """
    limits = make_limits(start_steps)
    found: dict[int, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: int(row["attempt"])):
        if row["step"] <= limits.get(row["attempt"], float("inf")):
            found[int(row["step"])] = dict(row)
    return [found[step] for step in sorted(found)]


def make_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The rows as a table with every column that any row has; nested or mixed values become JSON text."""
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
            columns[name] = pa.array([None if value is None else json.dumps(value) for value in values])
    return pa.table(columns)
