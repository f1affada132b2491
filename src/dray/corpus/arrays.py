"""A JSON array of records, streamed as JSON lines of the same length: every record keeps its offset
in the file.

Commas between the records become newlines, newlines inside them become spaces; strings are left
alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dray.corpus.bytes_in import DamagedFile

PIECE_BYTES = 1024 * 1024
OPEN, CLOSE = np.frombuffer(b"{[", np.uint8), np.frombuffer(b"}]", np.uint8)
MARKS = np.frombuffer(b"{}[],\r\n", np.uint8)
QUOTE, BACKSLASH, COMMA, NEWLINE, SPACE = (ord(character) for character in '"\\,\n ')


def array_to_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The array's elements, one a line. Raises DamagedFile after the last of them if the array has
    no end."""
    depth, in_string, held = 0, False, b""
    for chunk in chunks:
        for start in range(0, len(chunk), PIECE_BYTES):
            data = held + chunk[start : start + PIECE_BYTES]
            # A backslash and what it escapes stay together.
            held = data[len(data.rstrip(b"\\")) :]
            content = np.frombuffer(data[: len(data) - len(held)], np.uint8).copy()
            quotes = _real_quotes(content)
            depth = _mark(content, quotes, depth, in_string)
            in_string ^= len(quotes) % 2 == 1
            yield content.tobytes()
    if held:
        yield held
    if depth or in_string:
        raise DamagedFile("the JSON array has no end")


def _real_quotes(content: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Places of the quotes that no backslash escapes."""
    quotes = np.flatnonzero(content == QUOTE)
    after = quotes[(quotes > 0) & (content[quotes - 1] == BACKSLASH)]
    if not len(after):
        return quotes
    others = np.flatnonzero(content != BACKSLASH)
    before = np.searchsorted(others, after) - 1
    last = np.where(before >= 0, others[before], -1)
    return np.setdiff1d(quotes, after[(after - 1 - last) % 2 == 1], assume_unique=True)


def _mark(
    content: npt.NDArray[np.uint8], quotes: npt.NDArray[np.int64], depth: int, in_string: bool
) -> int:
    """Turn what lies between the records into newlines, in place; the depth at the end."""
    places = np.flatnonzero(np.isin(content, MARKS))
    places = places[(np.searchsorted(quotes, places) + in_string) % 2 == 0]
    kinds = content[places]
    steps = np.isin(kinds, OPEN).astype(np.int64) - np.isin(kinds, CLOSE)
    after = depth + np.cumsum(steps)
    content[places[((kinds == NEWLINE) | (kinds == ord("\r"))) & (after > 0)]] = SPACE
    content[places[(steps == 1) & (after == 1)]] = SPACE
    content[places[((kinds == COMMA) & (after == 1)) | ((steps == -1) & (after == 0))]] = NEWLINE
    return int(after[-1]) if len(after) else depth
