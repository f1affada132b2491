"""Columns of rows that a model tells: the model that the run begins with, asked once of every row
(`Column.told`), so that no rank needs a second model beside the one it trains.

A shard is read group by group, told a few rows at a time, and written anew with what was told, by a
task of Ray Data's like every other piece of a preparation. Refuses weights that are gone or are not
those that were pinned.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from dray.corpus.manifest import Shard
from dray.corpus.parts import Preparation, save_record
from dray.corpus.shards import rewrite_shard
from dray.models.source import find_pretrained
from dray.origin import Origin, RunWeights, find_run_weights, open_weights
from dray.spec import Spec
from dray.storage.filesystem import share_filesystem

TOKENS_AT_ONCE = 8_192
"""Of the rows that a model is asked of at the same time."""


PROCESS_BYTES = 600 * 1024 * 1024
"""What a process takes that has imported what models need."""


@dataclass(frozen=True)
class Teller:
    """The model that a run of the spec begins with."""

    spec: Spec
    origin: Origin | None
    """Where its weights lie, pinned; None: they are drawn by the spec's seed."""

    def __hash__(self) -> int:
        return hash((self.spec.name, self.origin))

    @property
    def digest(self) -> str:
        """What it is known by, wherever its weights lie: it belongs to the corpus' key."""
        model = self.spec.model.model_dump(mode="json", exclude={"path", "run", "step"})
        weights = self.spec.seed if self.origin is None else self.origin.digest
        told = json.dumps([model, weights], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()

    @property
    def memory_bytes(self) -> int:
        """About what it takes in fp32; 0: unknown."""
        return 0 if self.origin is None else weights_bytes(self.origin)


def weights_bytes(origin: Origin) -> int:
    """About what a model takes in fp32, by what its weights take on storage."""
    if isinstance(origin, RunWeights):
        return origin.find()[1].num_bytes
    files = origin.folder().glob("*.safetensors")
    return 2 * sum(path.stat().st_size for path in files)  # they may be in half precision


def find_teller(spec: Spec, storage: str, origin: Origin | None = None) -> Teller | None:
    """The model that tells columns of the spec's rows; None: its task has none that are told.

    `origin`: the weights that a run has pinned; None: those that the spec names now. Raises
    UserError where these are gone.
    """
    if not any(column.told for column in spec.task.columns):
        return None
    model = spec.model
    if origin is None and model.run:
        origin = find_run_weights(storage, model.run, model.step)
    elif origin is None and model.path:
        origin = find_pretrained(str(model.path))
    return Teller(spec, None if origin is None else origin.pinned())


def telling_options(job: Preparation, teller: Any) -> dict[str, Any]:
    """Ray's options of the tasks that ask a `teller`, or translators: no more of them on a node
    than it has memory for."""
    import ray

    needed = teller.memory_bytes and teller.memory_bytes + PROCESS_BYTES
    most = max((node["Resources"].get("memory", 0.0) for node in ray.nodes()), default=0.0)
    return {**job.task_options, **({"memory": min(needed, most)} if needed and most else {})}


def tell_shard(job: Preparation, item: tuple[int, Shard]) -> dict[str, Any]:
    """Write a shard anew, with the columns that its task's model tells. Returns the shard's
    record."""
    index, shard = item
    task, objective = _ask(job.teller, job)

    def tell(rows: pa.Table) -> dict[str, Any]:
        return _tell(task, objective, rows, job.sequence_tokens)

    place = share_filesystem(job.folder)
    written = rewrite_shard(*place, shard, job.group_rows, job.columns, tell)
    return save_record(job, "told", index, written.model_dump())


def _tell(task: Any, objective: Any, table: pa.Table, width: int) -> dict[str, Any]:
    """The told columns of some rows, by name. Raises ValueError for what is not one finite number a
    row: a model that knows no answer would teach nothing."""
    import torch

    found: dict[str, list[Any]] = {column.name: [] for column in task.columns if column.told}
    at_once = max(1, TOKENS_AT_ONCE // width)
    with torch.no_grad():
        for start in range(0, table.num_rows, at_once):
            batch = task.collate(table.slice(start, at_once))
            _, output = objective(batch)
            for name, values in task.tell(batch, output).items():
                found[name].append(values.double().numpy())
    columns = {name: np.concatenate(values) for name, values in found.items()}
    for name, values in columns.items():
        if values.shape != (table.num_rows,) or not np.isfinite(values).all():
            raise ValueError(f"{task.name}: {name} is not one finite number for each row")
    return columns


@dataclass(frozen=True)
class _Known:
    """What a task must know of a corpus that is still in the making."""

    pad_token_id: int | None
    labels: tuple[str, ...]
    mask_token_id: int | None
    vocab_size: int
    eos_token_id: int | None


def _ask(teller: Teller, job: Preparation) -> tuple[Any, Any]:
    """The task, and its objective around the model, in fp32 on this process' one CPU. A process
    asks about many shards, and reads the model once."""
    info = job.info
    known = _Known(
        info.pad_token_id, job.labels, info.mask_token_id, info.vocab_size, info.eos_token_id
    )
    return _ask_once(teller, known)


@lru_cache(maxsize=1)
def _ask_once(teller: Teller, known: _Known) -> tuple[Any, Any]:
    from dray.models.build import build_model, sizes_by
    from dray.models.config import read_config
    from dray.processes.heap import prepare_process

    prepare_process(1)
    spec, origin = teller.spec, teller.origin
    task = spec.task.on(known, spec.model.num_labels)
    config: Any = None
    if isinstance(origin, RunWeights):
        config = origin.config()
    elif origin is not None:
        origin.check()
        config = read_config(origin.folder())
    model = build_model(
        spec,
        **sizes_by(known, task.num_labels),
        config=config,
        weights=None if origin is None else open_weights(origin),
    )
    return task, task.objective(model).eval()
