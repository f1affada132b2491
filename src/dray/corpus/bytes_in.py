"""The bytes of input files: decompressing by content, ranges of plain files, blocks of whole lines.

All of it streams: memory stays bounded by a block and the longest line that is allowed. A damaged
file gives all that comes before the damage.
"""

from __future__ import annotations

import bz2
import hashlib
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, cast

from dray.corpus.containers import (
    BOM,
    HEAD_BYTES,
    ends_lines_otherwise,
    find_compression,
    find_pointer,
    is_text,
    name_foreign,
)
from dray.corpus.listing import is_hidden
from dray.corpus.sources import InputFile

BLOCK_BYTES = 4 * 1024 * 1024
READ_BYTES = 256 * 1024
ZSTD_FEED_BYTES = 512
"""Compressed bytes given to zstd at once, whose output of 128 KiB for every 4 bytes nothing else
bounds: 16 MiB here. Larger feeds are no faster."""
XZ_MEMORY_BYTES = 512 * 1024 * 1024


class DamagedFile(Exception):
    """The rest of a file cannot be read; the message says why. `num_bytes`: how much that is, if
    known."""

    def __init__(self, reason: str, num_bytes: int | None = None) -> None:
        self.num_bytes = num_bytes
        super().__init__(reason)


class Lost(NamedTuple):
    """A piece of a file's content that gives no record, and why."""

    offset: int
    num_bytes: int
    reason: str
    ends_file: bool = False
    """Whether the file is damaged from there on, so that nobody knows how much is missing."""


Blocks = Iterator[tuple[int, bytes, list[Lost]]]
"""(offset, whole records, what was lost)"""


@dataclass(frozen=True)
class Content:
    """The decompressed content of a file without its byte order mark, in chunks."""

    offset: int
    """Bytes of the mark that were left out before it."""
    head: bytes
    chunks: Iterator[bytes]
    """All of it, the head included."""
    note: str
    """What its first bytes showed to be other than its name says."""


class HashingStream:
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


def hash_file(file: InputFile) -> str:
    stream = HashingStream(file.open().open_input_stream(file.path, compression=None))
    try:
        return stream.finish()
    finally:
        stream.close()


def open_content(file: InputFile, stream: Any) -> Content:
    """The content of a file of text that is read from the stream. Raises DamagedFile if it is none
    at all."""
    head = cast(bytes, stream.read(HEAD_BYTES))
    compression = find_compression(head)
    if not head and file.compression:
        raise DamagedFile(f"empty, where {file.compression} is read")
    if not compression and file.compression and not is_text(head):
        raise DamagedFile(
            f"damaged {file.compression} (its first bytes are not {file.compression})"
        )
    note = (
        ""
        if compression == file.compression
        else f"{compression or 'not compressed'}, whatever its name says"
    )
    size = READ_BYTES if compression else BLOCK_BYTES
    raw = chain([head], iter(lambda: cast(bytes, stream.read(size)), b""))
    chunks = _inflate_zip(file) if compression == "zip" else decompress(raw, compression)
    first = next(chunks, b"")
    pointed = find_pointer(first)
    if pointed is not None:
        raise DamagedFile("a git-LFS pointer in place of the file; fetch it: git lfs pull", pointed)
    foreign = name_foreign(first[:HEAD_BYTES])
    if foreign:
        raise DamagedFile(foreign)
    if file.form != "text" and ends_lines_otherwise(first[:HEAD_BYTES]):
        raise DamagedFile("lines that end with carriage returns alone; convert it: tr '\\r' '\\n'")
    mark = len(BOM) if first.startswith(BOM) else 0
    return Content(mark, first[mark:][:HEAD_BYTES], chain([first[mark:]], chunks), note)


def open_bytes(stream: Any) -> Iterator[bytes]:
    """The content of a file that is no text, decompressed, in chunks. Raises DamagedFile."""
    head = cast(bytes, stream.read(HEAD_BYTES))
    compression = find_compression(head)
    pointed = find_pointer(head)
    if pointed is not None:
        raise DamagedFile("a git-LFS pointer in place of the file; fetch it: git lfs pull", pointed)
    if compression == "zip":
        raise DamagedFile("a zip archive; unpack it")
    return decompress(
        chain([head], iter(lambda: cast(bytes, stream.read(READ_BYTES)), b"")), compression
    )


def read_head(file: InputFile) -> Content:
    """The first bytes of a file's content; its chunks must not be read. Raises DamagedFile, and
    OSError."""
    with file.open().open_input_stream(file.path, compression=None) as stream:
        return open_content(file, stream)


def decompress(raw: Iterator[bytes], compression: str) -> Iterator[bytes]:
    """The content in chunks of about BLOCK_BYTES. Raises DamagedFile after all that could be
    decompressed."""
    pieces: list[bytes] = []
    size = 0
    damaged: DamagedFile | None = None
    inflate: dict[str, Callable[[Iterator[bytes]], Iterator[bytes]]] = {
        "": iter,
        "gzip": _inflate_gzip,
        "zstd": _inflate_zstd,
        "bzip2": lambda raw: _inflate_members(raw, "bzip2", bz2.BZ2Decompressor),
        "xz": lambda raw: _inflate_members(
            raw, "xz", lambda: lzma.LZMADecompressor(memlimit=XZ_MEMORY_BYTES)
        ),
    }
    try:
        for piece in inflate[compression](raw):
            pieces.append(piece)
            size += len(piece)
            if size >= BLOCK_BYTES:
                yield b"".join(pieces)
                pieces, size = [], 0
    except DamagedFile as error:
        damaged = error
    if pieces:
        yield b"".join(pieces)
    if damaged:
        raise damaged


def _inflate_members(raw: Iterator[bytes], name: str, build: Callable[[], Any]) -> Iterator[bytes]:
    """What Python's own decompressors read: members one after the other, with zeros between
    them."""
    member: Any = None
    for data in raw:
        while data or (member is not None and not member.needs_input):
            if member is None:
                data = data.lstrip(b"\0")
                if not data:
                    break
                member = build()
            try:
                piece = member.decompress(data, BLOCK_BYTES)
            except (OSError, lzma.LZMAError) as error:
                raise DamagedFile(f"damaged {name} ({error})") from error
            if piece:
                yield piece
            data = member.unused_data if member.eof else b""
            if member.eof:
                member = None
    if member is not None:
        raise DamagedFile(f"truncated {name}")


def _inflate_zip(file: InputFile) -> Iterator[bytes]:
    """The files in an archive by name, each with a newline at its end; one alone where they cannot
    be put together."""
    try:
        with file.open().open_input_file(file.path) as raw, zipfile.ZipFile(raw) as archive:
            members = sorted(
                (
                    member
                    for member in archive.infolist()
                    if not member.is_dir()
                    and not is_hidden(member.filename)
                    and not member.filename.startswith("__MACOSX/")
                ),
                key=lambda member: member.filename,
            )
            if len(members) != 1 and (not members or file.form not in ("jsonl", "lines")):
                raise DamagedFile(f"a zip archive of {len(members)} files; unpack it")
            for member in members:
                with archive.open(member) as stream:
                    yield from _read_member(stream)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
        lzma.LZMAError,
        ValueError,
    ) as error:
        raise DamagedFile(f"damaged or locked zip ({error})") from error


def _read_member(stream: Any) -> Iterator[bytes]:
    data = cast(bytes, stream.read(BLOCK_BYTES)).removeprefix(BOM)
    last = b""
    while data:
        last = data[-1:]
        yield data
        data = cast(bytes, stream.read(BLOCK_BYTES))
    if last not in (b"", b"\n"):
        yield b"\n"


def _inflate_gzip(raw: Iterator[bytes]) -> Iterator[bytes]:
    """Members one after the other; zero padding between them is allowed."""
    member: Any = None
    for data in raw:
        while data:
            if member is None:
                data = data.lstrip(b"\0")
                if not data:
                    break
                member = zlib.decompressobj(wbits=31)
            try:
                piece = member.decompress(data, BLOCK_BYTES)
            except zlib.error as error:
                raise DamagedFile(f"damaged gzip ({error})") from error
            if piece:
                yield piece
            data = member.unused_data if member.eof else member.unconsumed_tail
            if member.eof:
                member = None
    if member is not None:
        yield member.flush()
        raise DamagedFile("truncated gzip")


def _inflate_zstd(raw: Iterator[bytes]) -> Iterator[bytes]:
    import zstandard

    frame: Any = None
    for block in raw:
        for start in range(0, len(block), ZSTD_FEED_BYTES):
            data = block[start : start + ZSTD_FEED_BYTES]
            while data:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj()
                try:
                    piece = frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise DamagedFile(f"damaged zstd ({error})") from error
                if piece:
                    yield piece
                data = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
    if frame is not None:
        raise DamagedFile("truncated zstd")


def range_chunks(source: InputFile, begin: int, stop: int | None) -> tuple[int, Iterator[bytes]]:
    """Offset of the first line that starts in [begin, stop), and the bytes of all that do; no byte
    order mark."""
    file = source.open().open_input_file(source.path)
    base = begin
    if not base:
        base = len(BOM) if file.read(len(BOM)) == BOM else 0
    else:
        base -= 1
        file.seek(base)
        while data := file.read(READ_BYTES):
            newline = data.find(b"\n")
            base += len(data) if newline < 0 else newline + 1
            if newline >= 0:
                break
    return base, _read_range(file, base, stop)


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


def too_long(limit: int) -> str:
    """The reason of a record over the limit."""
    return f"longer than data.max_record_bytes = {limit}"


def line_blocks(chunks: Iterator[bytes], limit: int) -> Blocks:
    """Blocks of whole lines, and what was lost between them. Lines far over the limit are never
    held."""
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
                    yield offset, b"", [Lost(offset, size + first - 1, too_long(limit))]
                    offset, chunk, cut = offset + size + first, chunk[first:], cut - first
                else:
                    chunk, cut = b"".join([*carry, chunk]), cut + size
                if cut:
                    yield offset, chunk[:cut], []
                offset, carry, size, skipping = offset + cut, [chunk[cut:]], len(chunk) - cut, False
            if skipping or size > limit:
                carry, skipping = [], True
    except DamagedFile as error:
        damage = str(error)
    if damage or skipping:
        yield offset, b"", [Lost(offset, size, damage or too_long(limit), ends_file=bool(damage))]
    elif size:
        yield offset, b"".join(carry), []
