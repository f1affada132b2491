"""Gopher's rules (Rae et al. 2021, appendix A.1.1): what prose is like, and how much of it repeats
itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dray.corpus.filters.measures import lines_of, paragraphs_of, repeated
from dray.spec import GopherQuality, GopherRepetition

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_BULLETS = ("•", "‣", "▶", "◀", "◦", "■", "□", "▪", "▫", "–", "-", "*", "·", "●")
_ELLIPSES = ("...", "…", "[…]")
_TOP, _DUPLICATE = 2, 5
"""Words in the shortest run of each kind."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def broken_by_prose(text: str, rules: GopherQuality) -> str | None:
    """Which rule of quality a document breaks, if it breaks one."""
    words = text.split()
    count = len(words)
    if count < rules.min_words:
        return "too few words"
    if count > rules.max_words:
        return "too many words"
    count = max(1, count)
    mean = sum(map(len, words)) / count
    if mean < rules.min_mean_word_chars:
        return "words too short"
    if mean > rules.max_mean_word_chars:
        return "words too long"
    ellipses = text.count("...") + text.count("…")
    if max(text.count("#"), ellipses) > rules.max_symbol_word_ratio * count:
        return "too many symbols"
    lines = lines_of(text)
    bullets = sum(line.startswith(_BULLETS) for line in lines)
    if bullets > rules.max_bullet_line_share * len(lines):
        return "too many bullets"
    ends = sum(line.endswith(_ELLIPSES) for line in lines)
    if ends > rules.max_ellipsis_line_share * len(lines):
        return "too many ellipses"
    alphabetic = sum(any(map(str.isalpha, word)) for word in words)
    if alphabetic < rules.min_alphabetic_word_share * count:
        return "too few words with letters"
    if rules.min_stop_words:
        found = STOP_WORDS.intersection(word.strip(".,;:!?\"'()").lower() for word in words)
        if len(found) < rules.min_stop_words:
            return "too few stop words"
    return None


def broken_by_repetition(text: str, rules: GopherRepetition) -> str | None:
    """Which rule of repetition a document breaks, if it breaks one. Shares of characters are of all
    but white space around lines, paragraphs and words."""
    for what, pieces, share, char_share in (
        (
            "paragraphs",
            paragraphs_of(text),
            rules.max_duplicate_paragraph_share,
            rules.max_duplicate_paragraph_char_share,
        ),
        (
            "lines",
            lines_of(text),
            rules.max_duplicate_line_share,
            rules.max_duplicate_line_char_share,
        ),
    ):
        count, chars = repeated(pieces)
        if count > share * len(pieces):
            return f"duplicate {what}"
        if chars > char_share * sum(map(len, pieces)):
            return f"characters in duplicate {what}"
    words = text.split()
    ids, lengths = _numbered(words)
    total = int(lengths.sum())
    for size, share in enumerate(rules.max_top_ngram_char_shares, _TOP):
        if _top_chars(ids, lengths, size) > share * total:
            return f"characters in the top {size}-gram"
    for size, share in enumerate(rules.max_duplicate_ngram_char_shares, _DUPLICATE):
        if _duplicate_chars(ids, lengths, size) > share * total:
            return f"characters in duplicate {size}-grams"
    return None


def _numbered(words: Sequence[str]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """A number of each word, equal ones alike, and how many characters each has."""
    numbers: dict[str, int] = {}
    ids = [numbers.setdefault(word, len(numbers)) for word in words]
    return np.array(ids, np.uint64), np.array([*map(len, words)], np.int64)


def _runs(ids: npt.NDArray[np.uint64], size: int) -> npt.NDArray[np.uint64]:
    """A hash of the run of `size` words that begins at each word; of the last ones none does."""
    count = len(ids) - size + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    found = np.zeros(count, np.uint64)
    for offset in range(size):
        found = (found ^ (ids[offset : offset + count] + np.uint64(1))) * _MULTIPLIER
        found ^= found >> np.uint64(29)
    return found


def _top_chars(ids: npt.NDArray[np.uint64], lengths: npt.NDArray[np.int64], size: int) -> int:
    """Characters in the run of words that is there most often, of those the longest; 0 where none
    is there twice."""
    runs = _runs(ids, size)
    if not len(runs):
        return 0
    _, firsts, counts = np.unique(runs, return_index=True, return_counts=True)
    most = counts.max()
    if most < 2:
        return 0
    sums = np.concatenate(([0], np.cumsum(lengths)))
    firsts = firsts[counts == most]
    return int(most * (sums[firsts + size] - sums[firsts]).max())


def _duplicate_chars(ids: npt.NDArray[np.uint64], lengths: npt.NDArray[np.int64], size: int) -> int:
    """Characters of the words in runs that began earlier, too; each word counts once."""
    runs = _runs(ids, size)
    if not len(runs):
        return 0
    _, firsts = np.unique(runs, return_index=True)
    again = np.ones(len(runs), np.int64)
    again[firsts] = 0
    covered = np.convolve(again, np.ones(size, np.int64)) > 0
    return int(lengths[covered].sum())
