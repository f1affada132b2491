"""A few documents of each fate, for people to look at: some that were kept, and some of those that
each rule left out.

Of any number of documents those are taken whose hash is least: a sample as good as a random one,
and the same however the work was cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

EACH = 3
"""Examples of one fate."""
CHARS = 600
"""Of a document that are shown."""
KEPT = "kept"
IS_LIKE = "\n\n– is like –\n\n"
"""What stands between a document that is left out and the one that is kept in its place."""
Examples = Mapping[str, Sequence[tuple[str, str]]]
"""By fate: the hash and the beginning of documents."""


def examples_of(fate: str, texts: pa.Array, hashes: Any) -> Examples:
    """Some of the documents of one fate; hashes: [documents], of their texts."""
    if not len(texts):
        return {}
    count = min(EACH, len(texts))
    least = np.argpartition(hashes, count - 1)[:count]
    shown = pc.utf8_slice_codeunits(texts.take(pa.array(np.sort(least))), 0, CHARS).to_pylist()
    keys = [f"{int(value):016x}" for value in hashes[np.sort(least)]]
    return {fate: sorted(zip(keys, shown, strict=True))}


def merged(parts: Iterable[Examples]) -> dict[str, list[tuple[str, str]]]:
    """Some of all, each document once, by fate."""
    found: dict[str, set[tuple[str, str]]] = {}
    for part in parts:
        for fate, pairs in part.items():
            found.setdefault(fate, set()).update((key, text) for key, text in pairs)
    return {fate: sorted(pairs)[:EACH] for fate, pairs in sorted(found.items())}
