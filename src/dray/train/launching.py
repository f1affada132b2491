"""The ranks' loop, started on Ray Train's workers or in this process, and followed until it
ends."""

from __future__ import annotations

import math
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

from dray.cluster.autoscaler import autoscaler_says
from dray.cluster.gauges import Gauges, build_gauges
from dray.cluster.needs import make_worker_needs
from dray.cluster.nodes import head_is_gone
from dray.cluster.placement import WAITING_SECONDS, Placement, Seats, Site, remove_groups
from dray.cluster.workers import WarmNodes, run_workers
from dray.doctor.hangs import find_hang
from dray.errors import RunFailed, caught
from dray.processes.signals import Wishes, stops
from dray.rank.job import Job
from dray.redaction import redact_fields
from dray.runs import Run
from dray.runs.layout import parse_trial_name
from dray.runs.records import Report
from dray.spec import Resources
from dray.storage.filesystem import is_local, shown
from dray.train.caller import Caller
from dray.train.mailbox import Beats
from dray.train.recorder import DRAIN_SECONDS, OBJECT_DRAIN_SECONDS, Recorder

MAILBOX_SECONDS = 60.0
"""How long the mailbox, which does next to nothing, may take to answer."""
HEAD_SECONDS, HEAD_LOOK_SECONDS = 25.0, 5.0
"""How long the head may be away, as it is where it is started again with its memory kept, and how
often it is looked for."""
UNBEGUN_SECONDS = 2.0
"""How long a run that is to stop waits for a sign of life of its ranks: with none of them there is
nothing to save."""
END_SECONDS = 10.0
"""How long the thread of the workers may take to notice that they were ended."""
MOST_READERS = 8
"""Tasks that read at once for a run on a cluster, in the CPUs that are for reading."""

_alone = threading.Lock()


class LocalLauncher:
    """The ranks' loop in this process, for tests, notebooks and machines without Ray.

    One run at a time: torch's random numbers, threads and process groups are the process' own, so a
    second thread waits.
    """

    def gauges(self, run_name: str) -> Gauges:
        return Gauges(run_name, is_read=False)

    def run(self, job: Job, recorder: Recorder, caller: Caller) -> None:
        with _alone:
            self._run(job, recorder, caller)

    def _run(self, job: Job, recorder: Recorder, caller: Caller) -> None:
        import torch

        from dray.processes.heap import prepare_process
        from dray.rank.group import build_ranks, join_alone
        from dray.rank.job import begin_attempt, make_attempt, make_stream
        from dray.rank.loop import train_rank
        from dray.rank.pulse import Pulse

        class Direct:
            def send(self, report: Report) -> None:
                recorder.take([report])
                caller.tell(recorder.take_stored())

            def stop_requested(self) -> bool:
                wish = caller.wish()
                if wish is not None and recorder.wish is None:
                    recorder.stop(wish)
                return wish is not None

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
        caller.tell(recorder.take_stored())


class RayLauncher:
    """The ranks' loop on Ray Train workers, fed by Ray Data, reporting through an actor on the head
    node. Nothing here belongs to the process or to the job: several may be at work at once.

    The actor is started at once: its node's fork server imports while the driver looks for the
    model and the rows. When the block ends, every actor of the run ends.
    """

    def __init__(
        self,
        resources: Resources,
        *,
        is_local: bool,
        placement: Placement | None = None,
        seats: Seats | None = None,
    ) -> None:
        from dray.train.posting import build_mailbox

        self._is_local = is_local
        self._warm = WarmNodes(make_worker_needs(resources))
        self._mailbox = build_mailbox(self._warm.environment)
        self._controller: Any = None
        self._thread: threading.Thread | None = None
        self._site = _make_site(resources, placement, seats, is_local=is_local)

    def __enter__(self) -> RayLauncher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End whatever is left of the run, where Ray outlives it: the workers end with Ray Train's
        controller, which owns them, or with their place."""
        import ray

        if not ray.is_initialized() or head_is_gone():
            return
        if self._controller is not None:
            ray.kill(self._controller)
        ray.kill(self._mailbox)
        self._warm.close()
        if self._thread is not None:
            self._thread.join(END_SECONDS)
        if self._site.placement is None:
            remove_groups(self._site.name)

    def gauges(self, run_name: str) -> Gauges:
        """Of the run; not of a trial, which its sweep counts: each would leave its series
        behind."""
        is_trial = parse_trial_name(run_name) is not None
        return Gauges(run_name, is_read=False) if is_trial else build_gauges(run_name)

    def run(self, job: Job, recorder: Recorder, caller: Caller) -> None:
        import ray

        failure: list[BaseException] = []
        self._thread = self._start_workers(job, failure)
        try:
            with stops(noted=True) as signals:
                begun = self._follow(job, recorder, caller, signals, failure)
        except (
            ray.exceptions.RayError
        ) as error:  # the ranks report through it: without it they cannot be followed
            self.close()
            lost = RunFailed(
                "the head of the Ray cluster is gone"
                if head_is_gone()
                else f"the mailbox on the head was lost: {error}"
            )
            if recorder.wish is None:
                raise lost from error
            recorder.give_up_saving(lost)
            return
        except BaseException:  # nothing computes on while the end is written down
            self.close()
            raise
        if failure and recorder.wish is None:
            raise failure[0]
        if failure and begun:
            recorder.give_up_saving(failure[0])

    def _follow(
        self,
        job: Job,
        recorder: Recorder,
        caller: Caller,
        signals: Wishes,
        failure: Sequence[BaseException],
    ) -> bool:
        """Take what the ranks say until they have ended, and tell them when they are to stop.
        Returns whether there were any when they were to."""
        from dray.train.recovery import end_hang

        assert self._thread is not None
        run = Run.open(job.storage, job.run_name)
        drain_seconds = DRAIN_SECONDS if is_local(run.filesystem) else OBJECT_DRAIN_SECONDS
        taken, stored, ended_hang, stopping_since = 0, 0, 0, math.inf
        waiting_since: float | None = time.monotonic()
        beats: Beats = {}
        while True:
            alive = self._thread.is_alive()
            self._warm.look()
            records, said = _answer(self._mailbox.take.remote(stored))
            beats = beats if said is None else said
            taken += len(records)
            recorder.take(records)
            stored = taken if recorder.is_stored else stored
            caller.tell(recorder.take_stored())
            hang = said and find_hang(said, recorder.step_seconds, job.spec.watchdog)
            attempt = max((beat.attempt for beat, _ in beats.values()), default=0)
            if hang and attempt > ended_hang:
                ended_hang = attempt
                recorder.say(f"hung: {hang.reason}")
                end_hang(run, hang, beats)
            wish = caller.wish(signals)
            if wish is not None and wish != recorder.wish:
                recorder.stop(wish)
            if wish is not None and stopping_since == math.inf:
                stopping_since = time.monotonic()
                self._mailbox.request_stop.remote()
            if (
                alive
                and not beats
                and recorder.ended is None
                and (time.monotonic() - stopping_since > UNBEGUN_SECONDS)
            ):
                recorder.ended = "interrupted"  # there are no ranks, and so nothing to save
                self.close()
                return False
            waiting_since = None if beats else waiting_since
            if waiting_since and time.monotonic() - waiting_since > WAITING_SECONDS:
                waiting_since = None
                recorder.say(self._describe_waiting(job.spec.resources))
            if not alive and (failure or recorder.is_stored):
                return True
            self._thread.join(drain_seconds)

    def _describe_waiting(self, resources: Resources) -> str:
        if self._site.placement is not None:
            return "no worker has said anything yet: its placement is there, so they are starting"
        worker, reader = make_worker_needs(resources), self._site.reader_cpus
        also = f" and {reader:g} for reading" if reader else ""
        return (
            "no worker has said anything yet: they are starting, or wait for room in the cluster, "
            f"where {resources.min_workers} workers × ({worker}){also} are taken together or "
            f"not at all{autoscaler_says()}"
        )

    def _start_workers(self, job: Job, failure: list[BaseException]) -> threading.Thread:
        """Start the worker group in a thread, which puts there what it ends with if that is an
        error."""
        from dray.train.recovery import build_recovery
        from dray.train.worker import build_data_config, run_rank

        resources, site = job.spec.resources, self._site

        def work() -> None:
            with tempfile.TemporaryDirectory(prefix="dray-") as scratch:
                run_workers(
                    run_rank,
                    {"job": job, "mailbox": self._mailbox},
                    site=site,
                    datasets={"rows": job},
                    data_config=build_data_config(),
                    num_workers=len(site.seats.workers) if site.seats else resources.workers,
                    worker=make_worker_needs(resources),
                    recovery=build_recovery(job, self._mailbox, site),
                    name=job.flat_name,
                    shown=_describe(job),
                    scratch=scratch,
                    is_local=self._is_local,
                    started=self._keep_controller,
                )

        def follow() -> None:
            _, error = caught(work, BaseException)
            if error is not None:
                failure.append(error)

        thread = threading.Thread(target=follow, name="workers", daemon=True)
        thread.start()
        return thread

    def _keep_controller(self, controller: Any) -> None:
        self._controller = controller


def _describe(job: Job) -> dict[str, Any]:
    """What the dashboard's Train page tells of a run."""
    return {
        "run": job.run_name,
        "storage": shown(job.storage),
        "steps": job.plan.num_steps,
        "spec": redact_fields(job.spec.model_dump(mode="json")),
    }


def _make_site(
    resources: Resources, placement: Placement | None, seats: Seats | None, *, is_local: bool
) -> Site:
    """Where the run's workers and those who read for them will be."""
    # An elastic group may hold every CPU, and readers that ask for one would wait for ever.
    elastic = isinstance(resources.workers, tuple) and placement is None
    # On a laptop one process that reads is enough, and each costs two seconds of CPU to start;
    # from afar reading is mostly waiting.
    at_once = 1 if is_local else min(MOST_READERS, resources.max_workers)
    return Site(
        name=f"dray-{uuid.uuid4().hex}",
        reader_cpus=0.0 if elastic else resources.reader_cpus,
        readers_at_once=at_once,
        placement=placement,
        seats=seats,
    )


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
