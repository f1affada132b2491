"""The head-node driver of training: prepare, plan, open the run, start the workers, aggregate what
they report.

`train` runs on Ray; `train_locally` runs the same loop in this process alone. Both can be called
again to resume.
"""

from __future__ import annotations

import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

from dray.cluster.connection import connect
from dray.cluster.needs import make_worker_needs
from dray.cluster.nodes import find_nodes_without, placed_shape
from dray.cluster.placement import Placement, check_labels, find_seats
from dray.cluster.survey import survey_cluster
from dray.corpus.prepare import Corpus, check_inputs, find, prepare
from dray.doctor import diagnose
from dray.errors import Cause, Interrupted, RunFailed, StorageFailed, caught
from dray.origin import held
from dray.plan import Shape, local_shape
from dray.rank.job import Job, not_shared
from dray.redaction import redact
from dray.runs import CheckpointInfo, Run, Trackers, build_trackers, find_resume_checkpoint
from dray.runs.drivers import Heart
from dray.show.progress import Display
from dray.show.report import format_diagnosis
from dray.spec import Spec
from dray.storage.filesystem import (
    TEMPORARY,
    absolute,
    delete_file,
    exists,
    is_object_store,
    open_filesystem,
    shown,
    write_whole,
)
from dray.storage.retrying import patience
from dray.train.caller import Caller, Observer, Stop
from dray.train.launching import LocalLauncher, RayLauncher
from dray.train.recorder import Recorder
from dray.train.start import look, open_run
from dray.train.watching import Watching

LAST_WORD_SECONDS = 10.0
"""How long a storage is waited for by each of the last words on a run that has failed."""


@dataclass(frozen=True)
class Ended:
    """How a call of `train` ended."""

    run: Run
    status: str
    """`completed`, `early_stopped`, or `stopped` by its caller; other ends raise."""
    reason: str = ""
    """Why its caller stopped it."""


def train(
    spec: Spec,
    *,
    storage: str = "./runs",
    run_name: str | None = None,
    fork: str | None = None,
    address: str | None = None,
    verbose: bool = False,
    display: Display | None = None,
    corpus: Corpus | None = None,
    placement: Placement | None = None,
    observer: Observer | None = None,
    stop: Stop | None = None,
    until_step: int | None = None,
) -> Ended:
    """Run `spec` on Ray, or resume it. From any thread, and several at once in one Ray.

    `corpus`: of this spec, prepared already. `placement`: the part of a connected Ray that the run
    may use; without one it takes its workers and those who read for them together, as soon as there
    is room. `observer(row)` gets each metrics row of this call, of steps and of validations, once
    it is stored. `stop()` is asked about once a second: once it says something true, all ranks save
    their state after a step, and the call ends with the status `stopped`; the next one goes on.
    Both are called in the thread of the call, and what they raise stops the run likewise.
    `until_step`: the call ends `stopped` once exactly this step is done and saved.

    Raises UserError for what the caller can mend (nothing is written), RunFailed when the workers
    cannot go on, or when `observer` or `stop` has raised, and Interrupted when a person stopped it
    (its state is saved). However it ends, none of the run's actors is left.
    """
    display = display or Display()
    seats = find_seats(spec.resources, placement.bundles) if placement is not None else None
    spec = spec if seats is None else _with_workers(spec, len(seats.workers))
    resources = spec.resources
    start = look(spec, storage, run_name, fork)
    if corpus is None and start.keeper is None:
        check_inputs(start.spec, storage)
    with connect(
        address,
        num_cpus=resources.max_workers * resources.cpus_per_worker + resources.reader_cpus,
        worker=make_worker_needs(resources),
        num_workers=resources.max_workers,
        verbose=verbose,
    ) as connection:
        shape = connection.shape
        caller = Caller(observer, stop)
        if placement is not None and seats is not None:
            placement.wait(display.say, lambda: wish.reason if (wish := caller.wish()) else "")
            check_labels(placement, seats, make_worker_needs(resources))
            shape = placed_shape(placement.group, seats.workers)
        if not connection.local:
            _check_nodes(
                absolute(storage), spec, placement.node_ids() if placement is not None else None
            )
            if placement is None:  # a sweep looks once, for all its trials
                for line in survey_cluster(resources).remarks():
                    display.say(line)
        begun = time.monotonic()

        def prepared(spec: Spec) -> Corpus:
            corpus = prepare(spec, storage, display.say, placement=placement)
            for line in corpus.describe() if corpus.is_new else ():
                display.say(line)
            return corpus

        with RayLauncher(
            resources, is_local=connection.local, placement=placement, seats=seats
        ) as launcher:
            run, job = open_run(start, shape, prepared, display.say, corpus=corpus)
            run.log_event("driver_started", seconds_to_corpus=time.monotonic() - begun)
            return _drive(run, replace(job, until_step=until_step), display, launcher, caller)


def _with_workers(spec: Spec, num_workers: int) -> Spec:
    """An elastic spec for so many workers; others stay as they are."""
    if not isinstance(spec.resources.workers, tuple):
        return spec
    resources = spec.resources.model_copy(update={"workers": (num_workers, num_workers)})
    return spec.model_copy(update={"resources": resources})


def train_locally(
    spec: Spec,
    *,
    storage: str = "./runs",
    run_name: str | None = None,
    corpus: Corpus | None = None,
    shape: Shape | None = None,
    display: Display | None = None,
    observer: Observer | None = None,
    stop: Stop | None = None,
) -> Ended:
    """Run or resume `spec` in this process: one rank, no Ray. The corpus must have been prepared,
    or be given; `observer` and `stop` as for `train`, but asked at each step."""
    display = display or Display()
    spec = spec.model_copy(update={"resources": spec.resources.model_copy(update={"workers": 1})})

    def prepared(spec: Spec) -> Corpus:
        found = find(spec, storage)
        if found is None:
            raise RunFailed(
                f"the corpus of {spec.name} is not prepared in {shown(absolute(storage))}",
                "run `dray prepare` first; preparing needs Ray",
            )
        return found

    run, job = open_run(
        look(spec, storage, run_name),
        shape or local_shape(),
        prepared,
        display.say,
        corpus=corpus,
        with_ray=False,
    )
    return _drive(run, job, display, LocalLauncher(), Caller(observer, stop))


def _drive(
    run: Run, job: Job, display: Display, launcher: RayLauncher | LocalLauncher, caller: Caller
) -> Ended:
    """Start the workers, follow them to their end, and write down how it was."""
    spec, plan = job.spec, job.plan
    num_steps, newest = plan.num_steps or 0, find_resume_checkpoint(run)
    done = newest.step if newest else 0
    if (ended := _ended_before(run, job, newest, display)) is not None:
        return ended
    driver = run.take_over()
    job = replace(job, driver=driver.number)
    heart = Heart(
        partial(run.heartbeat, driver),
        lambda error: caller.give_up("another driver has taken the run over"),
    )
    status, reason = "failed", ""
    trackers = Trackers(run, {})
    watching = Watching(launcher.gauges(run.name), run, num_steps)
    try:
        trackers = build_trackers(run, spec)
        recorder = Recorder(run, plan, trackers, display, watching)
        run.set_status("running", driver=driver)
        run.update(compressors=job.manifest.validation_compressors)
        with held(None if done else job.weights), display.steps(num_steps, done), heart:
            launcher.run(job, recorder, caller)
        status, reason = _name_end(recorder, job)
    except (RunFailed, StorageFailed) as error:
        reason = str(error)
        raise RunFailed(reason, _explain(run, reason)) from error
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        reason = redact(str(error) or type(error).__name__)
        run.log_event(status, reason=reason)
        raise
    finally:
        # Each is done whatever becomes of the others, from the last one to the first.
        with ExitStack() as words:
            words.callback(trackers.finish, status)
            words.callback(watching.end)
            words.enter_context(_last_words(status))
            words.callback(run.release, driver)
            words.enter_context(_last_words(status))
            run.set_status("completed" if status == "early_stopped" else status, reason, driver)
    if heart.replaced is not None:
        raise heart.replaced
    if status in ("completed", "early_stopped"):
        run.export_metrics_parquet()
    saved = run.latest_checkpoint()
    step = saved.step if saved else 0
    if caller.error is not None:
        raise RunFailed(f"{caller.complaint}; the run is saved at step {step}") from caller.error
    if status == "interrupted":
        number = recorder.wish.number if recorder.wish else None
        raise Interrupted(step, number or signal.SIGINT)
    return Ended(run, status, reason)


def _ended_before(
    run: Run, job: Job, newest: CheckpointInfo | None, display: Display
) -> Ended | None:
    """How a run that has come this far ends without a further step; none: there are some to do."""
    done = newest.step if newest else 0
    if done >= (job.plan.num_steps or 0):
        display.say(f"{run.name} is complete at step {done}; {_what_would_go_on(job.spec)}")
        return Ended(run, "completed")
    if newest is not None and _is_out_of_patience(run, job.spec, newest):
        display.say(
            f"{run.name} is complete at step {done}: {newest.without_better} validations in a row "
            f"were no better; a larger validation.patience would go on"
        )
        return Ended(run, "early_stopped")
    if job.until_step is not None and done >= job.until_step:
        return Ended(run, "stopped", _paused(job))
    if done:
        display.say(f"{run.name} goes on from step {done}")
    return None


def _is_out_of_patience(run: Run, spec: Spec, newest: CheckpointInfo) -> bool:
    """Whether the run was stopped early, by as much patience as it has now. A fork goes on from its
    origin's last step whatever ended that."""
    patience, own = spec.validation.patience, newest.path.startswith(f"{run.path}/")
    return own and patience is not None and newest.without_better >= patience


def _paused(job: Job) -> str:
    return f"step {job.until_step} is done, up to which it was to go"


def _name_end(recorder: Recorder, job: Job) -> tuple[str, str]:
    """The status of a run whose ranks have ended, and why."""
    status, wish = recorder.ended or "failed", recorder.wish
    if status == "interrupted" and wish is None and job.until_step is not None:
        return "stopped", _paused(job)
    if status != "interrupted" or wish is None:
        return status, ""
    return ("stopped" if wish.number is None else status), redact(wish.reason)


def _explain(run: Run, reason: str) -> str:
    """The diagnosis of a failed run, which must not stand in the way of the failure itself."""
    with patience(LAST_WORD_SECONDS):
        found, problem = caught(lambda: diagnose(run, reason=reason))
        cause = Cause.UNKNOWN if found is None else found.fault
        text = (
            f"no diagnosis could be made ({type(problem).__name__}: {problem})"
            if found is None
            else format_diagnosis(found)
        )
        with suppress(StorageFailed):
            run.log_event("failed", reason=reason, cause=str(cause))
    return text


@contextmanager
def _last_words(status: str) -> Iterator[None]:
    """Where a run has failed its end is written down if that can be done soon: the failure itself
    is told anyway."""
    if status != "failed":
        yield
        return
    with patience(LAST_WORD_SECONDS), suppress(StorageFailed):
        yield


def _what_would_go_on(spec: Spec) -> str:
    """What a person can do with a run that has done all its steps."""
    if spec.may_go_on_when_complete:
        return "a longer duration would go on"
    schedule = spec.schedule.name
    hint = (
        ""
        if schedule == "wsd"
        else ", and with schedule.decay_steps given from the start it would not"
    )
    return (
        f"its {schedule} schedule ends there{hint}: train on from its weights with another "
        "duration and --fork NEW_NAME"
    )


def _check_nodes(storage: str, spec: Spec, among: set[str] | None) -> None:
    """Raise StorageNotShared if a node that may hold a rank (`among` those with these ids, if
    given) sees another storage than this process does."""
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
        blind = find_nodes_without(sees, make_worker_needs(spec.resources), among)
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
