"""A run in gauges: what the recorder learns of it, for Prometheus."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from dray.cluster.gauges import Gauges
from dray.errors import caught
from dray.runs import Run
from dray.runs.records import Event, StepReport
from dray.storage.filesystem import is_local

LOOK_SECONDS = 5.0
"""How often is looked at what changes by itself."""
MOST_RANKS = 64
"""A time series a rank and run; of larger groups the slowest rank's alone."""
_OF_A_ROW = (
    *("step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "mfu"),
    *("attempt", "step_seconds_max", "data_wait_seconds_max", "memory_bytes_max"),
)


class Watching:
    """Sets the gauges of one run."""

    def __init__(self, gauges: Gauges, run: Run, num_steps: int) -> None:
        self._gauges, self._run = gauges, run
        self._began, self._looked_at = time.monotonic(), 0.0
        self._newest, self._useful_seconds, self._attempt = 0, 0.0, 0
        self._counts = Counter[str]()
        gauges.set("steps", num_steps)
        gauges.set("running", 1)
        # A series that begins at its first event shows no increase.
        for name in ("failed_saves", "skipped_steps"):
            gauges.set(name, 0)
        gauges.set("loss_is_finite", 1)
        gauges.set("progress_timestamp_seconds", time.time())
        self._count_failures()

    def step(self, reports: Sequence[StepReport], row: Mapping[str, Any]) -> None:
        """Tell of a step, by its row of metrics and by the reports of all ranks."""
        if not self._gauges.is_read:
            return
        for name in _OF_A_ROW:
            self._gauges.set(name, row[name])
        self._gauges.set("ranks", row["num_ranks"])
        self._gauges.set("loss_is_finite", row["loss"] is not None)
        for report in reports if len(reports) <= MOST_RANKS else ():
            self._gauges.set("step_seconds", report.seconds, str(report.rank))
        if row["step"] > self._newest:
            self._newest = row["step"]
            self._useful_seconds += row["seconds"]
            self._gauges.set("progress_timestamp_seconds", time.time())
        if row["attempt"] != self._attempt:
            self._attempt = row["attempt"]
            self._count_failures()

    def validation(self, values: Mapping[str, float | None]) -> None:
        """Tell of a validation's metrics."""
        for name, value in values.items():
            self._gauges.set("validation", value, name)

    def event(self, event: Event) -> None:
        """Tell of what happened, if it is a save or a skipped step."""
        match event.kind:
            case "checkpoint":
                self._gauges.set("checkpoint_step", event.step)
                self._gauges.set("checkpoint_timestamp_seconds", time.time())
                self._gauges.set("checkpoint_seconds", event.fields["seconds"])
                self._gauges.set("checkpoint_blocked_seconds", event.fields["blocked_seconds"])
            case "checkpoint_failed":
                self._add("failed_saves")
            case "step_skipped":
                self._add("skipped_steps")
                self._gauges.set("loss_is_finite", 0)

    def look(self) -> None:
        """Tell of what changes by itself, every few seconds; to be called often."""
        self._gauges.keep()
        now = time.monotonic()
        if not self._gauges.is_read or now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        self._gauges.set("goodput", self._useful_seconds / max(now - self._began, 1e-9))
        if is_local(self._run.filesystem):
            with suppress(OSError):
                usage = shutil.disk_usage(self._run.path)
                self._gauges.set("storage_free_bytes", usage.free)
                self._gauges.set("storage_bytes", usage.total)

    def end(self) -> None:
        """The run has ended, whichever way."""
        self._count_failures()
        self._looked_at = 0.0
        self.look()
        self._gauges.set("running", 0)

    def _add(self, name: str) -> None:
        self._counts[name] += 1
        self._gauges.set(name, self._counts[name])

    def _count_failures(self) -> None:
        if not self._gauges.is_read:
            return
        attempts, _ = caught(self._run.attempts)  # what cannot be read now is told by others
        causes = Counter(item.reason for item in attempts or () if item.status == "failed")
        for cause, number in causes.items():
            self._gauges.set("failures", number, cause)
