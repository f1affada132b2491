"""The ranks' reports become the run's metrics: one row a step, once every rank has reported it."""

from __future__ import annotations

import signal
import threading
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from dray.doctor.stalls import find_straggler
from dray.errors import StorageFailed
from dray.plan import Plan
from dray.runs import Run, Trackers
from dray.runs.records import Ended, Event, Report, StepReport, ValidationReport, finite
from dray.runs.uptime import INTERVAL, RESTARTED, describe_interval
from dray.show.progress import Display
from dray.storage.retrying import OUTAGE_SECONDS
from dray.train.caller import Wish
from dray.train.watching import Watching

DRAIN_SECONDS, OBJECT_DRAIN_SECONDS = 0.25, 1.0
"""How often the ranks' records are taken and stored: object stores rewrite an object, and GCS takes
one a second."""
USUAL_STEPS = 5


class Recorder:
    """Turns the ranks' records into the run's metrics: one row a step once every rank has reported
    it.

    While the storage takes nothing (a full disk, say) they are kept here and tried again, for
    OUTAGE_SECONDS. May be used from several threads: without Ray the thread that saves waits here
    while training goes on.
    """

    def __init__(
        self, run: Run, plan: Plan, trackers: Trackers, display: Display, watching: Watching
    ) -> None:
        self._run, self._plan, self._trackers, self._display = run, plan, trackers, display
        self._watching = watching
        self._open: dict[tuple[int, int], list[StepReport]] = defaultdict(list)
        self.ended: str | None = None
        self.wish: Wish | None = None
        """Why the run was asked to stop, if it was."""
        self._rows: list[dict[str, Any]] = []
        self._stored: list[dict[str, Any]] = []
        self._events: list[Event] = []
        self._failing_since: float | None = None
        self._recent: deque[dict[str, Any]] = deque(maxlen=21)
        self._told: set[tuple[Any, ...]] = set()
        self._lock = threading.RLock()
        self._newest, self._newest_time, self._attempt = 0, 0.0, 0
        self._latest_attempt, self._latest_time = 0, 0.0

    @property
    def step_seconds(self) -> float | None:
        """A usual step's duration, once a few are known."""
        seconds = [row["seconds"] for row in self._recent]
        return median(seconds) if len(seconds) >= USUAL_STEPS else None

    @property
    def is_stored(self) -> bool:
        """Whether all that was taken is in the run's records."""
        with self._lock:
            return not self._rows and not self._events

    def stop(self, wish: Wish) -> None:
        """Say that the run has been asked to stop."""
        self.wish = wish
        if wish.number is None:
            self.say(f"the run saves its state and stops: {wish.reason}")
            return
        self.say(
            f"{signal.Signals(wish.number).name}: the run saves its state and stops; once more "
            "ends it without that"
        )

    def give_up_saving(self, error: BaseException) -> None:
        """What asked for the stop may end ranks, or Ray, too: what was committed before is the
        run's state."""
        self.say(f"stopped before the newest steps were saved: {error}")
        self.ended = "interrupted"

    def say(self, text: str) -> None:
        """Show a remark to the person who watches."""
        self._display.say(text)

    def take(self, reports: Sequence[Report]) -> None:
        """Take some reports, in the order in which each rank sent them. Raises StorageFailed once
        nothing could be stored for too long."""
        with self._lock:
            for report in reports:
                self._take(report)
            self._store()
            self._watching.look()

    def _take(self, report: Report) -> None:
        match report:
            case StepReport():
                ranks = self._open[report.attempt, report.step]
                ranks.append(report)
                if len(ranks) == report.num_ranks:
                    del self._open[report.attempt, report.step]
                    self._rows.append(make_metrics_row(ranks, self._plan))
                    self._show_step(self._rows[-1])
                    self._watching.step(ranks, self._rows[-1])
            case ValidationReport():
                self._rows.append(report.to_row())
                self._show_validation(report)
                self._watching.validation(report.values)
            case Ended():
                self.ended = report.how
            case Event():
                self._events.append(report)
                self._tell(report)
                self._watching.event(report)

    def take_stored(self) -> list[dict[str, Any]]:
        """The metrics rows that have been stored since the last call."""
        with self._lock:
            stored, self._stored = self._stored, []
            return stored

    def wait_stored(self) -> None:
        """Try until all that was taken is stored. Raises StorageFailed."""
        while not self.is_stored:
            time.sleep(DRAIN_SECONDS)
            with self._lock:
                self._store()

    def _store(self) -> None:
        try:
            while self._events:
                self._run.log_event(**self._events[0].to_row())
                del self._events[0]
            self._run.log_metrics(self._rows)
            self._stored += self._rows
            self._rows = []
            self._failing_since = None
        except StorageFailed as error:
            if self._failing_since is None:
                self._failing_since = time.monotonic()
                self._display.say(
                    f"metrics are kept in memory for {OUTAGE_SECONDS:.0f} s at most: {error}"
                )
            if time.monotonic() - self._failing_since > OUTAGE_SECONDS:
                raise

    def _show_step(self, row: dict[str, Any]) -> None:
        arrived = time.monotonic()  # the rows' own times are by the clocks of the ranks
        if 0 < self._latest_attempt < row["attempt"]:
            seconds = max(0.0, arrived - self._latest_time - row["seconds"])
            self._events.append(Event(RESTARTED, row["attempt"], row["step"], {"seconds": seconds}))
        self._latest_attempt, self._latest_time = row["attempt"], arrived
        if row["step"] > self._newest:
            if self._newest and row["attempt"] > self._attempt:
                seconds = arrived - self._newest_time
                self._events.append(
                    Event("recovered", row["attempt"], row["step"], {"seconds": seconds})
                )
                self._display.say(
                    f"step {row['step']} is new again, {seconds:.0f} s after step {self._newest}"
                )
            self._newest, self._newest_time, self._attempt = row["step"], arrived, row["attempt"]
        self._recent.append(row)
        self._tell_straggler(row)
        self._trackers.log(
            row["step"], {k: v for k, v in row.items() if isinstance(v, (int, float))}
        )
        self._display.step(row)

    def _tell_straggler(self, row: dict[str, Any]) -> None:
        """Say once an attempt that a rank is slow: the others wait for it at every step."""
        slow = find_straggler(
            [recent for recent in self._recent if recent["attempt"] == row["attempt"]]
        )
        if slow is None or slow.rank is None or not self._is_new("slow", row["attempt"], slow.rank):
            return
        self._events.append(
            Event(
                "straggler", row["attempt"], row["step"], {"rank": slow.rank, "ratio": slow.ratio}
            )
        )
        self._display.say(
            f"rank {slow.rank} is slow: its forward passes take {slow.ratio:.1f} times as long as "
            f"the others', in {slow.num_steps} of the last steps; `dray doctor {self._run.name}` "
            "says more"
        )

    def _tell(self, event: Event) -> None:
        """Say what a person should know: what was taken of given weights, how often the run saves
        where it finds that out itself, of a save that failed, and once an attempt that nothing can
        be deleted, or that nothing ranks its checkpoints."""
        problem = event.fields.get("problem")
        if event.kind == "weights_taken":
            self._display.say(event.fields["report"])
        elif event.kind == INTERVAL:
            self._display.say(f"checkpoints: {describe_interval(event.fields)}")
        elif event.kind == "metric_undefined" and self._is_new("undefined", event.attempt):
            self._display.say(
                f"validation.metric {event.fields['metric']} is undefined at step {event.step}: "
                f"{event.fields['reason']}; such a validation ranks no checkpoint and does not "
                "count for validation.patience"
            )
        elif event.kind == "checkpoint_failed":
            self._display.say(f"step {event.step} could not be saved: {problem}")
        elif event.kind == "retention_failed" and self._is_new("retention", event.attempt):
            self._display.say(
                f"older checkpoints cannot be deleted, so the storage fills up: {problem}"
            )

    def _is_new(self, *what: Any) -> bool:
        """Whether this has not been told yet."""
        new = what not in self._told
        self._told.add(what)
        return new

    def _show_validation(self, report: ValidationReport) -> None:
        told = {f"validation_{k}": v for k, v in report.values.items() if v is not None}
        self._trackers.log(report.step, told)
        self._display.validation(report.step, report.values)


def make_metrics_row(reports: Sequence[StepReport], plan: Plan) -> dict[str, Any]:
    """One step's row from all ranks' reports.

    `forward_seconds_skew` is (max − mean) / mean over the ranks' forward passes, in which none
    waits for another (below ZeRO-3): whole steps end together, so their times do not tell a slow
    rank.
    """
    first = min(reports, key=lambda report: report.rank)
    slowest = max(reports, key=lambda report: report.forward_seconds)
    seconds = max(report.seconds for report in reports)
    mean_forward = fmean(report.forward_seconds for report in reports)
    per_second = first.step_tokens / seconds
    peak = (plan.peak_flops_per_rank or 0.0) * len(reports)
    return {
        "step": first.step,
        "attempt": first.attempt,
        "num_ranks": first.num_ranks,
        "loss": finite(sum(report.loss_sum for report in reports) / max(1, first.num_targets)),
        "learning_rate": first.learning_rate,
        "grad_norm": finite(first.grad_norm),
        "applied": first.applied,
        "tokens": first.tokens,
        "seconds": seconds,
        "rows_digest": first.rows_digest,
        "num_targets": first.num_targets,
        "tokens_per_second": per_second,
        "mfu": per_second * plan.flops_per_token_loose / peak if peak else None,
        "mfu_strict": per_second * plan.flops_per_token_strict / peak if peak else None,
        "step_seconds_mean": fmean(report.seconds for report in reports),
        "step_seconds_max": seconds,
        "forward_seconds_mean": mean_forward,
        "forward_seconds_max": slowest.forward_seconds,
        "slowest_rank": slowest.rank,
        "forward_seconds_skew": (slowest.forward_seconds - mean_forward) / mean_forward
        if mean_forward
        else 0.0,
        "data_wait_seconds_mean": fmean(report.data_wait_seconds for report in reports),
        "data_wait_seconds_max": max(report.data_wait_seconds for report in reports),
        "memory_bytes_mean": fmean(report.memory_bytes for report in reports),
        "memory_bytes_max": max(report.memory_bytes for report in reports),
        "time": first.time,
    }
