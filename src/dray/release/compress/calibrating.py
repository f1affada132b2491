"""Rows of the run's own corpus that tell what of a model matters: what flows through a module on
them, and what the loss makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field as Limits
from torch import Tensor, nn

from dray.corpus.stream import read_rows
from dray.release.compress.method import Candidate, Recovering
from dray.release.measuring import rows_at_once
from dray.spec.sections import Int

if TYPE_CHECKING:
    from dray.tasks import Batch

By = Literal["gradients", "activations", "weights"]


class Judging(Recovering):
    """By what it is judged what of a model matters."""

    by: By = "gradients"
    """`gradients`: by how much the loss would change without it, to first order; `activations`:
    by what it gives on; `weights`: by its weights alone, which needs no rows."""
    rows: Annotated[Int, Limits(ge=1)] = 64
    """Rows of the corpus that it is judged on."""


def calibration_batches(candidate: Candidate, num_rows: int) -> Iterator[Batch]:
    """Batches of so many training rows, spread evenly over the corpus: the same ones each time."""
    trained = candidate.trained
    split, task = trained.manifest.train, trained.task
    ids = np.unique(np.linspace(0, split.num_rows - 1, num_rows).astype(np.int64))
    at_once = max(1, min(8, rows_at_once(trained, task)))
    for start in range(0, len(ids), at_once):
        rows = read_rows(trained.corpus, trained.manifest, split, ids[start : start + at_once])
        yield task.collate(rows)


def watch(
    candidate: Candidate,
    modules: Mapping[str, nn.Module],
    score: Callable[[nn.Module, Tensor, Tensor | None], Tensor],
    *,
    num_rows: int,
    gradients: bool,
    outputs: bool = False,
) -> dict[str, Tensor]:
    """Sums over calibration rows, by module: `score(module, value, gradient)` of what goes into it
    (or, with `outputs`, of what it adds to that), and of the gradient of the loss by it where
    asked for."""
    sums: dict[str, Tensor] = {}
    held: dict[str, Tensor] = {}

    def look(name: str, module: nn.Module, given: Any, output: Any = None) -> None:
        value = given[0]
        if outputs:
            after = output[0] if isinstance(output, tuple) else output
            if gradients:
                after.retain_grad()
                held[name] = after
                held[f"{name}|in"] = value.detach()
                return
            value = torch.stack((value, after))
        elif gradients:
            value.retain_grad()
            held[name] = value
            return
        sums[name] = sums.get(name, 0) + score(module, value.detach(), None)

    model = candidate.model
    objective = candidate.trained.task.objective(model).eval()
    with ExitStack() as hooks:
        for name, module in modules.items():

            def before(module: nn.Module, given: Any, name: str = name) -> None:
                look(name, module, given)

            def behind(module: nn.Module, given: Any, output: Any, name: str = name) -> None:
                look(name, module, given, output)

            handle = (
                module.register_forward_hook(behind)
                if outputs
                else module.register_forward_pre_hook(before)
            )
            hooks.callback(handle.remove)
        for batch in calibration_batches(candidate, num_rows):
            with torch.set_grad_enabled(gradients):
                terms, _ = objective(batch)
            if not gradients:
                continue
            terms["loss"][0].backward()
            for name, module in modules.items():
                value = held.pop(name)
                known = held.pop(f"{name}|in", None)
                stacked = value if known is None else torch.stack((known, value))
                found = score(module, stacked.detach(), value.grad)
                sums[name] = sums.get(name, 0) + found
            model.zero_grad(set_to_none=True)
    return sums
