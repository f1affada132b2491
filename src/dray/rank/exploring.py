"""What the model itself finds out about a step's rows before it learns from them, of tasks that
explore: answers that it writes, say, or how far it has come from where it began.

No gradient is made and nothing is dropped out. All ranks do as many forward passes, since each has
as many micro batches. What is drawn on the way belongs to the rows, so it is the same for any
number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dray.rank.device import send
from dray.rank.engine import Engine
from dray.rank.group import Ranks
from dray.tasks import Batch, Output, Task


def explore(engine: Engine, task: Task, batches: Sequence[Batch], ranks: Ranks) -> list[Batch]:
    """What is learnt from in place of the micro batches of a step, on the device. It leaves the
    engine in evaluation mode."""
    engine.train(False)
    explored: list[tuple[Batch, Output]] = []
    sums: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for batch in batches:
            on_device = send(batch, ranks.device)
            terms, output = engine(on_device)
            explored.append((on_device, output))
            for name, (total, count) in terms.items():
                sums.setdefault(name, []).append(torch.stack([total.double(), count.double()]))
    means = {}
    for name in sorted(sums):
        total, count = ranks.total(torch.stack(sums[name]).sum(dim=0))
        means[name] = (total / count.clamp(min=1)).float()
    return [task.explored(batch, output, means) for batch, output in explored]
