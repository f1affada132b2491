"""From texts to sets of hashed shingles, by which near-duplicates are found: runs of a few words,
in lower case, without what stands between them.

A word is a run of letters, digits and marks. In scripts that put no spaces between words (Han,
kana, Thai, Lao, Khmer, Burmese, Tibetan) each character is one. Works on whole batches in numpy;
a text without any word has no shingles, and is like no other.
"""

from __future__ import annotations

import unicodedata
from functools import cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dray.corpus.packing import gather

Codes = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.int64]
Shingles = npt.NDArray[np.uint32]
Hashes = npt.NDArray[np.uint64]

_SPACELESS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # kana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
_BETWEEN, _LETTER, _OWN_WORD = 0, 1, 2
WINDOW = 1 << 18
"""Characters whose words are hashed at once; one longer than that is several."""


@cache
def _tables() -> tuple[npt.NDArray[np.uint8], Codes]:
    """What each code point is in a word, and its lower case."""
    kinds = np.zeros(0x110000, np.uint8)
    lower = np.arange(0x110000, dtype=np.uint32)
    for code in range(0x40000):  # planes beyond hold no letters
        char = chr(code)
        if char.isalnum() or unicodedata.category(char) in ("Mn", "Mc"):
            kinds[code] = _LETTER
            folded = char.lower()
            if len(folded) == 1:
                lower[code] = ord(folded)
    for first, last in _SPACELESS:
        kinds[first : last + 1][kinds[first : last + 1] == _LETTER] = _OWN_WORD
    return kinds, lower


def _multipliers(count: int) -> Hashes:
    """Odd multipliers, the same everywhere."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(2020)))
    return rng.integers(0, 2**64, count, dtype=np.uint64) | np.uint64(1)


@cache
def _powers() -> tuple[Hashes, Hashes]:
    """B⁰, B¹, … of an odd number B modulo 2⁶⁴, and what undoes a multiplication by each."""
    base = 0x5851F42D4C957F2D
    found = []
    for factor in (base, pow(base, -1, 2**64)):
        factors = np.full(WINDOW, factor, np.uint64)
        factors[0] = 1
        found.append(np.cumprod(factors))
    return found[0], found[1]


def mixed(values: Hashes) -> Hashes:
    """The finaliser of SplitMix64, in place: every bit depends on every other."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def hash_words(texts: pa.Array) -> tuple[Hashes, Counts]:
    """A hash of each word of texts (large_string) in reading order, and how many each text has."""
    if not len(texts):
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    values = texts.to_pylist()
    ends = np.cumsum([len(text) + 1 for text in values])  # something that is no letter behind each
    codes = np.frombuffer(("\n".join(values) + "\n").encode("utf-32-le"), np.uint32)
    hashes, starts = [], []
    begin = 0
    while begin < len(codes):
        window = codes[begin : begin + WINDOW]
        kind = _tables()[0][window]
        gaps = np.flatnonzero(kind == _BETWEEN)  # a window ends where a word does
        size = int(gaps[-1]) + 1 if len(gaps) else len(window)
        found, places = _hash_window(window[:size], kind[:size])
        hashes.append(found)
        starts.append(places + begin)
        begin += size
    counts = np.diff(np.searchsorted(np.concatenate(starts), ends), prepend=0)
    return np.concatenate(hashes), counts


def _hash_window(codes: Codes, kind: npt.NDArray[np.uint8]) -> tuple[Hashes, Counts]:
    """The hash of each word, and where it begins. Of a word Σ c·Bⁱ is taken, as a difference of
    sums over all, divided by B to the power of where the word begins."""
    begins, stops = kind != _BETWEEN, kind != _BETWEEN
    begins[1:] &= (kind[1:] == _OWN_WORD) | (kind[:-1] != _LETTER)
    stops[:-1] &= begins[1:] | (kind[1:] == _BETWEEN)
    firsts, lasts = np.flatnonzero(begins), np.flatnonzero(stops)
    powers, inverse = _powers()
    parts = powers[: len(codes)] * _tables()[1][codes]
    sums = np.cumsum(parts)
    hashes = (sums[lasts] - sums[firsts] + parts[firsts]) * inverse[firsts]
    hashes += (lasts - firsts).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return mixed(hashes), firsts


def hash_runs(texts: pa.Array, size: int) -> tuple[Hashes, Counts]:
    """A 64-bit hash of each run of `size` words of texts (large_string) in reading order, and how
    many each text has. A text of fewer words is one run; one without words has none."""
    words, counts = hash_words(texts)
    ends = np.cumsum(counts)
    owners = np.repeat(np.arange(len(counts)), counts)
    last = np.repeat(ends, counts)
    hashes = np.zeros(len(words), np.uint64)
    for offset, weight in enumerate(_multipliers(size)):
        following = words[offset:] * weight
        following *= owners[offset:] == owners[: len(owners) - offset]  # a text ends with its own
        hashes[: len(following)] += following
    # Runs that begin with one of the last words are too short, unless the text is.
    whole = np.arange(len(words)) + size <= last
    whole[(ends - counts)[counts > 0]] = True
    return mixed(hashes[whole]), np.bincount(owners[whole], minlength=len(counts))


def shingle(texts: pa.Array, size: int) -> tuple[Shingles, Counts]:
    """The sets of 32-bit hashes of each text's runs of `size` words, ascending, text after text,
    and how many each has. A text of fewer words is one run. Two different runs of documents of
    1,000 words share a hash with a probability of 10⁻⁴."""
    hashes, counts = hash_runs(texts, size)
    keyed = np.repeat(np.arange(len(counts), dtype=np.uint64) << np.uint64(32), counts)
    keyed |= hashes >> np.uint64(32)
    keyed.sort()
    first = np.ones(len(keyed), bool)
    first[1:] = keyed[1:] != keyed[:-1]
    keyed = keyed[first]
    numbers = np.bincount((keyed >> np.uint64(32)).astype(np.int64), minlength=len(counts))
    return (keyed & np.uint64(0xFFFFFFFF)).astype(np.uint32), numbers.astype(np.int64)


def gathered(shingles: Shingles, counts: Counts, chosen: Counts) -> Shingles:
    """The sets of some texts, one after the other."""
    if len(chosen) == len(counts):
        return shingles
    starts, lengths = (np.cumsum(counts) - counts)[chosen], counts[chosen]
    return gather(shingles, starts, lengths)


def similarities(
    shingles: Shingles, bounds: Counts, left: Counts, right: Counts
) -> npt.NDArray[np.float64]:
    """The Jaccard similarity of pairs of sets: set i is shingles[bounds[i]:bounds[i + 1]],
    ascending; a pair is left[j] and right[j]. Two empty sets have nothing in common."""
    sizes = np.diff(bounds)
    first, second = (_keyed(shingles, bounds, sizes, chosen) for chosen in (left, right))
    if not len(first) or not len(second):
        return np.zeros(len(left))
    found = np.searchsorted(first, second)
    common = first[np.minimum(found, len(first) - 1)] == second
    owners = (second[common] >> np.uint64(32)).astype(np.int64)
    shared = np.bincount(owners, minlength=len(left)).astype(np.float64)
    return shared / np.maximum(1.0, sizes[left] + sizes[right] - shared)


def _keyed(shingles: Shingles, bounds: Counts, sizes: Counts, chosen: Counts) -> Hashes:
    """The chosen sets one after the other, each with its place in the order in front."""
    lengths = sizes[chosen]
    starts = np.cumsum(lengths) - lengths
    places = np.arange(int(lengths.sum())) + np.repeat(bounds[chosen] - starts, lengths)
    keyed = np.repeat(np.arange(len(chosen), dtype=np.uint64) << np.uint64(32), lengths)
    found: npt.NDArray[np.uint64] = keyed | shingles[places]
    return found
