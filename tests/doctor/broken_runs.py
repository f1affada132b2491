"""A run of three ranks, and how its driver writes down that it failed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dray.runs import Run
from dray.runs.evidence import save_stacks
from dray.runs.layout import FAILURES, make_failure_file
from dray.runs.records import RankFailure
from dray.storage.filesystem import write_bytes

NUM_RANKS, CULPRIT, FAULT_STEP = 3, 1, 4
PLAN = {
    "num_steps": 50,
    "num_ranks": NUM_RANKS,
    "zero_stage": 1,
    "offload": "none",
    "activation_checkpointing": False,
    "on_gpu": True,
    "precision": "bf16",
    "batch": {"micro_rows": 8},
}


@dataclass
class Group:
    """How the ranks of one real group ended: their own records, or their exits, and their
    stacks."""

    ranks: list[dict[str, Any]]
    stacks: dict[int, str]


def make_row(step: int, **values: Any) -> dict[str, Any]:
    return {
        "step": step,
        "attempt": 1,
        "num_ranks": NUM_RANKS,
        "loss": 4.0 - step / 10,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "seconds": 0.5,
        "time": time.time(),
        **values,
    }


def write_failure(run: Run, document: Mapping[str, Any]) -> None:
    """A failure's document, of any version and whatever it holds."""
    path = f"{run.path}/{FAILURES}/{make_failure_file(document['attempt'])}"
    write_bytes(run.filesystem, path, json.dumps(document).encode())


def fail(
    run: Run,
    ranks: Sequence[RankFailure | dict[str, Any]],
    *,
    stacks: dict[int, str] | None = None,
    **fields: Any,
) -> None:
    """Write the failure of attempt 1 as a driver does."""
    write_failure(
        run,
        {
            "attempt": 1,
            "step": FAULT_STEP - 1,
            "detected_by": "exception",
            "ranks": [rank if isinstance(rank, dict) else rank.to_json() for rank in ranks],
            "nodes_lost": [],
            "preempted": False,
            **fields,
        },
    )
    for rank, text in (stacks or {}).items():
        save_stacks(run, 1, rank, text)
    run.set_status("failed", "the workers failed")
