"""A run of three ranks, and how its driver writes down that it failed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from dray.runs import Run
from dray.runs.evidence import save_failure, save_stacks

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


def fail(
    run: Run, ranks: list[dict[str, Any]], *, stacks: dict[int, str] | None = None, **fields: Any
) -> None:
    """Write the failure of attempt 1 as a driver does."""
    save_failure(
        run,
        {
            "attempt": 1,
            "step": FAULT_STEP - 1,
            "detected_by": "exception",
            "ranks": ranks,
            "nodes_lost": [],
            "preempted": False,
            "host_memory": None,
            **fields,
        },
    )
    for rank, text in (stacks or {}).items():
        save_stacks(run, 1, rank, text)
    run.set_status("failed", "the workers failed")
