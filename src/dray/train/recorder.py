"""The ranks' records become the run's metrics: one row a step, once every rank has reported it.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from dray.doctor.stalls import find_straggler
from dray.errors import StorageFailed
from dray.plan import Plan
from dray.runs import Run, Trackers
from dray.show.progress import Display
from dray.storage.retrying import OUTAGE_SECONDS

DRAIN_SECONDS, OBJECT_DRAIN_SECONDS = 0.25, 1.0
"""How often the ranks' records are taken and stored: object stores rewrite an object, and GCS takes one a second."""
FEWEST_STEPS = 5


class Recorder:
    """Turns the ranks' records into the run's metrics: one row a step once every rank has reported it.

    While the storage takes nothing (a full disk, say) they are kept here and tried again, for OUTAGE_SECONDS. May be
    used from several threads: without Ray the thread that saves waits here while training goes on.
    """

    def __init__(self, run: Run, plan: Plan, trackers: Trackers, display: Display) -> None:
        self._run, self._plan, self._trackers, self._display = run, plan, trackers, display
        self._open: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        self.ended: str | None = None
        self.stopped_by: int = signal.SIGINT
        """The signal that asked the run to stop, if one did."""
        self._rows: list[dict[str, Any]] = []
        self._events: list[dict[str, Any]] = []
        self._failing_since: float | None = None
        self._recent: deque[dict[str, Any]] = deque(maxlen=21)
        self._told: set[tuple[Any, ...]] = set()
        self._lock = threading.RLock()
        self._newest, self._newest_time, self._attempt = 0, 0.0, 0

    @property
    def step_seconds(self) -> float | None:
        """A usual step's duration, once a few are known."""
        seconds = [row["seconds"] for row in self._recent]
        return median(seconds) if len(seconds) >= FEWEST_STEPS else None

    @property
    def is_stored(self) -> bool:
        """Whether all that was taken is in the run's records."""
        with self._lock:
            return not self._rows and not self._events

    def stop(self, number: int) -> None:
        """Say that a signal has asked the run to stop."""
        self.stopped_by = number
        self.say(f"{signal.Signals(number).name}: the run saves its state and stops; once more ends it without that")

    def give_up_saving(self, error: BaseException) -> None:
        """What asked for the stop may end ranks, or Ray, too: what was committed before is the run's state."""
        self.say(f"stopped before the newest steps were saved: {error}")
        self.ended = "interrupted"

    def say(self, text: str) -> None:
        """Show a remark to the person who watches."""
        self._display.say(text)

    def take(self, records: Sequence[dict[str, Any]]) -> None:
        """Take some records, in the order in which each rank sent them. Raises StorageFailed once nothing could be
        stored for too long."""
        with self._lock:
            for record in records:
                self._take(record)
            self._store()

    def _take(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "step":
            key = record["attempt"], record["step"]
            self._open[key].append(record)
            if len(self._open[key]) == record["num_ranks"]:
                self._rows.append(make_metrics_row(self._open.pop(key), self._plan))
                self._show_step(self._rows[-1])
        elif kind == "validation":
            self._rows.append(record)
            self._show_validation(record)
        elif kind == "ended":
            self.ended = record["how"]
        else:
            self._events.append({k: v for k, v in record.items() if k != "time"})
            self._tell_trouble(record)

    def wait_stored(self) -> None:
        """Try until all that was taken is stored. Raises StorageFailed."""
        while not self.is_stored:
            time.sleep(DRAIN_SECONDS)
            with self._lock:
                self._store()

    def _store(self) -> None:
        try:
            while self._events:
                self._run.log_event(**self._events[0])
                del self._events[0]
            self._run.log_metrics(self._rows)
            self._rows.clear()
            self._failing_since = None
        except StorageFailed as error:
            if self._failing_since is None:
                self._failing_since = time.monotonic()
                self._display.say(f"metrics are kept in memory for {OUTAGE_SECONDS:.0f} s at most: {error}")
            if time.monotonic() - self._failing_since > OUTAGE_SECONDS:
                raise

    def _show_step(self, row: dict[str, Any]) -> None:
        if row["step"] > self._newest:
            arrived = time.monotonic()  # the rows' own times are by the clocks of the ranks
            if self._newest and row["attempt"] > self._attempt:
                seconds = arrived - self._newest_time
                self._events.append({"kind": "recovered", "attempt": row["attempt"], "step": row["step"],
                                     "seconds": seconds})
                self._display.say(f"step {row['step']} is new again, {seconds:.0f} s after step {self._newest}")
            self._newest, self._newest_time, self._attempt = row["step"], arrived, row["attempt"]
        self._recent.append(row)
        self._tell_straggler(row)
        self._trackers.log(row["step"], {k: v for k, v in row.items() if isinstance(v, (int, float))})
        self._display.step(row)

    def _tell_straggler(self, row: dict[str, Any]) -> None:
        """Say once an attempt that a rank is slow: the others wait for it at every step."""
        slow = find_straggler([recent for recent in self._recent if recent["attempt"] == row["attempt"]])
        if slow is None or slow.rank is None or not self._is_new("slow", row["attempt"], slow.rank):
            return
        self._events.append({"kind": "straggler", "attempt": row["attempt"], "step": row["step"], "rank": slow.rank,
                             "ratio": slow.ratio})
        self._display.say(f"rank {slow.rank} is slow: its forward passes take {slow.ratio:.1f} times as long as the "
                          f"others', in {slow.num_steps} of the last steps; `dray doctor {self._run.name}` says more")

    def _tell_trouble(self, record: Mapping[str, Any]) -> None:
        """Say what a person should know of a save that failed, and once an attempt that nothing can be deleted."""
        if record["kind"] == "checkpoint_failed":
            self._display.say(f"step {record['step']} could not be saved: {record['problem']}")
        elif record["kind"] == "retention_failed" and self._is_new("retention", record["attempt"]):
            self._display.say(f"older checkpoints cannot be deleted, so the storage fills up: {record['problem']}")

    def _is_new(self, *what: Any) -> bool:
        """Whether this has not been told yet."""
        new = what not in self._told
        self._told.add(what)
        return new

    def _show_validation(self, record: dict[str, Any]) -> None:
        values = {k: v for k, v in record.items() if k not in ("kind", "attempt", "step", "time")}
        self._trackers.log(record["step"], {f"validation_{k}": v for k, v in values.items()})
        self._display.validation(record["step"], values)


def make_metrics_row(records: Sequence[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """One step's row from all ranks' records.

    `forward_seconds_skew` is (max − mean) / mean over the ranks' forward passes, in which none waits for another (below
    ZeRO-3): whole steps end together, so their times do not tell a slow rank.
    """
    first = min(records, key=lambda record: record["rank"])
    seconds = max(record["seconds"] for record in records)
    times, waits, forwards = ([record[name] for record in records]
                              for name in ("seconds", "data_wait_seconds", "forward_seconds"))
    mean_forward = sum(forwards) / len(forwards)
    per_second = first["step_tokens"] / seconds
    peak = (plan.peak_flops_per_rank or 0.0) * len(records)
    return {
        "step": first["step"], "attempt": first["attempt"], "num_ranks": first["num_ranks"],
        "loss": _finite(sum(record["loss_sum"] for record in records) / max(1, first["num_targets"])),
        "learning_rate": first["learning_rate"], "grad_norm": _finite(first["grad_norm"]), "applied": first["applied"],
        "tokens": first["tokens"],
        "seconds": seconds, "rows_digest": first["rows_digest"], "num_targets": first["num_targets"],
        "tokens_per_second": per_second,
        "mfu": per_second * plan.flops_per_token_loose / peak if peak else None,
        "mfu_strict": per_second * plan.flops_per_token_strict / peak if peak else None,
        "step_seconds_mean": sum(times) / len(times), "step_seconds_max": max(times),
        "forward_seconds_mean": mean_forward, "forward_seconds_max": max(forwards),
        "slowest_rank": max(records, key=lambda record: record["forward_seconds"])["rank"],
        "forward_seconds_skew": (max(forwards) - mean_forward) / mean_forward if mean_forward else 0.0,
        "data_wait_seconds_mean": sum(waits) / len(waits), "data_wait_seconds_max": max(waits),
        "memory_bytes_mean": sum(r["memory_bytes"] for r in records) / len(records),
        "memory_bytes_max": max(record["memory_bytes"] for record in records), "time": first["time"],
    }


def _finite(value: float) -> float | None:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else None
