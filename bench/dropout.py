"""Dropout by rows beside torch's own: seconds of a forward and a backward pass, in turns.

`python -m bench.dropout` prints medians and their ratio for the shapes of a block's outputs and of
attention's probabilities, on one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dray.rank.chance import Chance

SHAPES = {
    "a block's output, 32 rows of 64 tokens of 384": (32, 64, 384),
    "attention, 32 rows, 12 heads, 64 by 64": (32, 12, 64, 64),
    "a block's output, 8 rows of 512 tokens of 768": (8, 512, 768),
}
TURNS, WARM = 14, 2


def timed(work: Callable[[], Tensor]) -> float:
    begun = time.perf_counter()
    work().sum().backward()
    return time.perf_counter() - begun


def main() -> None:
    """Print a line for each shape."""
    torch.set_num_threads(1)
    for words, shape in SHAPES.items():
        values, chance = torch.randn(shape, requires_grad=True), Chance()
        taken: dict[str, list[float]] = {"torch": [], "rows": []}
        for turn in range(TURNS):
            taken["torch"].append(timed(lambda values=values: F.dropout(values, 0.1)))  # type: ignore[misc]
            with chance.rows(0, turn, np.arange(shape[0]), values.device):
                taken["rows"].append(timed(lambda values=values: F.dropout(values, 0.1)))  # type: ignore[misc]
        own, rows = (statistics.median(some[WARM:]) for some in taken.values())
        print(f"{words}: torch {own * 1e3:.1f} ms, by rows {rows * 1e3:.1f} ms, {rows / own:.2f}")


if __name__ == "__main__":
    main()
