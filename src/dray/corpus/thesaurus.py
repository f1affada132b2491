"""Words that mean the same, from a file. Refuses one that says it of no two words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from dray.errors import CorpusError

_MARKS = re.compile(r"\s*\((?:generic|similar|related) term\)|\s*\(antonym\)")
"""How a MyThes file marks what is not quite a synonym."""


class Thesaurus(Protocol):
    """Words that mean the same."""

    def __call__(self, word: str) -> Sequence[str]: ...


class Synonyms:
    """A thesaurus by lower case words."""

    def __init__(self, words: Mapping[str, tuple[str, ...]]) -> None:
        self._words = words

    @classmethod
    def read(cls, path: str, content: bytes) -> Synonyms:
        """From a file: as MyThes (Debian's mythes-*, OpenOffice) has it, or lines of words that
        mean the same, with spaces between. Raises CorpusError for what is neither."""
        head, _, rest = content.partition(b"\n")
        encoding = head.decode("ascii", "replace").strip()
        try:
            is_mythes = b"|" in rest[:4096] and bool("x".encode(encoding))
        except LookupError:
            is_mythes = False
        try:
            words = (
                _read_mythes(rest.decode(encoding)) if is_mythes else _read_lines(content.decode())
            )
        except UnicodeDecodeError as error:
            raise CorpusError(path, f"is no text ({error.reason})") from error
        if not words:
            raise CorpusError(
                path,
                "has no two words that mean the same",
                "a thesaurus is a MyThes file, or a line for each group of words",
                "Debian's mythes-en-us installs /usr/share/mythes/th_en_US_v2.dat",
            )
        return cls(words)

    @classmethod
    def load(cls, content: bytes) -> Synonyms:
        """What `dump` gave."""
        lines = (line.split("\t") for line in content.decode().split("\n")[:-1])
        return cls({word: tuple(same) for word, *same in lines})

    def dump(self) -> bytes:
        """As a corpus keeps it: a line for each word, with its synonyms behind it."""
        lines = ("\t".join([word, *same]) + "\n" for word, same in self._words.items())
        return "".join(lines).encode()

    def __len__(self) -> int:
        return len(self._words)

    def __call__(self, word: str) -> Sequence[str]:
        """In the word's own case."""
        found = self._words.get(word.lower(), ())
        if word.isupper() and len(word) > 1:
            return [other.upper() for other in found]
        if word[:1].isupper():
            return [other[:1].upper() + other[1:] for other in found]
        return found


def _read_mythes(text: str) -> dict[str, tuple[str, ...]]:
    """`word|number of meanings`, then a line for each: `(noun)|synonym|synonym (generic term)|…`.
    Marked ones are left out: a generic term is not the same, and an antonym its opposite."""
    found: dict[str, dict[str, None]] = {}
    lines = iter(text.split("\n"))
    for line in lines:
        word, _, number = line.partition("|")
        same: dict[str, None] = {}
        for _ in range(int(number) if number.strip().isdigit() else 0):
            for other in next(lines, "").split("|")[1:]:
                other = other.strip()
                if other and not _MARKS.search(other) and " " not in other:
                    same[other] = None
        same.pop(word, None)
        if same and " " not in word:
            found.setdefault(word.lower(), {}).update(same)
    return {word: tuple(same) for word, same in found.items()}


def _read_lines(text: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, dict[str, None]] = {}
    for line in text.split("\n"):
        words = line.split()
        for word in words if len(words) > 1 else ():
            same = found.setdefault(word.lower(), {})
            same.update(dict.fromkeys(other for other in words if other.lower() != word.lower()))
    return {word: tuple(same) for word, same in found.items() if same}
