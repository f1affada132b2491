"""Lines, paragraphs and what of them was there before: what several rules measure."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PARAGRAPHS = re.compile(r"\n[^\S\n]*\n\s*")


def lines_of(text: str) -> list[str]:
    """The lines of a text that are not blank, without white space around them."""
    return [line for line in (line.strip() for line in text.split("\n")) if line]


def paragraphs_of(text: str) -> list[str]:
    """What blank lines part, without white space around it."""
    return [part for part in (part.strip() for part in _PARAGRAPHS.split(text)) if part]


def repeated(pieces: Sequence[str]) -> tuple[int, int]:
    """How many pieces equal an earlier one, and how many characters they have."""
    seen: set[str] = set()
    count = chars = 0
    for piece in pieces:
        if piece in seen:
            count += 1
            chars += len(piece)
        seen.add(piece)
    return count, chars
