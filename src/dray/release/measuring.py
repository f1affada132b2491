"""A task's metrics of a trained model over rows: in this process, or by several workers on Ray,
each of a part of the rows.

Each part is measured by the task's own objective and metrics, as a validation's is, and the parts'
sums are merged as those of ranks are.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from dray.cluster.needs import Needs
from dray.cluster.nodes import live_nodes
from dray.cluster.workers import environment_of_ranks
from dray.corpus.manifest import Split
from dray.corpus.prepare import Corpus
from dray.corpus.stream import read_rows
from dray.errors import DrayError, PlanError, RunFailed, one_line
from dray.processes.heap import prepare_process
from dray.release.opened import Opened
from dray.release.trained import Chosen, Trained, Weights, open_trained
from dray.tasks import Task, TaskMetrics, draw_of

MAX_BATCH_ROWS, BATCH_TOKENS = 32, 32_768
LOGIT_BYTES = 512 * 1024 * 1024
"""Logits of a batch in fp32, at most; one row is the least that a batch can have."""
PARTS_A_WORKER = 4
"""Parts of the rows for each worker: whoever is done early takes more."""


@torch.no_grad()
def measure(
    trained: Trained,
    task: Task,
    corpus: Corpus,
    split: Split,
    *,
    first: int,
    end: int,
    by_row: bool = False,
) -> TaskMetrics:
    """The sums of the task's metrics over the rows from `first` to before `end`, in this process,
    on the GPU where there is one. `by_row`: those that keep sums of batches get a row a batch."""
    metrics = task.new_metrics()
    device = trained.move_to_device()
    objective = task.objective(trained.model).eval()
    group = corpus.manifest.group_rows
    apart = by_row and getattr(metrics, "gather_rows", bool)()
    num_rows = 1 if apart else rows_at_once(trained, task)
    for start in range(first, end, group):  # a group is read at once
        ids = np.arange(start, min(start + group, end), dtype=np.int64)
        rows = read_rows(corpus.folder, corpus.manifest, split, ids)
        for batch in task.passes(rows, draw_of(trained.spec.seed, 0), num_rows):
            batch = {key: tensor.to(device) for key, tensor in batch.items()}
            _, output = objective(batch)
            metrics.update(batch, output)
    return metrics


def measure_on_workers(
    trained: Trained,
    task: Task,
    corpus: Corpus,
    split: Split,
    num_workers: int,
    *,
    by_row: bool = False,
) -> TaskMetrics:
    """The same over all rows of the split, by workers of the connected Ray with a CPU each, and a
    GPU where a node has one.

    Workers are tasks, which need not be at work at the same time: where there is room for fewer
    than were asked for, those do it all. Raises PlanError where there is room for none.
    """
    import ray

    nodes = live_nodes()
    num_gpus = int(any(Needs({"GPU": 1.0}).count_on(node) for node in nodes))
    wanted = {"CPU": 1.0, **({"GPU": float(num_gpus)} if num_gpus else {})}
    if not any(Needs(wanted).count_on(node) for node in nodes):
        raise PlanError(
            "--workers",
            f"no node has {' and '.join(f'{has:g} {name}' for name, has in wanted.items())}",
            "each worker needs as much",
            "leave it out to measure in this process",
        )
    bounds = np.linspace(0, split.num_rows, num_workers * PARTS_A_WORKER + 1).astype(int).tolist()
    parts = [(first, end) for first, end in pairwise(bounds) if first < end]
    run, step = trained.run, trained.checkpoint.step
    what = (
        (run.storage, run.name, step, trained.weights, trained.chosen),
        task,
        corpus,
        split,
        by_row,
    )
    work = ray.remote(
        num_cpus=1,
        num_gpus=num_gpus,
        max_retries=1,
        runtime_env=environment_of_ranks(num_gpus),
    )(_measure_part)
    shared, states = ray.put(what), dict[int, dict[str, Any]]()
    pending: dict[Any, int] = {}
    try:
        for number, part in enumerate(parts):
            if len(pending) == num_workers:
                _take_one(pending, states)
            pending[work.remote(shared, *part)] = number
        while pending:
            _take_one(pending, states)
    finally:  # after an error nobody wants the other parts
        for ref in pending:
            ray.cancel(ref, force=True)
    # In the order of the rows, so that the sums do not depend on who was done first.
    return task.new_metrics().merge(states[number] for number in range(len(parts)))


def _take_one(pending: dict[Any, int], states: dict[int, dict[str, Any]]) -> None:
    """Wait for one part. Raises what went wrong in its worker."""
    import ray

    done, _ = ray.wait(list(pending), num_returns=1)
    try:
        states[pending.pop(done[0])] = ray.get(done[0])
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, DrayError):
            raise cause from None
        reason = one_line(cause or error)
        raise RunFailed(f"a worker could not measure its part: {reason}") from error


def _measure_part(what: Any, first: int, end: int) -> dict[str, Any]:
    place, task, corpus, split, by_row = what
    trained = _open_once(*place)
    return measure(trained, task, corpus, split, first=first, end=end, by_row=by_row).state()


@lru_cache(maxsize=1)
def _open_once(storage: str, name: str, step: int, weights: Weights, chosen: Chosen) -> Trained:
    """A worker gets several parts, and reads the model when it measures the first one."""
    prepare_process(1)
    return open_trained(storage, name, step, weights, chosen)


def rows_at_once(trained: Opened, task: Task) -> int:
    """Rows of a trained model that are computed at once."""
    width = trained.manifest.sequence_tokens * task.head.sequences
    outputs = trained.manifest.vocab_size if task.head.over == "vocabulary" else task.num_labels
    return batch_rows(width, outputs * (width if task.head.each == "token" else 1))


def batch_rows(width: int, num_outputs: int) -> int:
    """Rows of `width` tokens and `num_outputs` logits each that are computed at once."""
    return max(1, min(MAX_BATCH_ROWS, BATCH_TOKENS // width, LOGIT_BYTES // (4 * num_outputs)))
