"""Lines of words, as CoNLL's shared tasks have them: a line is a word with what belongs to it, and
blank lines stand between sentences.

A sentence is a record. Lines that only mark where a document begins (`-DOCSTART-`) are none of its
words, nor are comments as CoNLL-U has them: lines that begin with `#` and have no tab, where others
have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pyarrow as pa

from dray.corpus.bytes_in import Blocks, line_blocks
from dray.corpus.records import BadRecord, Wanted

_END = re.compile(rb"\n[ \t\r]*\n")
_MARK = "-DOCSTART-"


class WordLines:
    """Sentences of words, in columns between tabs, or between spaces where there is no tab."""

    skips_first_record = False

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self.columns: list[str] = []

    def cut(self, chunks: Iterator[bytes], limit: int) -> Blocks:
        """Blocks of whole sentences: what lines give, up to the last blank one."""
        held, held_at = b"", 0
        for offset, data, lost in line_blocks(chunks, limit):
            if not held:
                held_at = offset
            held += data
            end = max((found.end() for found in _END.finditer(held)), default=0)
            if lost:  # a line that is no line ends a sentence
                end = len(held)
            if end or lost:
                yield held_at, held[:end], lost
                held, held_at = held[end:], held_at + end
        if held:
            yield held_at, held, []

    def split(self, data: bytes) -> Iterator[bytes]:
        """The sentences of a block; each with the blank line behind it, but for its newline."""
        start = 0
        for found in _END.finditer(data):
            yield data[start : found.end() - 1]
            start = found.end()
        if start < len(data):
            yield data[start:].removesuffix(b"\n")

    def is_blank(self, record: bytes) -> bool:
        lines = [line for line in record.splitlines() if line.strip()]
        return all(line.startswith(_MARK.encode()) for line in lines)

    def parse_block(self, data: bytes) -> tuple[pa.Array, pa.Array | None] | None:
        return None

    def parse_line(self, line: str) -> tuple[str, str]:
        """The words of a sentence and what belongs to them. Raises BadRecord."""
        lines = [
            text.rstrip("\r")
            for text in line.split("\n")
            if text.strip() and not text.startswith(_MARK)
        ]
        if any("\t" in text for text in lines):
            lines = [text for text in lines if "\t" in text or not text.startswith("#")]
        rows = [text.split("\t") if "\t" in text else text.split() for text in lines]
        if len({len(row) for row in rows}) > 1:
            raise BadRecord(
                f"lines of {min(map(len, rows))} and of {max(map(len, rows))} columns in a sentence"
            )
        values = {}
        for name in self._wanted.columns:
            place = int(name)
            if not -len(rows[0]) <= place < len(rows[0]):
                raise BadRecord(f"no column {name}: {len(rows[0])} in a line")
            values[name] = [row[place] for row in rows]
        return self._wanted.read(values)
