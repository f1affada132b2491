"""From the text of documents to cleaned text: Unicode normalisation, bounds of length and of
letters, a hash that finds equal documents.

Works on Arrow arrays, a block at a time; a dropped document is counted by reason. It never looks at
a language.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dray.corpus.examples import Examples, examples_of, merged
from dray.spec import Cleaning

FORGOTTEN = "forgotten"
"""Why a document is left out that is to be forgotten: none of it is shown."""
TOO_SHORT = "too_short"
Mask = npt.NDArray[np.bool_]
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Cleaned:
    """The documents that were kept, and what became of others."""

    texts: pa.Array
    labels: pa.Array | None
    dropped: Counter[str] = field(default_factory=Counter)
    """Documents that were left out, by reason."""
    redacted: Counter[str] = field(default_factory=Counter)
    """What personal data was replaced in them, by kind."""
    num_redacted: int = 0
    """In how many."""
    removed: Counter[str] = field(default_factory=Counter)
    """Lines, and marks, that were taken out of those that were kept, by reason."""
    languages: Counter[str] = field(default_factory=Counter)
    """Documents that were kept by language, where it was looked at."""
    examples: Examples = field(default_factory=dict)
    """Some of those that were left out, as they were."""

    def without(self, reasons: Sequence[str | None]) -> Cleaned:
        """Those documents that have no reason to be left out."""
        if not any(reasons):
            return self
        counts = Counter(reason for reason in reasons if reason)
        shown = [self.examples]
        for reason in counts:
            mine = self.texts.filter(pa.array([own == reason for own in reasons]))
            if reason != FORGOTTEN:
                shown.append(examples_of(reason, mine, hash_texts(mine)[1]))
        keep = pa.array([not own for own in reasons])
        return replace(
            self,
            texts=self.texts.filter(keep),
            labels=None if self.labels is None else self.labels.filter(keep),
            dropped=self.dropped + counts,
            examples=merged(shown),
        )


def clean(
    texts: pa.Array, labels: pa.Array | None, rules: Cleaning, *, answers: bool = False
) -> Cleaned:
    """Normalise documents (large_string) and leave out those of another length or form; labels go
    along, normalised too where they are `answers`, which are texts."""
    texts = normalize(texts, rules.normalize)
    if answers and labels is not None:
        labels = normalize(labels.cast(pa.large_string()), rules.normalize)
    found = Cleaned(texts, labels)
    failures = [(reason, mask) for reason, mask in _failures(texts, rules) if mask.any()]
    if not failures:
        return found
    reasons = np.full(len(texts), None, object)
    for reason, mask in reversed(failures):  # a document is counted for its first reason
        reasons[mask] = reason
    return found.without(reasons.tolist())


def normalize(texts: pa.Array, form: str) -> pa.Array:
    """Unicode normal form of every document. ASCII is in every form already and is left alone.

    Arrow's own `utf8_normalize` does not compose (seen in pyarrow 25), and Python's is faster on
    text in normal form.
    """
    if form == "none":
        return texts
    other = pc.invert(pc.string_is_ascii(texts))
    if not pc.any(other).as_py():
        return texts
    kind = cast(Literal["NFC", "NFKC"], form)
    given = texts.filter(other).to_pylist()
    normal = [unicodedata.normalize(kind, text) for text in given]
    if all(
        before is after for before, after in zip(given, normal, strict=True)
    ):  # as it is for nearly all text
        return texts
    return pc.replace_with_mask(texts, other, pa.array(normal, pa.large_string()))


def _failures(texts: pa.Array, rules: Cleaning) -> list[tuple[str, Mask]]:
    """(reason, documents that fail it), in the order in which reasons are counted."""
    found: list[tuple[str, Mask]] = []
    if rules.forget:
        found.append((FORGOTTEN, np.isin(_joined(texts), np.array([*rules.forget]))))
    if rules.min_chars > 1 or rules.max_chars is not None:
        lengths = pc.utf8_length(texts).to_numpy(zero_copy_only=False)
        found.append((TOO_SHORT, lengths < rules.min_chars))
        if rules.max_chars is not None:
            found.append(("too_long", lengths > rules.max_chars))
    elif rules.min_chars:  # no bytes, no characters: much quicker to see
        found.append((TOO_SHORT, pc.binary_length(texts).to_numpy(zero_copy_only=False) == 0))
    if rules.min_alphanumeric_share > 0:
        letters = pc.count_substring_regex(texts, r"[\p{L}\p{N}]").to_numpy(zero_copy_only=False)
        visible = pc.count_substring_regex(texts, r"[^\s\p{Z}]").to_numpy(zero_copy_only=False)
        found.append(("few_letters", letters < rules.min_alphanumeric_share * visible))
    if rules.max_repeated_line_share < 1:
        shares = np.array([repeated_line_share(text) for text in texts.to_pylist()], float)
        found.append(("repeated_lines", shares > rules.max_repeated_line_share))
    return found


def repeated_line_share(text: str) -> float:
    """Share of the characters that lie in lines already seen in the text; blank lines do not
    count."""
    seen: set[str] = set()
    total = repeated = 0
    for line in text.split("\n"):
        line = line.strip()
        total += len(line)
        if line in seen:
            repeated += len(line)
        seen.add(line)
    return repeated / total if total else 0.0


def hash_texts(texts: pa.Array) -> tuple[Hashes, Hashes]:
    """128 bits of each text's XXH3, as high and low halves."""
    import xxhash

    digest = xxhash.xxh3_128_digest
    _, offsets, data = texts.buffers()
    if not len(texts):
        return np.empty(0, np.uint64), np.empty(0, np.uint64)
    bounds = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1].tolist()
    view = memoryview(data) if data is not None else memoryview(b"")
    joined = b"".join([digest(view[start:stop]) for start, stop in itertools.pairwise(bounds)])
    halves = np.frombuffer(joined, ">u8").astype(np.uint64).reshape(-1, 2)
    return halves[:, 0].copy(), halves[:, 1].copy()


def digest_of(text: str) -> str:
    """What a normalised document is known by: its 128 bits, as 32 hexadecimal digits."""
    (found,) = _joined(pa.array([text], pa.large_string())).tolist()
    return str(found)


def _joined(texts: pa.Array) -> npt.NDArray[np.str_]:
    """The digests of documents."""
    high, low = hash_texts(texts)
    pairs = zip(high.tolist(), low.tolist(), strict=True)
    return np.array([f"{first:016x}{second:016x}" for first, second in pairs], dtype="<U32")


def held_out(low: Hashes, share: float) -> Mask:
    """The documents of a held-out share: a document's side depends on its text alone."""
    return low < np.uint64(int(share * 2**64))
