"""A run folder → why the run ended as it did. What is damaged or missing makes a diagnosis poorer,
never impossible."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import pyarrow as pa

from dray.doctor.cases import OWN_FILE, Case, make_cases, make_seconds, make_whole, shorten
from dray.doctor.faults import AGAIN, Finding, Values, classify, find_first
from dray.doctor.stalls import (
    Frame,
    Stall,
    all_wait_for_rows,
    find_stall,
    find_straggler,
    innermost_own,
    make_loop_stack,
    missing_ranks,
)
from dray.errors import Cause, CheckpointsLost, DrayError
from dray.runs import Run, find_resume_checkpoint
from dray.runs.evidence import load_beats, load_failures, load_log, load_stacks
from dray.runs.records import AttemptRecord

_COMPILED_AT = re.compile(r"\[/\S*/(?=gloo/transport)")
EXAMINED_ATTEMPTS = 3
LOG_LINES, STACK_LINES, TRACEBACK_LINES = 12, 8, 12
SILENT_SECONDS, SILENT_STEPS = 300.0, 30.0
"""A run that is said to run and has not made a step for so long, and so many times a usual step,
hangs."""


@dataclass(frozen=True)
class Exhibit:
    """A piece of evidence: what it is, where it was found, and its lines."""

    kind: str
    source: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Past:
    """A failed attempt in a few words."""

    attempt: int
    fault: Cause
    rank: int | None
    step: int | None
    cause: str


@dataclass(frozen=True)
class Diagnosis:
    """Why a run ended as it did. `rank` failed first (none: the driver or nobody), a resume starts
    at `resume_step`."""

    run: str
    status: str
    fault: Cause
    cause: str
    way_out: str
    attempt: int | None = None
    rank: int | None = None
    node: str = ""
    pid: int | None = None
    step: int | None = None
    error_type: str = ""
    message: str = ""
    resume_step: int | None = None
    exhibits: tuple[Exhibit, ...] = ()
    others: tuple[str, ...] = ()
    """What the other ranks saw, a line each."""
    history: tuple[Past, ...] = ()
    """The attempts that failed, by number."""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The diagnosis as plain values; the class is called `class`."""
        tree = asdict(self)
        tree = {
            "run": tree.pop("run"),
            "status": tree.pop("status"),
            "class": str(tree.pop("fault")),
            **tree,
        }
        for past in tree["history"]:
            past["class"] = str(past.pop("fault"))
        return tree


def diagnose(run: Run, now: float | None = None, reason: str = "") -> Diagnosis:
    """Why the run ended as it did, or stands where it stands. `now`: seconds since 1970; `reason`:
    why its driver, which asks, gives it up: what it could not write down is told all the same."""
    return _Examination(run, time.time() if now is None else now, reason).diagnose()


_STOPPERS = {
    "SIGINT": "a person stopped the run (Ctrl-C)",
    "SIGTERM": "the run was asked to end (SIGTERM: `kill`, `docker stop`, a batch system at its "
    "time limit, Kubernetes taking the pod away); it saved its state",
    "SIGHUP": "the terminal of the run was closed (SIGHUP; `nohup` or tmux keep a run alive); it "
    "saved its state",
}


class _Examination:
    """What was read of a run, and the questions put to it."""

    def __init__(self, run: Run, now: float, reason: str) -> None:
        self.run, self.now, self.reason = run, now, reason
        self.notes: list[str] = []
        self.record: dict[str, Any] = self._read("run.json", run.record, {})
        self.status: str = (
            "failed" if reason else self._read("the status", lambda: run.status, "unknown")
        )
        self.attempts: list[AttemptRecord] = self._read("the attempts", run.attempts, [])
        self.rows: list[dict[str, Any]] = self._read("the metrics", run.metrics, [])
        self.events: list[dict[str, Any]] = self._read("the events", run.events, [])
        self.failures: list[dict[str, Any]] = self._read(
            "the failures", lambda: load_failures(run), []
        )
        self._note_undefined_metric()
        self.checkpoints_lost = ""
        self.resume_step: int | None = self._read("the checkpoints", self._find_resume_step, None)
        self.values = self._make_values()
        self.history: tuple[Past, ...] = ()
        self.history = tuple(self._make_past(failure) for failure in self.failures)

    def _read(self, what: str, read: Any, fallback: Any) -> Any:
        try:
            return read()
        except (DrayError, OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            self.notes.append(f"{what} cannot be read: {shorten(str(error))}")
            return fallback

    def _note_undefined_metric(self) -> None:
        """A run whose checkpoints nothing ranks is not ill, but rarely what was wanted."""
        told = [event for event in self.events if event.get("kind") == "metric_undefined"]
        for event in told[-1:]:
            self.notes.append(
                f"validation.metric {event.get('metric')} was undefined at step "
                f"{event.get('step')}: {event.get('reason')}; such a validation ranks no checkpoint"
            )

    def _find_resume_step(self) -> int | None:
        for info in self.run.checkpoints(verified_only=False):
            if not info.verified and not info.problem.startswith("undone"):
                self.notes.append(
                    f"the checkpoint of step {info.step} (attempt {info.attempt}) is not used: "
                    f"{info.problem}"
                )
        try:
            newest = find_resume_checkpoint(self.run)
        except CheckpointsLost as error:
            self.checkpoints_lost = f"{error.rule}: {error.way_out}"
            return None
        return newest.step if newest else None

    def _make_values(self) -> Values:
        """What the sentences of the rules are filled with, from plan and spec; either may be
        missing."""
        plan = self._read("the plan", self.run.plan, {})
        batch = plan.get("batch") if isinstance(plan.get("batch"), dict) else {}
        values = Values(
            storage=self.run.uri,
            corpus=self._read("the corpus' place", lambda: self.run.corpus, "") or "unknown",
            resume=self._resume_text(),
            resume_step=self.resume_step or 0,
            micro_rows=next((attempt.micro_rows for attempt in self.attempts[-1:]), None)
            or batch.get("micro_rows", "unknown"),
            **({"checkpoints_lost": self.checkpoints_lost} if self.checkpoints_lost else {}),
            **{
                name: plan[name]
                for name in (
                    "zero_stage",
                    "offload",
                    "activation_checkpointing",
                    "on_gpu",
                    "precision",
                )
                if name in plan
            },
        )
        spec = self._read("the spec", self.run.spec, None)
        if spec is not None:
            values |= {
                "learning_rate": spec.optimizer.learning_rate,
                "warmup_steps": spec.schedule.warmup_steps,
                "keep_last": spec.checkpoint.keep_last,
                "workers": spec.resources.workers,
            }
        return Values(values)

    def _resume_text(self) -> str:
        if self.checkpoints_lost:
            return "no step: none of its checkpoints can be used"
        return (
            f"step {self.resume_step}"
            if self.resume_step
            else "the beginning (nothing was committed)"
        )

    def _make_past(self, failure: Mapping[str, Any]) -> Past:
        """Of an older attempt its document alone is asked: stacks and logs of many ranks take long
        to read."""
        attempt = int(failure["attempt"])
        if attempt > len(self.attempts) - EXAMINED_ATTEMPTS:
            found = self._examine_failure(failure)
            return Past(attempt, found.fault, found.rank, found.step, found.cause)
        first = find_first(make_cases(failure))
        return Past(
            attempt,
            classify(failure),
            first.case.rank if first else None,
            make_whole(failure.get("step")),
            first.cause(self.values) if first else "",
        )

    # ---- which question is the right one --------------------------------------------------------

    def diagnose(self) -> Diagnosis:
        newest = max((attempt.number for attempt in self.attempts), default=0)
        failure = (
            self.failures[-1] if self.failures and self.failures[-1]["attempt"] >= newest else None
        )
        if self.status in ("completed", "created") and failure is None:
            return self._examine_numbers() or self._healthy()
        ended = ("completed", "stopped", "interrupted")
        if failure is not None and self.record.get("status") not in ended:
            return self._examine_failure(failure)
        if self.status == "failed":
            return self._examine_failure(
                {"attempt": newest, "ranks": [], "message": self._find_reason()}
            )
        if self.status in ("stopped", "interrupted"):
            return self._interrupted()
        if self.status == "running":
            return (
                self._examine_silence()
                or self._examine_numbers()
                or self._examine_pace()
                or self._healthy()
            )
        return self._examine_numbers() or self._healthy()

    def _find_reason(self) -> str:
        """Why a run failed that left no document: what its driver says, or wrote down."""
        ends = [attempt.reason for attempt in self.attempts[-1:]]
        told = [
            str(event.get("reason") or "") for event in self.events if event.get("kind") == "failed"
        ]
        texts = (self.reason, str(self.record.get("reason") or ""), *ends, *told[-1:])
        return next((text for text in texts if text), "")

    def _make(self, fault: Cause, cause: str, way_out: str, **fields: Any) -> Diagnosis:
        return Diagnosis(
            run=self.run.name,
            status=self.status,
            fault=fault,
            cause=cause,
            way_out=way_out,
            resume_step=self.resume_step,
            history=self.history,
            notes=tuple(self.notes),
            **fields,
        )

    def _healthy(self) -> Diagnosis:
        step = int(self.rows[-1]["step"]) if self.rows else self.resume_step or 0
        cause = {
            "created": "the run has not begun",
            "completed": f"the run is complete at step {step}",
            "running": f"the run goes on, at step {step}",
        }.get(self.status, f"nothing is wrong at step {step}")
        if self.status != "running" and (slow := find_straggler(self.rows)):
            self.notes.append(
                f"{_called(slow.rank)} took {slow.ratio:.1f} times as long as the others at the end"
            )
        way_out = (
            "start it with `dray train`" if self.status == "created" else "nothing is to be done"
        )
        return self._make(Cause.HEALTHY, cause, way_out, step=step)

    def _tell_stop(self) -> str:
        """Who stopped the run: by the signal in its record, or its caller."""
        reason = str(self.record.get("reason") or "")
        if self.status == "stopped":
            return f"the program that trained it stopped the run: {reason}"
        stoppers = (text for name, text in _STOPPERS.items() if name in reason)
        return next(stoppers, "a person stopped the run")

    def _interrupted(self) -> Diagnosis:
        way_out, where = (
            self._again(),
            {"attempt": self._newest_attempt(), "step": self._last_step()},
        )
        if self.record.get("status") != "running":
            return self._make(
                Cause.INTERRUPTED,
                self._tell_stop(),
                way_out,
                **where,
            )
        driver = self.record.get("driver") or {}
        cause = (
            f"the driver ended without a word: process {driver.get('pid', '?')} on "
            f"{driver.get('host', '?')} was killed, its session was closed, or the machine went "
            "down"
        )
        return self._make(
            Cause.INTERRUPTED,
            cause,
            way_out,
            node=str(driver.get("host", "")),
            pid=driver.get("pid"),
            exhibits=self._last_events(),
            **where,
        )

    # ---- a failed attempt -----------------------------------------------------------------------

    def _examine_failure(self, failure: Mapping[str, Any]) -> Diagnosis:
        attempt = int(failure["attempt"])
        cases = self._find_cases(failure)
        first = find_first(cases)
        if first is None:
            fault = classify(failure)
            if fault is Cause.UNKNOWN:
                return self._make(
                    fault,
                    "the attempt failed and nothing says why",
                    "start it again with --verbose, and look into Ray's logs",
                    attempt=attempt,
                    step=make_whole(failure.get("step")),
                    exhibits=self._last_events(),
                )
            first = find_first([Case(failure=failure, step=make_whole(failure.get("step")))])
            assert first is not None
        if first.fault is Cause.HANG or (first.case.symptom and first.fault is Cause.KILLED):
            found = self._examine_hang(attempt, first, cases)
            if found is not None:
                return found
        return self._tell(attempt, first, cases)

    def _find_cases(self, failure: Mapping[str, Any]) -> list[Case]:
        attempt = int(failure["attempt"])
        ranks = [
            record.get("rank")
            for record in failure.get("ranks") or []
            if isinstance(record, Mapping)
        ]
        logs = {rank: load_log(self.run, attempt, rank) for rank in ranks if isinstance(rank, int)}
        return make_cases(failure, logs)

    def _tell(
        self, attempt: int, first: Finding, cases: Sequence[Case], **changes: Any
    ) -> Diagnosis:
        """The diagnosis of what came first, with its evidence and what the others saw."""
        case = first.case
        step = case.step if case.step is not None else make_whole(case.failure.get("step"))
        told = self._make(
            first.fault,
            first.cause(self.values),
            first.way_out(self.values),
            attempt=attempt,
            rank=case.rank,
            node=case.node,
            pid=case.pid,
            step=step,
            error_type=case.error_type,
            message=case.message,
            exhibits=self._show_rank(attempt, case),
            others=_tell_others(cases, case.rank),
        )
        if first.fault is Cause.NUMERICS:
            told = replace(told, exhibits=told.exhibits + self._show_numbers())
        return replace(told, **changes)

    def _show_rank(self, attempt: int, case: Case) -> tuple[Exhibit, ...]:
        if case.rank is None:
            return _exhibits(
                ("traceback", "the driver", case.traceback.splitlines()[-TRACEBACK_LINES:]),
                ("message", "the driver", case.message.splitlines()[:TRACEBACK_LINES]),
            )
        name, rank = _called(case.rank), case.rank
        stack = make_loop_stack(load_stacks(self.run, attempt).get(rank, ""))
        beat = load_beats(self.run, attempt).get(rank, {})
        return _exhibits(
            ("traceback", name, case.traceback.splitlines()[-TRACEBACK_LINES:]),
            (
                "message",
                name,
                [] if case.traceback else case.message.splitlines()[:TRACEBACK_LINES],
            ),
            ("log", name, load_log(self.run, attempt, rank, LOG_LINES)),
            ("stack", name, [format_frame(frame) for frame in stack[:STACK_LINES]]),
            ("heartbeat", name, [_format_beat(beat)] if beat else []),
        )

    def _examine_hang(
        self, attempt: int, first: Finding, cases: Sequence[Case]
    ) -> Diagnosis | None:
        """Which rank the others waited for, or lost. None if nothing tells it from the others."""
        stacks, beats = load_stacks(self.run, attempt), load_beats(self.run, attempt)
        said = {
            case.rank: {"step": case.step, "time": case.time, "phase": case.phase or None}
            for case in cases
            if case.rank is not None and case.step is not None
        }
        beats = {**said, **beats}
        if first.fault is Cause.HANG and len(beats) > 1 and all_wait_for_rows(beats, stacks):
            return self._tell(
                attempt,
                first,
                cases,
                fault=Cause.DATA,
                rank=None,
                node="",
                pid=None,
                cause="every rank waits for rows: the reader stands still",
                way_out="leave a CPU for reading (resources.reader_cpus) and check the corpus' "
                f"storage ({self.values['corpus']})",
            )
        num_ranks = next((item.num_ranks for item in self.attempts if item.number == attempt), 0)
        silent = set(range(num_ranks)) - {case.rank for case in cases}
        if first.fault is Cause.KILLED:
            stall = (
                Stall(tuple(sorted(silent)), "it said nothing")
                if silent and len(silent) < num_ranks
                else None
            )
        else:
            watched: dict[str, Any] = next(
                (
                    event
                    for event in reversed(self.events)
                    if event.get("kind") == "hang" and event.get("attempt") == attempt
                ),
                {},
            )
            missing = sorted({rank for case in cases for rank in missing_ranks(case.text)})
            ended = [case.rank for case in cases if case.lost and case.rank is not None]
            stall = find_stall(
                stacks,
                beats,
                named=watched.get("ranks") or missing,
                ended=ended,
                num_ranks=num_ranks,
            )
            if stall and watched.get("reason"):
                stall = replace(stall, sign=str(watched["reason"]))
        return (
            self._tell_stall(attempt, first, cases, stall, beats=beats, stacks=stacks)
            if stall
            else None
        )

    def _tell_stall(
        self,
        attempt: int,
        first: Finding,
        cases: Sequence[Case],
        stall: Stall,
        *,
        beats: Mapping[int, Mapping[str, Any]],
        stacks: Mapping[int, str],
    ) -> Diagnosis:
        rank = stall.ranks[0]
        case = next(
            (case for case in cases if case.rank == rank),
            Case(rank=rank, failure=first.case.failure),
        )
        step = (
            stall.step
            if stall.step is not None
            else case.step
            if case.step is not None
            else first.case.step
        )
        frame = stall.frame or innermost_own(make_loop_stack(stacks.get(rank, "")))
        at = f" at step {step}" if step is not None else ""
        if first.fault is Cause.KILLED:
            cause = (
                f"{_called(rank)} went away without a word{at}; the others lost their "
                "connections to it"
            )
            way_out = first.way_out(self.values)
        else:
            phase = stall.phase or beats.get(rank, {}).get("phase")
            stands = f" in {phase}" if phase else ""
            stands += f", {format_frame(frame)}" if frame else ""
            cause = f"{_called(rank)} stood still{at}{stands}: {stall.sign}"
            way_out = self._way_out_of_hang(frame)
        node = case.node or str(
            beats.get(rank, {}).get("node") or beats.get(rank, {}).get("host") or ""
        )
        waiting = [
            f"{_called(other)}: waits in {format_frame(place)}"
            for other, text in sorted(stacks.items())
            if other != rank and (place := innermost_own(make_loop_stack(text)))
        ]
        return self._tell(
            attempt,
            first,
            cases,
            cause=cause,
            way_out=way_out,
            rank=rank,
            step=step,
            node=node,
            pid=case.pid or beats.get(rank, {}).get("pid"),
            error_type=case.error_type,
            message=case.message,
            exhibits=self._show_rank(attempt, case),
            others=_tell_others(cases, rank) or tuple(waiting),
        )

    # ---- a run that goes on, or went to its end -------------------------------------------------

    def _examine_silence(self) -> Diagnosis | None:
        """Whether a run that is said to run has made no step for too long."""
        attempt = self._newest_attempt()
        if attempt is None:
            return None
        times = [make_seconds(row.get("time")) for row in self.rows[-1:]]
        times += [make_seconds(item.started) for item in self.attempts[-1:]]
        last = max((at for at in times if at is not None), default=None)
        usual = median(
            [float(row["seconds"]) for row in self.rows[-50:] if row.get("seconds")] or [0.0]
        )
        if last is None or self.now - last < max(SILENT_SECONDS, SILENT_STEPS * usual):
            return None
        stacks, beats = load_stacks(self.run, attempt), load_beats(self.run, attempt)
        stall = find_stall(stacks, beats)
        quiet = f"no step has been made for {self.now - last:,.0f} s"
        if stall is None:
            return self._make(
                Cause.HANG,
                f"{quiet}, and no rank stands out",
                f"see whether its driver still lives (`ray status`), and stop it; {self._again()}",
                attempt=attempt,
                step=self._last_step(),
                exhibits=self._last_events(),
            )
        rank, place = stall.ranks[0], f", {format_frame(stall.frame)}" if stall.frame else ""
        beat = beats.get(rank, {})
        return self._make(
            Cause.HANG,
            f"{quiet}; {_called(rank)} stands in {stall.phase or 'an unknown phase'}{place}: "
            f"{stall.sign}",
            self._way_out_of_hang(stall.frame),
            attempt=attempt,
            rank=rank,
            step=stall.step,
            node=str(beat.get("node") or beat.get("host") or ""),
            pid=beat.get("pid"),
            exhibits=self._show_rank(attempt, Case(rank=rank)),
        )

    def _examine_numbers(self) -> Diagnosis | None:
        """Whether the newest losses are not finite: such a run trains nothing, however long it goes
        on."""
        if not self.rows or _finite(self.rows[-1]):
            return None
        first = len(self.rows) - 1
        while first and not _finite(self.rows[first - 1]):
            first -= 1
        since = int(self.rows[first]["step"])
        way_out = find_first([Case(error_type="FloatingPointError")])
        assert way_out is not None
        return self._make(
            Cause.NUMERICS,
            f"the loss or gradient norm is not finite from step {since} on",
            way_out.way_out(self.values),
            step=since,
            attempt=self._newest_attempt(),
            exhibits=self._show_numbers(),
        )

    def _examine_pace(self) -> Diagnosis | None:
        slow = find_straggler(self.rows)
        if slow is None:
            return None
        beats = load_beats(self.run, self._newest_attempt() or 0)
        node = str(beats.get(slow.rank, {}).get("node") or "") if slow.rank is not None else ""
        cause = (
            f"{_called(slow.rank)} takes {slow.ratio:.1f} times as long as the others for its "
            f"forward passes, in {slow.num_steps} of the last steps"
        )
        way_out = (
            f"look on its node{f' {node}' if node else ''} for other programs, heat and clock "
            "limits (`top`, `nvidia-smi -q -d PERFORMANCE`), or take it out of the cluster; "
            f"{self._again()}"
        )
        times = [
            f"step {row['step']}: forward {_number(row.get('forward_seconds_mean'))} s on the "
            f"mean, {_number(row.get('forward_seconds_max'))} s at the slowest"
            for row in self.rows[-5:]
        ]
        return self._make(
            Cause.STRAGGLER,
            cause,
            way_out,
            attempt=self._newest_attempt(),
            rank=slow.rank,
            node=node,
            step=self._last_step(),
            exhibits=_exhibits(("metrics", "the last steps", times)),
        )

    # ---- what was seen --------------------------------------------------------------------------

    def _again(self) -> str:
        return AGAIN.format_map(self.values)

    def _way_out_of_hang(self, frame: Frame | None) -> str:
        if frame and not OWN_FILE.search(frame[0]):
            return f"mend what waits in {format_frame(frame)}; {self._again()}"
        return (
            "look on its node for a stopped process, a dead mount or a failing card (`dmesg "
            f"-T`); {self._again()}"
        )

    def _newest_attempt(self) -> int | None:
        return self.attempts[-1].number if self.attempts else None

    def _last_step(self) -> int | None:
        return int(self.rows[-1]["step"]) if self.rows else None

    def _last_events(self) -> tuple[Exhibit, ...]:
        lines = [
            " ".join(f"{key}={shorten(str(value), 80)}" for key, value in event.items())
            for event in self.events[-5:]
        ]
        return _exhibits(("events", "the driver", lines))

    def _show_numbers(self) -> tuple[Exhibit, ...]:
        rows = [
            f"step {row['step']}: loss {_number(row.get('loss'))}, gradient norm "
            f"{_number(row.get('grad_norm'))}, learning rate {_number(row.get('learning_rate'))}"
            for row in self.rows[-6:]
        ]
        skipped = [
            f"step {event.get('step')}: {event.get('reason') or event['kind']}"
            for event in self.events
            if event.get("kind") in ("step_skipped", "loss_spike")
        ]
        return _exhibits(
            ("metrics", "the last steps", rows), ("events", "skipped steps", skipped[-5:])
        )


def _tell_others(cases: Sequence[Case], rank: int | None) -> tuple[str, ...]:
    """What the other ranks saw, a line each; where gloo was compiled is nobody's concern."""
    return tuple(
        f"{_called(case.rank)}: "
        f"{shorten(_COMPILED_AT.sub('[', case.error) or case.exit or 'no word', 140)}"
        for case in cases
        if case.rank != rank
    )


def _exhibits(*pieces: tuple[str, str, Sequence[str]]) -> tuple[Exhibit, ...]:
    return tuple(
        Exhibit(kind, source, tuple(lines)) for kind, source, lines in pieces if any(lines)
    )


def _called(rank: int | None) -> str:
    return "a rank" if rank is None else f"rank {rank}"


def format_frame(frame: Frame) -> str:
    """A frame in a line."""
    return f"{frame[2]} ({frame[0]}, line {frame[1]})"


def _format_beat(beat: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {beat[name]}" for name in ("step", "phase", "time") if beat.get(name) is not None
    )


def _finite(row: Mapping[str, Any]) -> bool:
    """Whether a step's numbers are finite; records have none where they were not, and no word on
    those not measured."""
    numbers = [row[name] for name in ("loss", "grad_norm") if name in row]
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in numbers)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "not finite"
