"""A model before and after: the task's metrics with intervals, bytes, parameters, and time, of both
in one process on the same rows.

Intervals are 95 %, ±1.96 standard errors by the delete-a-group jackknife (Efron and Tibshirani,
1993, chapter 11): groups of neighbouring rows, each metric computed anew without each group, so any
metric of a task has one, and a difference is paired by rows. Times are medians of passes that
take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dray.corpus.manifest import Split
from dray.corpus.prepare import Corpus
from dray.corpus.stream import read_rows
from dray.models.packed import held_bytes
from dray.release.measuring import rows_at_once
from dray.release.trained import Trained
from dray.tasks import Batch, Task, draw_of

GROUPS = 100
"""Of rows, at least as many as there are rows of."""
Z95 = 1.959963984540054
TIMED_SECONDS, FEWEST_PASSES, MOST_PASSES = 6.0, 7, 60
"""For each kind of time, both models together."""


@dataclass(frozen=True)
class Rows:
    """What is measured on."""

    trained: Trained
    task: Task
    corpus: Corpus
    split: Split

    def read(self, first: int, end: int) -> Any:
        ids = np.arange(first, end, dtype=np.int64)
        return read_rows(self.corpus.folder, self.corpus.manifest, self.split, ids)


@dataclass(frozen=True)
class Measured:
    """A metric's values: of all rows, and without each group."""

    values: Mapping[str, float | None]
    without: Mapping[str, list[float | None]]


@torch.no_grad()
def measure_groups(rows: Rows, model: Any, device: torch.device) -> Measured:
    """The task's metrics of a model over all rows, and without each group of them."""
    task, num_rows = rows.task, rows.split.num_rows
    at_once = rows_at_once(rows.trained, task)
    size = max(1, min(at_once, num_rows // GROUPS))
    objective = task.objective(model).eval()
    draw = draw_of(rows.trained.spec.seed, 0)
    states = []
    read = max(size, rows.corpus.manifest.group_rows // size * size)
    for start in range(0, num_rows, read):
        table = rows.read(start, min(start + read, num_rows))
        for first in range(0, table.num_rows, size):
            metrics = task.new_metrics()
            for batch in task.passes(table.slice(first, size), draw, at_once):
                on_device = {key: tensor.to(device) for key, tensor in batch.items()}
                _, output = objective(on_device)
                metrics.update(on_device, output)
            states.append(metrics.state())
    whole = task.measured(task.new_metrics().merge(states), rows.split)
    names = [name for name in task.metrics if name in whole]
    without: dict[str, list[float | None]] = {name: [] for name in names}
    for place in range(len(states)):
        rest = states[:place] + states[place + 1 :]
        found = task.measured(task.new_metrics().merge(rest), rows.split) if rest else {}
        for name in names:
            without[name].append(found.get(name))
    return Measured({name: whole[name] for name in names}, without)


def compare(task: Task, before: Measured, after: Measured) -> dict[str, Any]:
    """Each metric before, after and their difference, with intervals."""
    found = {}
    for name in before.values:
        was, now = before.values[name], after.values.get(name)
        pairs = zip(before.without[name], after.without[name], strict=True)
        differences = [None if None in (a, b) else b - a for a, b in pairs]  # type: ignore[operator]
        found[name] = {
            "better": task.metrics[name],
            "before": _with_interval(was, before.without[name]),
            "after": _with_interval(now, after.without[name]),
            "difference": _with_interval(
                None if was is None or now is None else now - was, differences
            ),
        }
    return found


def _with_interval(value: float | None, without: list[float | None]) -> dict[str, float | None]:
    left = [one for one in without if one is not None]
    if value is None or len(left) < 2 or len(left) < len(without):
        return {"value": value, "low": None, "high": None}
    mean = statistics.fmean(left)
    variance = (len(left) - 1) / len(left) * sum((one - mean) ** 2 for one in left)
    half = Z95 * variance**0.5
    return {"value": value, "low": value - half, "high": value + half}


def sizes(
    model: nn.Module, stored_bytes: int, num_nonzero: int, num_parameters: int
) -> dict[str, Any]:
    """What a model takes."""
    return {
        "weights_bytes": stored_bytes,
        "memory_bytes": held_bytes(model),
        "num_parameters": num_parameters,
        "num_nonzero": num_nonzero,
    }


def count_nonzero(model: nn.Module) -> tuple[int, int]:
    """(parameters, those that are not zero) of a model in fp32."""
    parameters = list(model.parameters())
    return (
        sum(parameter.numel() for parameter in parameters),
        sum(int(parameter.detach().count_nonzero()) for parameter in parameters),
    )


@torch.no_grad()
def time_both(rows: Rows, models: tuple[Any, Any], device: torch.device) -> dict[str, Any]:
    """Seconds of one row and rows a second of a batch, of both models in turns: medians, and how
    many times as fast the second one is."""
    at_once = min(rows_at_once(rows.trained, rows.task), rows.split.num_rows)
    middle = (rows.split.num_rows - at_once) // 2  # rows of like length lie together
    table = rows.read(middle, middle + at_once)
    batches = [
        {key: tensor.to(device) for key, tensor in rows.task.collate(part).items()}
        for part in (table.slice(at_once // 2, 1), table)
    ]
    objectives = [rows.task.objective(model).eval() for model in models]
    one, many = (_times(objectives, batch, device) for batch in batches)
    return {
        "row_seconds": _pair(*one, one[0] / one[1]),
        "rows_per_second": _pair(at_once / many[0], at_once / many[1], many[0] / many[1]),
        "batch_rows": at_once,
        "row_tokens": _width(batches[0]),
        "batch_tokens": _width(batches[1]),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }


def _pair(before: float, after: float, speedup: float) -> dict[str, float]:
    return {"before": before, "after": after, "speedup": speedup}


def _width(batch: Batch) -> int | None:
    ids = batch.get("input_ids")
    return None if ids is None else int(ids.shape[-1])


def _times(objectives: list[nn.Module], batch: Batch, device: torch.device) -> tuple[float, float]:
    """Medians of both, each timed in turns, the one that begins in turns, too."""

    def timed(work: Callable[[Batch], Any]) -> float:
        begun = time.perf_counter()
        work(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    for objective in objectives:
        timed(objective)  # the first pass makes room
    taken: tuple[list[float], list[float]] = ([], [])
    begun = time.perf_counter()
    for turn in range(MOST_PASSES):
        for place in (0, 1) if turn % 2 else (1, 0):
            taken[place].append(timed(objectives[place]))
        if turn + 1 >= FEWEST_PASSES and time.perf_counter() - begun > TIMED_SECONDS:
            break
    return statistics.median(taken[0]), statistics.median(taken[1])
