"""What a run or a sweep says of itself to the metrics agents of its cluster, where Prometheus reads
it. Ray puts `ray_` before each name and adds labels of its own.

Only where a dashboard is: the cluster of a laptop has nobody who reads, and starts without those
agents.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache
from typing import Any

GAUGES: Mapping[str, tuple[str, str]] = {
    "running": ("", "1 while a driver follows the run, 0 once that has ended."),
    "step": ("", "The newest step."),
    "steps": ("", "Steps that the run is to do in all."),
    "loss": ("", "Training loss of the newest step; absent while it is not finite."),
    "loss_is_finite": ("", "0 after a step whose loss or gradient was not finite, else 1."),
    "learning_rate": ("", "Of the newest step."),
    "grad_norm": ("", "Global gradient norm of the newest step."),
    "tokens": ("", "Tokens that the run has trained on."),
    "tokens_per_second": ("", "Over all ranks, of the newest step."),
    "mfu": ("", "Share of the peak FLOPs that the model used; absent where the peak is unknown."),
    "ranks": ("", "Ranks of the present worker group."),
    "attempt": ("", "Number of the present start of the worker group."),
    "step_seconds": ("rank", "Seconds of the newest step by rank, of the first 64 ranks."),
    "step_seconds_max": ("", "Seconds of the newest step on the slowest rank."),
    "data_wait_seconds_max": ("", "Seconds that the rank that waited longest waited for rows."),
    "memory_bytes_max": ("", "Greatest memory in use on a rank."),
    "progress_timestamp_seconds": ("", "When the newest step arrived, in seconds since 1970."),
    "validation": ("metric", "The newest validation, by metric; absent where undefined."),
    "checkpoint_step": ("", "Step of the newest committed checkpoint."),
    "checkpoint_timestamp_seconds": ("", "When it was committed, in seconds since 1970."),
    "checkpoint_seconds": ("", "Seconds that its commit took, beside training."),
    "checkpoint_blocked_seconds": ("", "Seconds of them that a step waited."),
    "goodput": ("", "Share of this driver's time that went into steps, each counted once."),
    "storage_free_bytes": ("", "Free bytes where the run lies; absent for an object store."),
    "storage_bytes": ("", "Bytes there in all."),
    "failures": ("cause", "Attempts of the run that failed, by cause."),
    "failed_saves": ("", "Saves that failed since the driver began."),
    "skipped_steps": ("", "Steps without an update since the driver began."),
    "sweep_trials": ("status", "Trials of the sweep by status."),
    "sweep_best": ("metric", "The sweep's metric of its best trial."),
}
"""Gauge → the label that it has beside `run`, and what it says."""
PREFIX = "dray_"
KEEP_SECONDS = 5.0


class Gauges:
    """The gauges of one run or sweep, in a process that is connected to its cluster. `is_read`:
    whether anybody collects them; otherwise nothing is kept."""

    def __init__(self, run: str, *, is_read: bool) -> None:
        self.run, self.is_read = run, is_read
        self._values: dict[tuple[str, str], float] = {}
        self._kept_at = time.monotonic()

    def set(self, name: str, value: float | None, label: str = "") -> None:
        """Give a gauge a value; none leaves the one before."""
        if self.is_read and value is not None:
            self._values[name, label] = float(value)
            self._say(name, label)

    def keep(self) -> None:
        """Have all values stay, which is to be called often: Ray forgets what was not said again
        within two of its reports, 20 s. So what a driver that hangs has said goes, too."""
        if time.monotonic() - self._kept_at < KEEP_SECONDS:
            return
        self._kept_at = time.monotonic()
        for name, label in list(self._values):  # others set meanwhile
            self._say(name, label)

    def _say(self, name: str, label: str) -> None:
        key = GAUGES[name][0]
        tags = {"run": self.run, **({key: label} if key else {})}
        _gauge(name).set(self._values[name, label], tags=tags)


def build_gauges(run: str) -> Gauges:
    """The gauges of a run or sweep, read if the connected cluster has a dashboard."""
    return Gauges(run, is_read=has_dashboard())


def has_dashboard() -> bool:
    """Whether a Ray is connected that has a dashboard, and with it agents that collect metrics."""
    import ray

    if not ray.is_initialized():
        return False
    node: Any = ray._private.worker._global_node
    return bool(getattr(node, "webui_url", None))


@cache
def _gauge(name: str) -> Any:
    """One a process and name: Ray merges what is made twice."""
    from ray.util.metrics import Gauge

    key, says = GAUGES[name]
    return Gauge(PREFIX + name, says, tag_keys=("run", key) if key else ("run",))
