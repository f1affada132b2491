"""A rank on Ray: the loop of `worker.py` fed by Ray Data and reporting through an actor on the head node.

Ray imports this file in its controller and data processes too: torch is imported by the ranks alone.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa

from dray.cluster.connection import find_lost_nodes, max_wait_seconds
from dray.corpus.stream import RowStream, build_dataset, iterate_windows
from dray.doctor import classify
from dray.doctor.budget import Budget, Decision, SmallerBatch
from dray.doctor.hangs import Hang, agreement_seconds
from dray.errors import Cause, CheckpointsLost, RunFailed
from dray.order import LeftOut
from dray.processes.signals import is_noted
from dray.rank.job import Attempt, Job, begin_attempt, check_shared, make_attempt, make_stream
from dray.rank.pulse import STACK_SIGNAL, Pulse
from dray.runs import Run, find_resume_checkpoint
from dray.runs.evidence import make_rank_failure, read_tail, save_beats, save_failure, save_log, save_stacks, unwrap
from dray.runs.row_log import now, run_together
from dray.train.mailbox import Beats, Mailbox, pace

SEND_EVERY_SECONDS = 0.2
LEAVE_SECONDS = 120.0  # in which a group that is to be resized must have saved
STORED_SECONDS = 180.0
"""How long a save waits for the driver to store the metrics: longer than a storage that fails is waited for."""
BEAT_EVERY_SECONDS = 0.5
GRACE_SECONDS = 1.0
"""In which the ranks that fail with the first one say so; where all have, nobody waits."""
PREFETCH_BLOCKS = 2


def preload() -> None:
    """Import what Ray's own helpers of training use, for the fork server; no torch.

    Ray draws its ids from a generator that must not have been used before the fork, or all children draw the same ones;
    and it draws one for every class of actors that is imported.
    """
    import ray.actor

    class ActorClassID(ray.ActorClassID):  # type: ignore[misc]
        @classmethod
        def from_random(cls) -> Any:
            return ray.ActorClassID(os.urandom(ray.ActorClassID.size()))

    with mock.patch.object(ray.actor, "ActorClassID", ActorClassID):
        for name in ("ray.data", "ray.train.v2._internal.execution.controller", "pyarrow.dataset", "pyarrow.fs",
                     "ray.train.v2.api.data_parallel_trainer", "pyarrow.parquet"):
            import_module(name)


def build_mailbox(environment: dict[str, str]) -> Any:
    """The actor beside the driver that carries records and heartbeats to it, and a wish to stop to the ranks; with a
    runtime environment of its own."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here, runtime_env=environment)(Mailbox).remote()


def end_workers(mailbox: Any) -> None:
    """End what a driver that cannot go on leaves behind, where Ray outlives it: the workers end with Ray Train's
    controller, which owns them."""
    import ray

    with suppress(ray.exceptions.RayError):
        controller = ray.get(mailbox.controller.remote(), timeout=BEAT_EVERY_SECONDS)
        if controller is not None:
            ray.kill(controller)
    ray.kill(mailbox)


class _Posting:
    """Sends records in batches without waiting, lets the heart beat, and learns of wishes from the replies."""

    def __init__(self, mailbox: Any, pulse: Pulse, num_ranks: int) -> None:
        import ray

        self._mailbox, self._pulse = mailbox, pulse
        self._send_every, self._beat_every = (
            pace(seconds, num_ranks) for seconds in (SEND_EVERY_SECONDS, BEAT_EVERY_SECONDS))
        self._waiting: list[dict[str, Any]] = []
        self._reply: Any = None
        self._sent_at = 0.0
        self._stop = self._notice = False
        self._left = threading.Event()
        self._host = {"node_id": ray.get_runtime_context().get_node_id(), "node": ray.util.get_node_ip_address()}
        pulse.announce = self._beat
        threading.Thread(target=self._keep_beating, name="heart", daemon=True).start()

    def send(self, record: dict[str, Any]) -> None:
        self._waiting.append(record)
        if time.monotonic() - self._sent_at >= self._send_every:
            self._post()

    def stop_requested(self) -> bool:
        self._read_reply()
        return self._stop

    def notice_given(self) -> bool:
        from ray.train.v2._internal.execution.context import get_train_context

        self._read_reply()
        # Not ray.train.get_preemption_info(): that goes through an actor at every step, and the ranks agree anyway.
        return (self._notice or is_noted()
                or get_train_context().preemption_context.preemption_info is not None)

    def _read_reply(self) -> None:
        import ray

        if self._reply is not None and ray.wait([self._reply], timeout=0)[0]:
            self._stop, self._notice = ray.get(self._reply)
            self._reply = None

    def flush(self) -> None:
        import ray

        self._post()
        ray.get(self._reply)

    def wait_stored(self) -> None:
        """Wait until the driver has stored what the ranks have sent by now. Raises TimeoutError if it has not: no
        step is committed whose metrics could still be lost."""
        import ray

        since, deadline = None, time.monotonic() + STORED_SECONDS
        while time.monotonic() < deadline:
            since, stored = ray.get(self._mailbox.unstored.remote(since))
            if stored:
                return
            time.sleep(0.05)
        raise TimeoutError(f"the driver has not stored the metrics within {STORED_SECONDS:.0f} s")

    def leave(self, error: BaseException | None = None) -> None:
        """Stop beating; with an error, say how this rank failed."""
        import ray

        self._left.set()
        self.flush()
        if error is None:
            ray.get(self._mailbox.leave.remote(self._pulse.rank))
            return
        beat = self._pulse.beat()
        ray.get(self._mailbox.fail.remote(make_rank_failure(
            beat["rank"], error, attempt=beat["attempt"], step=getattr(error, "step", beat["step"]),
            phase=beat["phase"], pid=beat["pid"], node=ray.util.get_node_ip_address(), time=beat["time"])))

    def _keep_beating(self) -> None:
        while not self._left.wait(self._beat_every):
            self._beat()

    def _beat(self) -> None:
        self._mailbox.beat.remote(self._pulse.beat() | self._host)

    def _post(self) -> None:
        self._reply = self._mailbox.put.remote(self._waiting)
        self._waiting, self._sent_at = [], time.monotonic()


def build_data_config() -> Any:
    """Ray Train's data configuration: the stream for the world size that came to be, from the attempt's own start."""
    import ray.data
    import ray.train

    class StreamConfig(ray.train.DataConfig):  # type: ignore[misc]
        def configure(self, datasets: dict[str, Job], world_size: int, worker_handles: Any, worker_node_ids: Any,
                      **kwargs: Any) -> list[dict[str, Any]]:
            name, job = next(iter(datasets.items()))
            attempt = make_attempt(job, Run.open(job.storage, job.run_name).attempts()[-1])
            resources = job.spec.resources
            # One process that reads is enough on a laptop; each costs two seconds of CPU to start. An elastic group may
            # hold every CPU, and readers that ask for one would wait for ever.
            num_cpus = 0.0 if isinstance(resources.workers, tuple) else min(1.0, resources.reader_cpus)
            dataset = build_dataset(make_stream(job, attempt), num_cpus=num_cpus)
            dataset.context.enable_progress_bars = False
            return [{name: split} for split in dataset.streaming_split(world_size, equal=True)]

    return StreamConfig()


def build_recovery(job: Job, mailbox: Any) -> Any:
    """What Ray Train's controller asks at every turn: it keeps the evidence of a failure, ends the run where that is
    due, lets the ranks save before their group is resized, and bounds the wait for a group that cannot start."""
    import ray
    from ray.train.v2._internal.execution.callback import ControllerCallback
    from ray.train.v2._internal.execution.controller import state

    class Recovery(ControllerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self._budget = Budget(job.spec.resources.max_failures)
            self._down_since: float | None = None

        def after_controller_start(self, train_run_context: Any) -> None:
            mailbox.keep_controller.remote(ray.get_runtime_context().current_actor)

        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
            if isinstance(current_state, state.ResizingState):
                _dissolve(job, mailbox, current_state.scaling_decision.num_workers)
            elif isinstance(current_state, state.RunningState):
                self._down_since = None
            elif isinstance(current_state, state.RestartingState | state.ReschedulingState | state.InitializingState):
                if isinstance(previous_state, state.RunningState | state.PreemptingState):
                    self._judge(current_state.training_failed_error, isinstance(previous_state, state.PreemptingState))
                self._bound_wait()
                if previous_state is current_state:  # an elastic group asks again at once
                    time.sleep(BEAT_EVERY_SECONDS)

        def _judge(self, error: BaseException, noticed: bool) -> None:
            errors = getattr(error, "worker_failures", {})
            decision = _recover(job, mailbox, self._budget, errors, noticed=noticed)
            if not decision.retry:
                raise RunFailed(decision.reason)

        def _bound_wait(self) -> None:
            """End a run that has waited too long for a group: Ray itself would wait for ever."""
            self._down_since = self._down_since or time.monotonic()
            waited = time.monotonic() - self._down_since
            if waited > max_wait_seconds():
                raise RunFailed(f"no group of {job.spec.resources.min_workers} workers could start for {waited:.0f} s: "
                                "the cluster has no room for it")

    return Recovery()


def _dissolve(job: Job, mailbox: Any, num_ranks: int) -> None:
    """Before the group starts again with another number of ranks: let its ranks save and leave, but not for ever."""
    import ray

    run = Run.open(job.storage, job.run_name)
    attempt = run.attempts()[-1]
    mailbox.give_notice.remote()
    deadline = time.monotonic() + LEAVE_SECONDS
    while ray.get(mailbox.num_left.remote()) < attempt["num_ranks"] and time.monotonic() < deadline:
        time.sleep(SEND_EVERY_SECONDS)
    said, beats = ray.get(mailbox.evidence.remote())
    step = max((int(item["step"]) for item in [*said, *(beat for beat, _ in beats.values())]), default=0)
    newest = run.latest_checkpoint()
    run.end_attempt(attempt["attempt"], "resized", step)
    run.log_event("resized", attempt=attempt["attempt"], step=step, saved_step=newest.step if newest else 0,
                  num_ranks=attempt["num_ranks"], to_num_ranks=num_ranks)


def _recover(job: Job, mailbox: Any, budget: Budget, errors: dict[int, BaseException], *, noticed: bool) -> Decision:
    """Keep the evidence of a failed attempt and decide what comes after it. `noticed`: a node was to be taken away."""
    import ray

    run = Run.open(job.storage, job.run_name)
    attempt = make_attempt(job, _find_failed_attempt(run, job))
    deadline = time.monotonic() + GRACE_SECONDS
    while ray.get(mailbox.num_left.remote()) < attempt.num_ranks - 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    said, beats = ray.get(mailbox.evidence.remote())
    failure = _make_failure(run, attempt, [item for item in said if item["attempt"] == attempt.number], beats, errors)
    failure["preempted"] |= noticed
    save_failure(run, failure)
    step, batch = failure["step"], attempt.plan.batch
    cause = classify(failure)
    if cause is Cause.SPIKE:
        cause = _leave_out(run, attempt, _find_spike(failure), job.spec.numerics.max_rewinds)
    committed = failure["committed_step"]
    decision = budget.decide(cause, committed_step=committed, micro_rows=batch.micro_rows,
                             rows_per_rank=batch.rows_per_rank)
    if decision.retry:
        try:
            find_resume_checkpoint(run)
        except CheckpointsLost as error:
            decision = Decision(False, str(error))
    if decision.micro_rows:
        before = SmallerBatch.from_record(run.record())
        run.update(**SmallerBatch.after(before, decision.micro_rows, committed).to_record())
    run.end_attempt(attempt.number, "failed", step, cause)
    run.log_event("attempt_failed", attempt=attempt.number, step=step, cause=cause, retry=decision.retry,
                  reason=decision.reason)
    return decision


def _find_failed_attempt(run: Run, job: Job) -> dict[str, Any]:
    """The record of the attempt that failed. A group that failed before its rank 0 wrote it down gets its record now:
    the newest one tells of an attempt that had ended before, be it failed, resized or complete."""
    newest: dict[str, Any] = next(iter(run.attempts()[-1:]), {})
    if newest.get("driver") == job.driver and "status" not in newest:
        return newest
    return begin_attempt(job, job.plan.num_ranks)


def _make_failure(run: Run, attempt: Attempt, said: list[dict[str, Any]], beats: Beats,
                  errors: dict[int, BaseException]) -> dict[str, Any]:
    """The document of a failed attempt: what ranks said, what Ray says of the others, and who fell silent."""
    found = {item["rank"]: item for item in said}
    lost = find_lost_nodes({beat["node_id"] for rank, (beat, _) in beats.items() if rank not in found})
    _keep_last_words(run, attempt.number, beats)
    silent = 3 * pace(BEAT_EVERY_SECONDS, attempt.num_ranks)
    for rank, (beat, age) in beats.items():
        place = {key: beat[key] for key in ("node", "pid", "step", "phase", "time")}
        if rank not in found and (rank in errors or beat["node_id"] in lost or age > silent):
            silence = {} if rank in errors else {"message": f"no sign of life for {age:.0f} s"}
            found[rank] = make_rank_failure(rank, errors.get(rank), **place, **silence)
    for rank, error in errors.items():
        found.setdefault(rank, make_rank_failure(rank, error))
    hung = any(event["kind"] == "hang" and event["attempt"] == attempt.number for event in run.events())
    newest = run.latest_checkpoint()
    # Ranks of a group that was ended at its deadline have said nothing.
    places = list(found.values()) or [beat for beat, _ in beats.values()]
    return {
        "attempt": attempt.number, "time": now(), "committed_step": newest.step if newest else 0,
        "step": max((int(item.get("step") or 0) for item in places), default=attempt.start_step),
        "detected_by": "hang" if hung else "exception" if said else "worker_exit",
        "ranks": [found[rank] for rank in sorted(found)], "nodes_lost": lost,
        "preempted": any(getattr(unwrap(error), "preempted", False) for error in errors.values()),
    }


def _keep_last_words(run: Run, attempt: int, beats: Beats) -> None:
    """Keep each rank's heartbeat and log: all heartbeats in one file, and logs several at once."""
    save_beats(run, attempt, {rank: beat for rank, (beat, _) in beats.items()})

    def keep_log(rank: int, log_file: str) -> None:
        # A dead rank's file may lie on another node: then its heartbeat is its last word.
        with suppress(OSError):
            save_log(run, attempt, rank, read_tail(log_file))

    run_together([partial(keep_log, rank, beat["log_file"]) for rank, (beat, _) in beats.items()])


def _find_spike(failure: dict[str, Any]) -> int:
    """The step whose loss leapt: ranks may have begun later ones before they learnt of it."""
    return next(int(rank["step"]) for rank in failure["ranks"] if rank["cause"] == Cause.SPIKE)


def _leave_out(run: Run, attempt: Attempt, step: int, max_rewinds: int) -> Cause:
    """Let no later attempt read the batch of this step. Returns the cause: too many spikes are bad numbers."""
    if len(attempt.left_out) >= max_rewinds:
        return Cause.NUMERICS
    run.update(left_out=list(LeftOut(attempt.left_out).with_steps(step, step).batches))
    return Cause.SPIKE


def end_hang(run: Run, hang: Hang, beats: Beats) -> None:
    """Keep every rank's stacks, then end those that hold up the others, so that the group starts again."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def dump(pid: int, path: str) -> str:
        with suppress(ProcessLookupError):
            os.kill(pid, STACK_SIGNAL)
        time.sleep(1.0)
        return Path(path).read_text(encoding="utf-8", errors="replace") if path and Path(path).exists() else ""

    def end(pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def on_node(work: Any, beat: dict[str, Any]) -> Any:
        place = NodeAffinitySchedulingStrategy(beat["node_id"], soft=False)
        return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(work)

    dumps = {rank: on_node(dump, beat).remote(beat["pid"], beat["stack_file"]) for rank, (beat, _) in beats.items()}
    done, _ = ray.wait(list(dumps.values()), num_returns=len(dumps), timeout=30)
    stacks: dict[int, str] = {}
    for rank, ref in dumps.items():
        with suppress(ray.exceptions.RayError):  # a rank whose node is gone has none
            stacks |= {rank: ray.get(ref)} if ref in done else {}
    attempt = next(iter(beats.values()))[0]["attempt"]
    run_together([partial(save_stacks, run, attempt, rank, text) for rank, text in stacks.items()])
    run.log_event("hang", attempt=attempt, ranks=list(hang.ranks), reason=hang.reason)
    ray.wait([on_node(end, beats[rank][0]).remote(beats[rank][0]["pid"]) for rank in hang.ranks],
             num_returns=len(hang.ranks), timeout=30)


def run_rank(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    job: Job = config["job"]
    context = ray.train.get_context()
    rank, num_ranks = context.get_world_rank(), context.get_world_size()
    check_shared(job)
    record = broadcast_from_rank_zero(begin_attempt(job, num_ranks) if rank == 0 else None)
    attempt = make_attempt(job, record)
    pulse = Pulse(rank)
    pulse.attempt, pulse.step = attempt.number, attempt.start_step
    pulse.dump_stacks_on_signal()
    reporter = _Posting(config["mailbox"], pulse, num_ranks)
    try:
        _train(job, attempt, reporter, pulse, context.get_local_rank())
    except BaseException as error:
        reporter.leave(error)
        raise
    reporter.leave()


def _train(job: Job, attempt: Attempt, reporter: _Posting, pulse: Pulse, local_rank: int) -> None:
    stream = make_stream(job, attempt)
    blocks = _open_stream(stream)  # rows travel while torch is imported and the model is built

    import ray
    import torch
    from ray.train.collective import broadcast_from_rank_zero

    from dray.processes.heap import prepare_process
    from dray.rank import group
    from dray.rank.loop import train_rank

    prepare_process(job.spec.resources.cpus_per_worker)
    device = torch.device("cuda", local_rank) if job.plan.on_gpu else torch.device("cpu")
    if job.plan.on_gpu:
        torch.cuda.set_device(device)
    ranks = group.join(device, rank=pulse.rank, num_ranks=attempt.num_ranks, local_rank=local_rank,
                       host=ray.util.get_node_ip_address(), announce=broadcast_from_rank_zero,
                       timeout_seconds=agreement_seconds(job.spec.watchdog))
    how = train_rank(job, ranks, attempt, reporter, stream=stream, blocks=blocks, pulse=pulse)
    if pulse.rank == 0:
        reporter.send({"kind": "ended", "how": how})
        reporter.flush()
    group.leave()


def _open_stream(stream: RowStream) -> Iterator[pa.Table]:
    """This rank's blocks. Ray Data starts at once, in the background."""
    import ray.train

    open_shard = cache(lambda: ray.train.get_dataset_shard("rows"))  # in the background too: it waits for the split
    return iterate_windows(stream, lambda: open_shard().iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=PREFETCH_BLOCKS))
