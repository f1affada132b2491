"""The bytes of input files: decompressing, ranges of plain files, blocks of whole lines.

All of it streams: memory stays bounded by a block and the longest line that is allowed. A damaged file gives all that
comes before the damage.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from typing import Any, cast

from dray.corpus.sources import InputFile

BLOCK_BYTES = 4 * 1024 * 1024
READ_BYTES = 256 * 1024
ZSTD_FEED_BYTES = 4096
"""Compressed bytes given to zstd at once: its output is bounded by 128 KiB for every 4 bytes."""
HEADER_BYTES = 1024 * 1024
BOM = b"\xef\xbb\xbf"


class DamagedFile(Exception):
    """The rest of a file cannot be decompressed; the message says why."""


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


def decompress(stream: Any, compression: str) -> Iterator[bytes]:
    """The content in chunks of about BLOCK_BYTES. Raises DamagedFile after all that could be decompressed."""
    pieces: list[bytes] = []
    size = 0
    damaged: DamagedFile | None = None
    inflate = {"": _read_plain, "gzip": _inflate_gzip, "zstd": _inflate_zstd}[compression]
    try:
        for piece in inflate(stream):
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
                raise DamagedFile(f"damaged gzip ({error})") from error
            if piece:
                yield piece
            data = member.unused_data if member.eof else member.unconsumed_tail
            if member.eof:
                member = None
    if member is not None:
        yield member.flush()
        raise DamagedFile("truncated gzip")


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
                    raise DamagedFile(f"damaged zstd ({error})") from error
                if piece:
                    yield piece
                data = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
    if frame is not None:
        raise DamagedFile("truncated zstd")


def range_chunks(source: InputFile, begin: int, stop: int | None) -> tuple[int, Iterator[bytes]]:
    """Offset of the first line that starts in [begin, stop), and the bytes of all that do."""
    file = source.open().open_input_file(source.path)
    base = begin
    if base:
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


def line_blocks(chunks: Iterator[bytes], limit: int) -> Iterator[tuple[int, bytes, list[tuple[int, int, str]]]]:
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
    except DamagedFile as error:
        damage = str(error)
    if skipping:
        yield offset, b"", [(offset, size, too_long)]
    elif damage:
        yield offset, b"", [(offset, size, damage)]
    elif size:
        yield offset, b"".join(carry), []


def read_first_line(file: InputFile) -> str:
    stream = file.open().open_input_stream(file.path, compression=None)
    data = b""
    try:
        for chunk in decompress(stream, file.compression):
            data += chunk
            if b"\n" in data or len(data) > HEADER_BYTES:
                break
    except DamagedFile:
        pass
    finally:
        stream.close()
    line = data.removeprefix(BOM).partition(b"\n")[0]
    return line[:HEADER_BYTES].decode(errors="replace").rstrip("\r")
