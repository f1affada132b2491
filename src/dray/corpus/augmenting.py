"""Texts in other words, for training alone: synonyms, words that change places or fall out, slips
of the keyboard and of readers of print.

What is done to a row is drawn from the seed, the epoch and the row's id, and from nothing else, so
that a resumed run reads the same on any number of workers. Every operator takes a text apart into
words and what stands between them, and changes words alone. Chinese, which has no spaces, is cut
into words by rjieba.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from dray.corpus.thesaurus import Thesaurus
from dray.errors import CorpusError

Draw = np.random.Generator

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?|[\d_]+", re.UNICODE)
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]+")

ROWS_OF_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
LOOKALIKES: Mapping[str, tuple[str, ...]] = {
    "0": ("O", "o"), "1": ("l", "I"), "5": ("S",), "8": ("B",), "O": ("0",), "o": ("0", "c"),
    "l": ("1", "I"), "I": ("l", "1"), "S": ("5",), "B": ("8",), "m": ("rn",), "w": ("vv",),
    "d": ("cl",), "e": ("c",), "c": ("e",), "h": ("b",), "b": ("h", "6"), "u": ("v", "ii"),
    "v": ("u",), "n": ("ri",), "g": ("q", "9"), "q": ("g",), "z": ("2",), "f": ("t",), "t": ("f",),
    "i": ("j", "1"), "j": ("i",), "D": ("O",), "G": ("6",), "Z": ("2",), "T": ("7",),
}  # fmt: skip
"""What a reader of print takes a letter for."""


@dataclass(frozen=True)
class Augmenter:
    """What changes a text by a kind that the spec names. `strength`: the share of its words."""

    strength: float
    thesaurus: Thesaurus

    def change(self, kind: str, text: str, draw: Draw) -> str:
        """The text by one kind; as it is where it has nothing that the kind changes."""
        words = Words.of(text)
        if not words.words:
            return text
        number = max(1, round(self.strength * len(words.words)))
        if kind in ("synonyms", "insertion"):
            by = replace_by_synonyms if kind == "synonyms" else insert_synonyms
            return str(by(words, number, draw, self.thesaurus))
        return str(_OPERATORS[kind](words, number, draw))


@dataclass(frozen=True)
class Words:
    """A text as words, and what stands before each and after the last: `len(gaps) == len(words) +
    1`."""

    words: tuple[str, ...]
    gaps: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Words:
        """Taken apart; joined again it is the same."""
        words: list[str] = []
        gaps: list[str] = []
        at = 0
        for start, end in _spans(text):
            gaps.append(text[at:start])
            words.append(text[start:end])
            at = end
        return cls(tuple(words), (*gaps, text[at:]))

    def __str__(self) -> str:
        pieces = [piece for pair in zip(self.gaps, self.words, strict=False) for piece in pair]
        return "".join([*pieces, self.gaps[-1]])


def _spans(text: str) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    at = 0
    for run in _HAN.finditer(text):
        found += [match.span() for match in _WORD.finditer(text, at, run.start())]
        begin = run.start()
        for word in _cut(run.group()):
            found.append((begin, begin + len(word)))
            begin += len(word)
        at = run.end()
    return found + [match.span() for match in _WORD.finditer(text, at)]


def _cut(chinese: str) -> Sequence[str]:
    try:
        import rjieba
    except ImportError:
        raise CorpusError(
            "data.augment",
            "the documents have Chinese words, and rjieba is not installed",
            "it tells where they end",
            "pip install 'dray[augment]'",
        ) from None
    words: Sequence[str] = rjieba.cut(chinese, hmm=False)
    return words


def replace_by_synonyms(text: Words, number: int, draw: Draw, thesaurus: Thesaurus) -> Words:
    """As many words as there are synonyms for, `number` at most, each by one of its own."""
    words, left = list(text.words), number
    for place in draw.permutation(len(words)):
        same = thesaurus(words[place]) if left else ()
        if same:
            words[place] = same[int(draw.integers(len(same)))]
            left -= 1
    return Words(tuple(words), text.gaps)


def insert_synonyms(text: Words, number: int, draw: Draw, thesaurus: Thesaurus) -> Words:
    """Synonyms of `number` words at any places (Wei and Zou 2019, EDA)."""
    words, gaps = list(text.words), list(text.gaps)
    for _ in range(number):
        known = [same for word in text.words if (same := thesaurus(word))]
        if not known:
            break
        same = known[draw.integers(len(known))]
        place = int(draw.integers(len(words) + 1))
        words.insert(place, same[int(draw.integers(len(same)))])
        between = "" if _HAN.search(words[place]) else " "
        gaps.insert(place + 1 if place else 0, between if place else "")
        if not place:
            gaps[1] = between + gaps[1]
    return Words(tuple(words), tuple(gaps))


def swap_words(text: Words, number: int, draw: Draw) -> Words:
    """`number` times two words change places (EDA)."""
    words = list(text.words)
    for _ in range(number if len(words) > 1 else 0):
        one, other = draw.choice(len(words), 2, replace=False)
        words[one], words[other] = words[other], words[one]
    return Words(tuple(words), text.gaps)


def delete_words(text: Words, number: int, draw: Draw) -> Words:
    """`number` words fall out, but never all (EDA)."""
    gone = set(draw.permutation(len(text.words))[: max(0, min(number, len(text.words) - 1))])
    words, gaps, before = list[str](), list[str](), ""
    for place, (gap, word) in enumerate(zip(text.gaps, text.words, strict=False)):
        before = gap if not before or gap.strip() else before
        if place in gone:
            continue
        words.append(word)
        gaps.append(before)
        before = ""
    last = text.gaps[-1]
    return Words(tuple(words), (*gaps, last if last.strip() or not before else before + last))


def slip_on_keys(text: Words, number: int, draw: Draw) -> Words:
    """In `number` words a letter is one beside it on the keyboard, is doubled, falls out, or
    changes places with the next one."""

    def slip(word: str) -> str:
        place = int(draw.integers(len(word)))
        letter = word[place]
        beside = _neighbours().get(letter.lower(), "")
        kind = int(draw.integers(4))
        if kind == 0 and beside:
            other = beside[draw.integers(len(beside))]
            return word[:place] + (other.upper() if letter.isupper() else other) + word[place + 1 :]
        if kind == 1 and len(word) > 1:
            return word[:place] + word[place + 1 :]
        if kind == 2 and place + 1 < len(word):
            return word[:place] + word[place + 1] + letter + word[place + 2 :]
        return word[:place] + letter + word[place:]

    return _change(text, number, draw, slip, lambda word: word.isascii() and word.isalpha())


def misread_print(text: Words, number: int, draw: Draw) -> Words:
    """In `number` words a letter is what a reader of print takes it for."""

    def misread(word: str) -> str:
        places = [place for place, letter in enumerate(word) if letter in LOOKALIKES]
        place = places[draw.integers(len(places))]
        others = LOOKALIKES[word[place]]
        return word[:place] + others[draw.integers(len(others))] + word[place + 1 :]

    return _change(
        text, number, draw, misread, lambda word: any(letter in LOOKALIKES for letter in word)
    )


def _change(
    text: Words,
    number: int,
    draw: Draw,
    change: Callable[[str], str],
    fits: Callable[[str], bool],
) -> Words:
    words = list(text.words)
    fitting = [place for place, word in enumerate(words) if fits(word)]
    for place in draw.permutation(len(fitting))[:number]:
        words[fitting[place]] = change(words[fitting[place]])
    return Words(tuple(words), text.gaps)


@cache
def _neighbours() -> Mapping[str, str]:
    """The keys beside each key of an English keyboard, whose rows are set off by half a key."""
    found: dict[str, set[str]] = {}
    places = {
        key: (row, number + row * 0.5)
        for row, keys in enumerate(ROWS_OF_KEYS)
        for number, key in enumerate(keys)
    }
    for key, (row, at) in places.items():
        for other, (there, where) in places.items():
            if other != key and abs(row - there) <= 1 and abs(at - where) <= 1:
                found.setdefault(key, set()).add(other)
    return {key: "".join(sorted(others)) for key, others in found.items()}


_OPERATORS: Mapping[str, Callable[[Words, int, Draw], Words]] = {
    "swap": swap_words,
    "deletion": delete_words,
    "keyboard": slip_on_keys,
    "ocr": misread_print,
}
