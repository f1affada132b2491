"""The head-node driver of training: prepare, plan, open the run, start the workers, aggregate what they report.

`train` runs on Ray; `train_locally` runs the same loop in this process alone. Both can be called again to resume.
"""

from __future__ import annotations

import math
import os
import signal
import tempfile
import threading
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

from dray.cluster.connection import WarmNodes, connect, find_nodes_without, head_is_gone, run_workers
from dray.corpus.prepare import Corpus, find, prepare
from dray.doctor import diagnose
from dray.doctor.hangs import find_hang
from dray.doctor.stalls import find_straggler
from dray.errors import Interrupted, RunFailed, StorageFailed, StoreError
from dray.plan import Plan, Shape, local_shape
from dray.processes.signals import stops
from dray.rank.job import Job, not_shared
from dray.redaction import redact
from dray.runs import Run, Trackers, build_trackers, find_resume_checkpoint
from dray.runs.drivers import HEARTBEAT_SECONDS, Driver
from dray.show.progress import Display
from dray.show.report import format_diagnosis
from dray.spec import Resources, Spec
from dray.storage.filesystem import (
    TEMPORARY,
    absolute,
    delete_file,
    exists,
    is_local,
    is_object_store,
    open_filesystem,
    write_whole,
)
from dray.storage.retrying import OUTAGE_SECONDS, patience
from dray.train.start import look, open_run

DRAIN_SECONDS, OBJECT_DRAIN_SECONDS = 0.25, 1.0
"""How often the ranks' records are taken and stored: object stores rewrite an object, and GCS takes one a second."""
MAILBOX_SECONDS = 60.0
"""How long the mailbox, which does next to nothing, may take to answer."""
HEAD_SECONDS, HEAD_LOOK_SECONDS = 25.0, 5.0
"""How long the head may be away, as it is where it is started again with its memory kept, and how often it is looked
for."""
FEWEST_STEPS = 5
UNBEGUN_SECONDS = 2.0
"""How long a run that is to stop waits for a sign of life of its ranks: with none of them there is nothing to save."""
LAST_WORD_SECONDS = 10.0
"""How long a storage is waited for by each of the last words on a run that has failed."""


@dataclass(frozen=True)
class Ended:
    """How a call of `train` ended."""

    run: Run
    status: str
    """`completed` or `early_stopped`; other ends raise."""


def train(
    spec: Spec,
    *,
    storage: str = "./runs",
    run_name: str | None = None,
    fork: str | None = None,
    address: str | None = None,
    verbose: bool = False,
    display: Display | None = None,
) -> Ended:
    """Run `spec` on Ray, or resume it.

    Raises UserError for what the caller can mend (nothing is written), RunFailed when the workers cannot go on, and
    Interrupted when a person stopped it (its state is saved).
    """
    display = display or Display()
    start = look(spec, storage, run_name, fork)
    resources = spec.resources
    wanted = resources.max_workers * resources.cpus_per_worker + resources.reader_cpus
    with connect(address, num_cpus=wanted, cpus_per_worker=resources.cpus_per_worker,
                 gpus_per_worker=resources.gpus_per_worker, verbose=verbose) as connection:
        if not connection.local:
            _check_nodes(absolute(storage), spec)
        begun = time.monotonic()

        def prepared(spec: Spec) -> Corpus:
            corpus = prepare(spec, storage, display.say)
            for line in corpus.describe() if corpus.is_new else ():
                display.say(line)
            return corpus

        with _RayLauncher(resources, is_local=connection.local) as launcher:
            run, job = open_run(start, connection.shape, prepared, display.say)
            run.log_event("driver_started", seconds_to_corpus=time.monotonic() - begun)
            return _drive(run, job, display, launcher)


def train_locally(
    spec: Spec, *, storage: str = "./runs", run_name: str | None = None, corpus: Corpus | None = None,
    shape: Shape | None = None, display: Display | None = None,
) -> Ended:
    """Run or resume `spec` in this process: one rank, no Ray. The corpus must have been prepared, or be given."""
    display = display or Display()
    spec = spec.model_copy(update={"resources": spec.resources.model_copy(update={"workers": 1})})

    def prepared(spec: Spec) -> Corpus:
        found = find(spec, storage)
        if found is None:
            raise RunFailed("the corpus is not prepared", "run `dray prepare` first; preparing needs Ray")
        return found

    run, job = open_run(look(spec, storage, run_name), shape or local_shape(), prepared, display.say, corpus=corpus,
                        with_ray=False)
    return _drive(run, job, display, _LocalLauncher())


def _drive(run: Run, job: Job, display: Display, launcher: _RayLauncher | _LocalLauncher) -> Ended:
    """Start the workers, follow them to their end, and write down how it was."""
    spec, plan = job.spec, job.plan
    num_steps = plan.num_steps or 0
    newest = find_resume_checkpoint(run)
    done = newest.step if newest else 0
    if done >= num_steps:
        display.say(f"{run.name} is complete at step {done}; {_what_would_go_on(spec)}")
        return Ended(run, "completed")
    if done:
        display.say(f"{run.name} goes on from step {done}")
    driver = run.take_over()
    job, heart = replace(job, driver=driver.number), _Heart(run, driver)
    trackers = build_trackers(run, spec)
    recorder = Recorder(run, plan, trackers, display)
    run.set_status("running", driver=driver)
    reason = ""
    run.update(compressors=job.manifest.validation_compressors)
    status = "failed"
    try:
        with display.steps(num_steps, done), heart:
            launcher.run(job, recorder)
        status = recorder.ended or "failed"
        if status == "interrupted":
            reason = f"stopped by {signal.Signals(recorder.stopped_by).name}"
    except (RunFailed, StorageFailed) as error:
        reason = str(error)
        raise RunFailed(reason, _explain(run, reason)) from error
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        reason = redact(str(error) or type(error).__name__)
        run.log_event(status, reason=reason)
        raise
    finally:
        with _last_words(status):
            run.set_status("completed" if status == "early_stopped" else status, reason, driver)
        with _last_words(status):
            run.release(driver)
        trackers.finish(status)
    if status == "interrupted":
        saved = run.latest_checkpoint()
        raise Interrupted(saved.step if saved else 0, recorder.stopped_by)
    run.export_metrics_parquet()
    return Ended(run, status)


def _explain(run: Run, reason: str) -> str:
    """The diagnosis of a failed run, which must not stand in the way of the failure itself."""
    with patience(LAST_WORD_SECONDS):
        try:
            diagnosis = diagnose(run, reason=reason)
            cause, text = str(diagnosis.fault), format_diagnosis(diagnosis)
        except Exception as problem:
            cause, text = "unknown", f"no diagnosis could be made ({type(problem).__name__}: {problem})"
        with suppress(StorageFailed):
            run.log_event("failed", reason=reason, cause=cause)
    return text


@contextmanager
def _last_words(status: str) -> Iterator[None]:
    """Where a run has failed its end is written down if that can be done soon: the failure itself is told anyway."""
    if status != "failed":
        yield
        return
    with patience(LAST_WORD_SECONDS), suppress(StorageFailed):
        yield


class _Heart:
    """Gives the driver's signs of life; a driver that has been replaced by another is interrupted."""

    def __init__(self, run: Run, driver: Driver) -> None:
        self._run, self._driver, self._ended = run, driver, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heart", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                self._run.heartbeat(self._driver)
            except OSError:  # StorageFailed too, which is a StoreError besides: the next beat may come through
                continue
            except StoreError:  # taken over: what this driver's attempts do from now on does not count
                os.kill(os.getpid(), signal.SIGINT)
                return


def _what_would_go_on(spec: Spec) -> str:
    """What a person can do with a run that has done all its steps."""
    if spec.may_go_on_when_complete:
        return "a longer duration would go on"
    schedule = spec.schedule.name
    hint = "" if schedule == "wsd" else ", and with schedule.decay_steps given from the start it would not"
    return (f"its {schedule} schedule ends there{hint}: train on from its weights with another duration and "
            "--fork NEW_NAME")


def _check_nodes(storage: str, spec: Spec) -> None:
    """Raise StorageNotShared if a node that may hold a rank sees another storage than this process does."""
    filesystem, path = open_filesystem(storage)
    if is_object_store(filesystem):
        return
    existing = path
    while not exists(filesystem, existing):
        existing = existing.rpartition("/")[0] or "/"
    # Beside nothing that a run has: a storage that does not exist yet is not made by a look at it.
    token = f"{existing.rstrip('/')}/{TEMPORARY}shared-{uuid.uuid4().hex}"
    write_whole(filesystem, token, lambda stream: stream.write(b"dray"), durable=False)
    try:
        sees = partial(_sees, storage, token)
        blind = find_nodes_without(sees, spec.resources.cpus_per_worker, spec.resources.gpus_per_worker)
    finally:
        delete_file(filesystem, token)
    if blind:
        raise not_shared(storage, blind)


def _sees(storage: str, path: str) -> bool:
    """Whether the file is there for the node that this runs on."""
    try:
        return exists(open_filesystem(storage)[0], path)
    except OSError:
        return False


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


class _LocalLauncher:
    """The ranks' loop in this process, for tests, notebooks and machines without Ray."""

    def run(self, job: Job, recorder: Recorder) -> None:
        import torch

        from dray.processes.heap import prepare_process
        from dray.rank.group import build_ranks, join_alone
        from dray.rank.job import begin_attempt, make_attempt, make_stream
        from dray.rank.loop import train_rank
        from dray.rank.pulse import Pulse

        class Direct:
            def send(self, record: dict[str, Any]) -> None:
                recorder.take([record])

            def stop_requested(self) -> bool:
                return False

            def notice_given(self) -> bool:
                return False

            def wait_stored(self) -> None:
                recorder.wait_stored()

            def flush(self) -> None:
                pass

        device = torch.device("cuda" if torch.cuda.is_available() and job.spec.resources.gpus_per_worker else "cpu")
        prepare_process(job.spec.resources.cpus_per_worker)
        join_alone(device)
        ranks = build_ranks(device, timeout_seconds=1800)
        attempt = make_attempt(job, begin_attempt(job, ranks.num_ranks))
        stream = make_stream(job, attempt)
        recorder.ended = train_rank(job, ranks, attempt, Direct(), stream=stream, blocks=stream.blocks(ranks.rank),
                                    pulse=Pulse(ranks.rank))
        recorder.wait_stored()


class _RayLauncher:
    """The ranks' loop on Ray Train workers, fed by Ray Data, reporting through an actor on the head node.

    The actor is started at once: its node's fork server imports while the driver looks for the model and the rows.
    """

    def __init__(self, resources: Resources, *, is_local: bool) -> None:
        from dray.train.worker import build_mailbox

        self._is_local, self._begun = is_local, False
        self._warm = WarmNodes(resources.cpus_per_worker, resources.gpus_per_worker)
        self._mailbox = build_mailbox(self._warm.environment)

    def __enter__(self) -> _RayLauncher:
        return self

    def __exit__(self, *error: object) -> None:
        """End what was started for a run that was refused or is complete, where Ray outlives it."""
        import ray

        if not self._begun:
            ray.kill(self._mailbox)

    def run(self, job: Job, recorder: Recorder) -> None:
        import ray

        from dray.train.worker import end_hang, end_workers

        self._begun = True
        warm, mailbox = self._warm, self._mailbox
        failure: list[BaseException] = []
        thread = _start_workers(job, mailbox, failure, is_local=self._is_local)
        on_disk = is_local(Run.open(job.storage, job.run_name).filesystem)
        drain_seconds = DRAIN_SECONDS if on_disk else OBJECT_DRAIN_SECONDS
        taken, stored, ended_hang, stopping_since = 0, 0, 0, math.inf
        try:
            with stops(noted=True) as wishes:
                while True:
                    alive = thread.is_alive()
                    warm.look()
                    records, beats = _answer(mailbox.take.remote(stored))
                    taken += len(records)
                    recorder.take(records)
                    stored = taken if recorder.is_stored else stored
                    hang = find_hang(beats, recorder.step_seconds, job.spec.watchdog)
                    attempt = max((beat["attempt"] for beat, _ in beats.values()), default=0)
                    if hang and attempt > ended_hang:
                        ended_hang = attempt
                        recorder.say(f"hung: {hang.reason}")
                        end_hang(Run.open(job.storage, job.run_name), hang, beats)
                    if wishes and stopping_since == math.inf:
                        stopping_since = time.monotonic()
                        recorder.stop(wishes.numbers[0])
                        mailbox.request_stop.remote()
                    if alive and not beats and recorder.ended is None and (
                            time.monotonic() - stopping_since > UNBEGUN_SECONDS):
                        recorder.ended = "interrupted"  # there are no ranks, and so nothing to save
                        end_workers(mailbox)
                        return
                    if not alive and (failure or recorder.is_stored):
                        break
                    thread.join(drain_seconds)
        except ray.exceptions.RayError as error:  # the ranks report through it: without it they cannot be followed
            lost = RunFailed("the head of the Ray cluster is gone" if head_is_gone() else
                             f"the mailbox on the head was lost: {error}")
            if not wishes:
                raise lost from error
            recorder.give_up_saving(lost)
            return
        except (StorageFailed, KeyboardInterrupt):
            end_workers(mailbox)
            raise
        ray.kill(mailbox)  # where Ray outlives this call
        if failure and wishes:
            recorder.give_up_saving(failure[0])
        elif failure:
            raise failure[0]


def _answer(asked: Any) -> Any:
    """What the mailbox answers. Raises RayError when it takes too long, sooner where the head is gone: once that has
    been asked in vain for a minute, Ray ends this process without a word of dray's."""
    import ray

    begun, head_seen = time.monotonic(), time.monotonic()
    while True:
        try:
            return ray.get(asked, timeout=HEAD_LOOK_SECONDS)
        except ray.exceptions.GetTimeoutError:
            if not head_is_gone():
                head_seen = time.monotonic()
            if time.monotonic() - head_seen > HEAD_SECONDS or time.monotonic() - begun > MAILBOX_SECONDS:
                raise


def _start_workers(job: Job, mailbox: Any, failure: list[BaseException], *, is_local: bool) -> threading.Thread:
    """Start the worker group in a thread, which puts there what it ends with if that is an error."""
    from dray.train.worker import build_data_config, build_recovery, run_rank

    resources = job.spec.resources

    def follow() -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="dray-") as scratch:
                run_workers(
                    run_rank, {"job": job, "mailbox": mailbox}, datasets={"rows": job},
                    data_config=build_data_config(), num_workers=resources.workers,
                    cpus_per_worker=resources.cpus_per_worker, gpus_per_worker=resources.gpus_per_worker,
                    recovery=build_recovery(job, mailbox), name=job.run_name, scratch=scratch,
                    is_local=is_local,
                )
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=follow, name="workers", daemon=True)
    thread.start()
    return thread
