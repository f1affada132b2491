"""The ranks' loop, started on Ray Train's workers or in this process, and followed until it
ends."""

from __future__ import annotations

import math
import tempfile
import threading
import time
from typing import Any

from dray.cluster.nodes import head_is_gone
from dray.cluster.workers import WarmNodes, run_workers
from dray.doctor.hangs import find_hang
from dray.errors import RunFailed, StorageFailed
from dray.processes.signals import stops
from dray.rank.job import Job
from dray.runs import Run
from dray.runs.records import Report
from dray.spec import Resources
from dray.storage.filesystem import (
    is_local,
)
from dray.train.recorder import DRAIN_SECONDS, OBJECT_DRAIN_SECONDS, Recorder

MAILBOX_SECONDS = 60.0
"""How long the mailbox, which does next to nothing, may take to answer."""
HEAD_SECONDS, HEAD_LOOK_SECONDS = 25.0, 5.0
"""How long the head may be away, as it is where it is started again with its memory kept, and how
often it is looked for."""
UNBEGUN_SECONDS = 2.0
"""How long a run that is to stop waits for a sign of life of its ranks: with none of them there is
nothing to save."""


class LocalLauncher:
    """The ranks' loop in this process, for tests, notebooks and machines without Ray."""

    def run(self, job: Job, recorder: Recorder) -> None:
        import torch

        from dray.processes.heap import prepare_process
        from dray.rank.group import build_ranks, join_alone
        from dray.rank.job import begin_attempt, make_attempt, make_stream
        from dray.rank.loop import train_rank
        from dray.rank.pulse import Pulse

        class Direct:
            def send(self, report: Report) -> None:
                recorder.take([report])

            def stop_requested(self) -> bool:
                return False

            def notice_given(self) -> bool:
                return False

            def wait_stored(self) -> None:
                recorder.wait_stored()

            def flush(self) -> None:
                pass

        on_gpu = torch.cuda.is_available() and job.spec.resources.gpus_per_worker
        device = (
            torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        )
        prepare_process(job.spec.resources.cpus_per_worker)
        join_alone(device)
        ranks = build_ranks(device, timeout_seconds=1800)
        attempt = make_attempt(job, begin_attempt(job, ranks.num_ranks))
        stream = make_stream(job, attempt)
        recorder.ended = train_rank(
            job,
            ranks,
            attempt,
            Direct(),
            stream=stream,
            blocks=stream.blocks(ranks.rank),
            pulse=Pulse(ranks.rank),
        )
        recorder.wait_stored()


class RayLauncher:
    """The ranks' loop on Ray Train workers, fed by Ray Data, reporting through an actor on the head
    node.

    The actor is started at once: its node's fork server imports while the driver looks for the
    model and the rows.
    """

    def __init__(self, resources: Resources, *, is_local: bool) -> None:
        from dray.train.posting import build_mailbox

        self._is_local, self._begun = is_local, False
        self._warm = WarmNodes(resources.cpus_per_worker, resources.gpus_per_worker)
        self._mailbox = build_mailbox(self._warm.environment)

    def __enter__(self) -> RayLauncher:
        return self

    def __exit__(self, *error: object) -> None:
        """End what was started for a run that was refused or is complete, where Ray outlives it."""
        import ray

        if not self._begun:
            ray.kill(self._mailbox)

    def run(self, job: Job, recorder: Recorder) -> None:
        import ray

        from dray.train.posting import end_workers
        from dray.train.recovery import end_hang

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
                    attempt = max((beat.attempt for beat, _ in beats.values()), default=0)
                    if hang and attempt > ended_hang:
                        ended_hang = attempt
                        recorder.say(f"hung: {hang.reason}")
                        end_hang(Run.open(job.storage, job.run_name), hang, beats)
                    if wishes and stopping_since == math.inf:
                        stopping_since = time.monotonic()
                        recorder.stop(wishes.numbers[0])
                        mailbox.request_stop.remote()
                    if (
                        alive
                        and not beats
                        and recorder.ended is None
                        and (time.monotonic() - stopping_since > UNBEGUN_SECONDS)
                    ):
                        recorder.ended = "interrupted"  # there are no ranks, and so nothing to save
                        end_workers(mailbox)
                        return
                    if not alive and (failure or recorder.is_stored):
                        break
                    thread.join(drain_seconds)
        except (
            ray.exceptions.RayError
        ) as error:  # the ranks report through it: without it they cannot be followed
            lost = RunFailed(
                "the head of the Ray cluster is gone"
                if head_is_gone()
                else f"the mailbox on the head was lost: {error}"
            )
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
    """What the mailbox answers. Raises RayError when it takes too long, sooner where the head is
    gone: once that has been asked in vain for a minute, Ray ends this process without a word of
    dray's."""
    import ray

    begun, head_seen = time.monotonic(), time.monotonic()
    while True:
        try:
            return ray.get(asked, timeout=HEAD_LOOK_SECONDS)
        except ray.exceptions.GetTimeoutError:
            if not head_is_gone():
                head_seen = time.monotonic()
            if (
                time.monotonic() - head_seen > HEAD_SECONDS
                or time.monotonic() - begun > MAILBOX_SECONDS
            ):
                raise


def _start_workers(
    job: Job, mailbox: Any, failure: list[BaseException], *, is_local: bool
) -> threading.Thread:
    """Start the worker group in a thread, which puts there what it ends with if that is an
    error."""
    from dray.train.recovery import build_recovery
    from dray.train.worker import build_data_config, run_rank

    resources = job.spec.resources

    def follow() -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="dray-") as scratch:
                run_workers(
                    run_rank,
                    {"job": job, "mailbox": mailbox},
                    datasets={"rows": job},
                    data_config=build_data_config(),
                    num_workers=resources.workers,
                    cpus_per_worker=resources.cpus_per_worker,
                    gpus_per_worker=resources.gpus_per_worker,
                    recovery=build_recovery(job, mailbox),
                    name=job.run_name,
                    scratch=scratch,
                    is_local=is_local,
                )
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=follow, name="workers", daemon=True)
    thread.start()
    return thread
