"""After a failure, seen from Ray Train's controller: keep the evidence, decide what comes next, end
what hangs.

What is decided by is in `dray.doctor`: the causes of failures, and the budget of restarts.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from dray.cluster.autoscaler import autoscaler_says
from dray.cluster.needs import has_room, make_worker_needs
from dray.cluster.nodes import find_lost_nodes, live_nodes, may_grow
from dray.cluster.placement import Site, make_least_needs
from dray.cluster.workers import max_wait_seconds
from dray.doctor import classify
from dray.doctor.budget import Budget, Decision, SmallerBatch
from dray.doctor.hangs import Hang
from dray.errors import Cause, CheckpointsLost, RunFailed
from dray.order import LeftOut
from dray.rank.job import Attempt, Job, begin_attempt, make_attempt
from dray.rank.pulse import STACK_SIGNAL
from dray.runs import Run, find_resume_checkpoint
from dray.runs.evidence import (
    make_rank_failure,
    read_tail,
    save_beats,
    save_failure,
    save_log,
    save_stacks,
    unwrap,
)
from dray.runs.records import AttemptRecord, Beat, Failure, RankFailure
from dray.runs.row_log import now, run_together
from dray.train.mailbox import Beats, pace
from dray.train.posting import BEAT_EVERY_SECONDS, SEND_EVERY_SECONDS

LEAVE_SECONDS = 120.0  # in which a group that is to be resized must have saved
GRACE_SECONDS = 1.0
"""In which the ranks that fail with the first one say so; where all have, nobody waits."""


def build_recovery(job: Job, mailbox: Any, site: Site) -> Any:
    """What Ray Train's controller asks at every turn: it keeps the evidence of a failure, ends the
    run where that is due, lets the ranks save before their group is resized, and bounds the wait
    for a group that cannot start."""
    from ray.train.v2._internal.execution.callback import ControllerCallback
    from ray.train.v2._internal.execution.controller import state

    class Recovery(ControllerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self._budget = Budget(job.spec.resources.max_failures)
            self._down_since: float | None = None
            self._grows: bool | None = None

        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
            if isinstance(current_state, state.ResizingState):
                _dissolve(job, mailbox, current_state.scaling_decision.num_workers)
            elif isinstance(current_state, state.RunningState):
                self._down_since = None
            elif isinstance(
                current_state,
                state.RestartingState | state.ReschedulingState | state.InitializingState,
            ):
                if isinstance(previous_state, state.RunningState | state.PreemptingState):
                    self._judge(
                        current_state.training_failed_error,
                        isinstance(previous_state, state.PreemptingState),
                    )
                self._bound_wait()
                if previous_state is current_state:  # an elastic group asks again at once
                    time.sleep(BEAT_EVERY_SECONDS)

        def _judge(self, error: BaseException, noticed: bool) -> None:
            errors = getattr(error, "worker_failures", {})
            decision = _recover(job, mailbox, self._budget, errors, noticed=noticed)
            if not decision.retry:
                raise RunFailed(decision.reason)

        def _bound_wait(self) -> None:
            """End a run that has waited too long for a group that the cluster could not hold if it
            were empty: Ray itself would wait for ever. The end of other runs is waited for."""
            resources = job.spec.resources
            if site.placement is not None and site.placement.is_removed():
                raise RunFailed(f"the placement group of {job.run_name} was taken away")
            if self._down_since is None or (
                site.placement is None and has_room(live_nodes(), make_least_needs(resources))
            ):
                self._down_since = time.monotonic()
            waited, growing = time.monotonic() - self._down_since, 60 * resources.wait_minutes
            if waited <= min(max_wait_seconds(), growing):
                self._grows = None
                return
            if self._grows is None:  # asked once: the autoscaler's file is read on the head
                self._grows = site.placement is not None or may_grow(make_worker_needs(resources))
            if waited > (growing if self._grows else max_wait_seconds()):
                raise RunFailed(
                    f"no group of {resources.min_workers} workers could start for "
                    f"{waited:.0f} s: the cluster has no room for it{autoscaler_says()}"
                )

    return Recovery()


def _dissolve(job: Job, mailbox: Any, num_ranks: int) -> None:
    """Before the group starts again with another number of ranks: let its ranks save and leave, but
    not for ever."""
    import ray

    run = Run.open(job.storage, job.run_name)
    attempt = run.attempts()[-1]
    mailbox.give_notice.remote()
    deadline = time.monotonic() + LEAVE_SECONDS
    while ray.get(mailbox.num_left.remote()) < attempt.num_ranks and time.monotonic() < deadline:
        time.sleep(SEND_EVERY_SECONDS)
    said, beats = ray.get(mailbox.evidence.remote())
    step = max(
        [*(item.step or 0 for item in said), *(beat.step for beat, _ in beats.values())],
        default=0,
    )
    newest = run.latest_checkpoint()
    run.end_attempt(attempt.number, "resized", step)
    run.log_event(
        "resized",
        attempt=attempt.number,
        step=step,
        saved_step=newest.step if newest else 0,
        num_ranks=attempt.num_ranks,
        to_num_ranks=num_ranks,
    )


def _recover(
    job: Job, mailbox: Any, budget: Budget, errors: dict[int, BaseException], *, noticed: bool
) -> Decision:
    """Keep the evidence of a failed attempt and decide what comes after it. `noticed`: a node was
    to be taken away."""
    import ray

    run = Run.open(job.storage, job.run_name)
    attempt = make_attempt(job, _find_failed_attempt(run, job))
    deadline = time.monotonic() + GRACE_SECONDS
    while (
        ray.get(mailbox.num_left.remote()) < attempt.num_ranks - 1 and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    said, beats = ray.get(mailbox.evidence.remote())
    said = [item for item in said if item.attempt == attempt.number]
    failure = _make_failure(run, attempt, said, beats, errors, noticed=noticed)
    save_failure(run, failure)
    batch = attempt.plan.batch
    cause = classify(failure.to_json())
    if cause is Cause.SPIKE:
        cause = _leave_out(run, attempt, _find_spike(failure), job.spec.numerics.max_rewinds)
    committed = failure.committed_step
    decision = budget.decide(
        cause,
        committed_step=committed,
        micro_rows=batch.micro_rows,
        rows_per_rank=batch.rows_per_rank,
    )
    if decision.retry:
        try:
            find_resume_checkpoint(run)
        except CheckpointsLost as error:
            decision = Decision(False, str(error))
    if decision.micro_rows:
        before = SmallerBatch.from_record(run.record())
        run.update(**SmallerBatch.after(before, decision.micro_rows, committed).to_record())
    run.end_attempt(attempt.number, "failed", failure.step, cause)
    run.log_event(
        "attempt_failed",
        attempt=attempt.number,
        step=failure.step,
        cause=cause,
        retry=decision.retry,
        reason=decision.reason,
    )
    return decision


def _find_failed_attempt(run: Run, job: Job) -> AttemptRecord:
    """The record of the attempt that failed. A group that failed before its rank 0 wrote it down
    gets its record now: the newest one tells of an attempt that had ended before, be it failed,
    resized or complete."""
    newest = next(iter(run.attempts()[-1:]), None)
    if newest is not None and newest.driver == job.driver and not newest.status:
        return newest
    return begin_attempt(job, job.plan.num_ranks)


def _make_failure(
    run: Run,
    attempt: Attempt,
    said: list[RankFailure],
    beats: Beats,
    errors: dict[int, BaseException],
    *,
    noticed: bool,
) -> Failure:
    """What ranks said, what Ray says of the others, and who fell silent."""
    found = {item.rank: item for item in said}
    lost = find_lost_nodes({beat.node_id for rank, (beat, _) in beats.items() if rank not in found})
    _keep_last_words(run, attempt.number, beats)
    silent = 3 * pace(BEAT_EVERY_SECONDS, attempt.num_ranks)
    for rank, (beat, age) in beats.items():
        if rank not in found and (rank in errors or beat.node_id in lost or age > silent):
            silence = {} if rank in errors else {"message": f"no sign of life for {age:.0f} s"}
            found[rank] = make_rank_failure(
                rank,
                errors.get(rank),
                node=beat.node,
                pid=beat.pid,
                step=beat.step,
                phase=beat.phase,
                time=beat.time,
                memory_share=beat.memory_share,
                **silence,
            )
    for rank, error in errors.items():
        found.setdefault(rank, make_rank_failure(rank, error))
    hung = any(
        event["kind"] == "hang" and event["attempt"] == attempt.number for event in run.events()
    )
    newest = run.latest_checkpoint()
    # Ranks of a group that was ended at its deadline have said nothing.
    steps = [item.step for item in found.values()] or [beat.step for beat, _ in beats.values()]
    told = any(getattr(unwrap(error), "preempted", False) for error in errors.values())
    return Failure(
        attempt=attempt.number,
        step=max((step or 0 for step in steps), default=attempt.start_step),
        committed_step=newest.step if newest else 0,
        detected_by="hang" if hung else "exception" if said else "worker_exit",
        ranks=tuple(sorted(found.values(), key=lambda item: item.rank or 0)),
        nodes_lost=tuple(lost),
        preempted=told or noticed,
        time=now(),
    )


def _keep_last_words(run: Run, attempt: int, beats: Beats) -> None:
    """Keep each rank's heartbeat and log: all heartbeats in one file, and logs several at once."""
    save_beats(run, attempt, {rank: beat.to_json() for rank, (beat, _) in beats.items()})

    def keep_log(rank: int, log_file: str) -> None:
        # A dead rank's file may lie on another node: then its heartbeat is its last word.
        with suppress(OSError):
            save_log(run, attempt, rank, read_tail(log_file))

    run_together([partial(keep_log, rank, beat.log_file) for rank, (beat, _) in beats.items()])


def _find_spike(failure: Failure) -> int:
    """The step whose loss leapt: ranks may have begun later ones before they learnt of it."""
    return next(rank.step or 0 for rank in failure.ranks if rank.cause == Cause.SPIKE)


def _leave_out(run: Run, attempt: Attempt, step: int, max_rewinds: int) -> Cause:
    """Let no later attempt read the batch of this step. Returns the cause: too many spikes are bad
    numbers."""
    if len(attempt.left_out) >= max_rewinds:
        return Cause.NUMERICS
    run.update(left_out=list(LeftOut(attempt.left_out).with_steps(step, step).batches))
    return Cause.SPIKE


def end_hang(run: Run, hang: Hang, beats: Beats) -> None:
    """Keep every rank's stacks, then end those that hold up the others, so that the group starts
    again."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def dump(pid: int, path: str) -> str:
        with suppress(ProcessLookupError):
            os.kill(pid, STACK_SIGNAL)
        time.sleep(1.0)
        return (
            Path(path).read_text(encoding="utf-8", errors="replace")
            if path and Path(path).exists()
            else ""
        )

    def end(pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def on_node(work: Any, beat: Beat) -> Any:
        place = NodeAffinitySchedulingStrategy(beat.node_id, soft=False)
        return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(work)

    dumps = {
        rank: on_node(dump, beat).remote(beat.pid, beat.stack_file)
        for rank, (beat, _) in beats.items()
    }
    done, _ = ray.wait(list(dumps.values()), num_returns=len(dumps), timeout=30)
    stacks: dict[int, str] = {}
    for rank, ref in dumps.items():
        with suppress(ray.exceptions.RayError):  # a rank whose node is gone has none
            stacks |= {rank: ray.get(ref)} if ref in done else {}
    attempt = next(iter(beats.values()))[0].attempt
    run_together([partial(save_stacks, run, attempt, rank, text) for rank, text in stacks.items()])
    run.log_event("hang", attempt=attempt, ranks=list(hang.ranks), reason=hang.reason)
    ray.wait(
        [on_node(end, beats[rank][0]).remote(beats[rank][0].pid) for rank in hang.ranks],
        num_returns=len(hang.ranks),
        timeout=30,
    )
