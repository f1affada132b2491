"""What general compressors need for the held-out text: the yardstick beside a language model's bits
per byte.

A sample of the validation documents, in their own order, is put back from its tokens; a byte-level
tokeniser loses nothing, others may lose some white space. Measures only: nothing here changes a
corpus.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

SAMPLE_BYTES = 4_000_000
"""Text that the sample of a corpus holds at most."""


def decode_sample(
    tokenizer: Any,
    tokens: npt.NDArray[np.unsignedinteger],
    lengths: npt.NDArray[np.int64],
    chosen: npt.NDArray[np.int64],
    max_bytes: int,
) -> bytes:
    """The first of the chosen documents as text, one after the other, up to about `max_bytes`.

    tokens: [sum of lengths], the documents end to end; `tokenizer`: a `tokenizers.Tokenizer`.
    """
    starts = np.cumsum(lengths) - lengths
    texts: list[bytes] = []
    room = max_bytes
    for index in chosen.tolist():
        if room <= 0:
            break
        ids = tokens[starts[index] : starts[index] + lengths[index]].tolist()
        texts.append(tokenizer.decode(ids, skip_special_tokens=True).encode()[:room])
        room -= len(texts[-1])
    return b"".join(texts)


def measure_compressors(samples: Sequence[bytes]) -> dict[str, float]:
    """Bits a byte of `gzip -9` and `xz -9` on the samples end to end; nothing where there is no
    text."""
    text = b"".join(samples)
    if not text:
        return {}
    sizes = {
        "gzip -9": len(gzip.compress(text, 9, mtime=0)),
        "xz -9": len(lzma.compress(text, preset=9)),
    }
    return {name: round(8 * size / len(text), 4) for name, size in sizes.items()}
