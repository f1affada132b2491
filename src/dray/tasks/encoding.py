"""From documents to tokens, as tasks share it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dray.tasks.rows import Encoded, Tools


def encode_texts(texts: pa.Array, tools: Tools, *, surrounded: bool) -> Encoded:
    """Texts as the tokeniser's ids; `surrounded`: with what stands around a document."""
    ids, lengths = tools.encode(texts)
    if not surrounded:
        return Encoded(ids.astype(tools.dtype), lengths)
    return Encoded(*surround(ids, lengths, tools.prefix, tools.suffix, tools.dtype))


def surround(
    ids: npt.NDArray[np.uint32],
    lengths: npt.NDArray[np.int64],
    prefix: Sequence[int],
    suffix: Sequence[int],
    dtype: str,
) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.int64]]:
    """The documents' ids with `prefix` before and `suffix` after each, in the given type."""
    stops = np.cumsum(lengths + len(prefix) + len(suffix))
    starts = stops - lengths - len(prefix) - len(suffix)
    out = np.empty(len(ids) + len(lengths) * (len(prefix) + len(suffix)), dtype)
    inside = np.ones(len(out), bool)
    places = [starts + nth for nth in range(len(prefix))] + [
        stops - nth for nth in range(len(suffix), 0, -1)
    ]
    for place, token in zip(places, (*prefix, *suffix), strict=True):
        inside[place] = False
        out[place] = token
    out[inside] = ids
    return out, lengths + len(prefix) + len(suffix)
