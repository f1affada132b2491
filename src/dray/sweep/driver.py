"""The driver of a sweep: as many trials at once as there is room for, each a run, until the budget
is used up.

A seat is a thread with a placement of its own, which its trials use one after the other. Whatever
happens to a trial is recorded before anything is decided by it, so that a sweep whose driver was
killed goes on from its log.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from dray.cluster.connection import connect
from dray.cluster.gauges import build_gauges
from dray.cluster.needs import make_worker_needs
from dray.cluster.placement import Mending, Placement, reserved
from dray.cluster.survey import survey_cluster
from dray.corpus.prepare import Corpus, prepare
from dray.errors import (
    Cause,
    Interrupted,
    RunFailed,
    StoppedWaiting,
    UserError,
    caught,
    one_line,
)
from dray.plan import Law, Plan, make_demands, num_steps_of, with_numbers
from dray.processes.signals import Wishes, stops
from dray.rank.job import make_corpus_plan
from dray.redaction import take_in_all
from dray.runs.drivers import Heart
from dray.runs.trackers import Ending, MlflowParent
from dray.show.sweeps import SweepDisplay
from dray.spec import Resources, Spec, make_spec
from dray.storage.filesystem import shown
from dray.sweep.bill import make_bill
from dray.sweep.events import FAILED, STOPPED, Begun, Ended, Reported
from dray.sweep.policies import make_policy
from dray.sweep.record import Sweep
from dray.sweep.room import (
    at_once,
    check_packing,
    count_here,
    count_in_cluster,
    count_in_memory,
    fixed,
    most_packed,
    pack,
)
from dray.sweep.space import Space, check_space
from dray.sweep.study import STATUSES, Scale, Study
from dray.sweep.summary import make_best_spec, summarize_study, summarize_trial, with_law
from dray.sweep.trial import Cadence, make_trial_spec, run_trial

LOOK_SECONDS = 0.5
"""How often the driver looks at the clock and at signals."""
KEEP_HOURS = 30 / 3600
"""How often the hours used so far are kept: so many are forgotten where a driver is killed."""
DATA_KEYS = ("task", "data", "tokenizer")
"""Sections of a spec that decide its corpus."""


def tune(
    tree: Mapping[str, Any],
    space: Space,
    *,
    storage: str = "./runs",
    name: str | None = None,
    space_name: str = "the space",
    address: str | None = None,
    verbose: bool = False,
    display: SweepDisplay | None = None,
    ladder: Mapping[str, Any] | None = None,
) -> Sweep:
    """Sweep a spec (as plain values), or go on with the sweep of that name. `ladder`: of what its
    trials are the rungs, which its record keeps.

    Raises UserError for what the caller can mend, before anything is written; RunFailed when too
    many trials were lost by one cause, or none gave a result; Interrupted when a person stopped it,
    with the state of every trial saved.
    """
    tree = take_in_all(dict(tree))  # what is kept has no credentials
    check_space(space, tree, space_name)
    spec = make_spec(tree)
    resources = fixed(spec.resources)
    spec = spec.model_copy(update={"resources": resources})
    name = name or f"{spec.name}-sweep"
    check_packing(resources, space.packing)
    if address is None and not _has_cluster():
        count_here(resources)  # before anything is started or written
    Sweep.check(storage, name, tree, space)
    display = display or SweepDisplay()
    with connect(
        address,
        num_cpus=cpus_here(resources, address, space.concurrency, space.packing),
        worker=make_worker_needs(resources),
        num_workers=resources.max_workers,
        verbose=verbose,
    ) as connection:
        count = count_here if connection.local else count_in_cluster
        count(resources)  # a trial that can never start is refused before anything is written
        for line in [] if connection.local else survey_cluster(resources).remarks():
            display.say(line)
        sweep = Sweep.begin(storage, name, tree, space, ladder)
        corpus = prepare(spec, storage, display.say)
        for line in corpus.describe() if corpus.is_new else ():
            display.say(line)
        plan = make_corpus_plan(spec, connection.shape, corpus.manifest)
        packed = pack(resources, plan, space.packing)
        if packed != resources:
            spec = spec.model_copy(update={"resources": packed})
            display.say(f"small trials are packed: each takes {_describe(packed)}")
        room = count(packed)
        if space.concurrency != "auto" and space.concurrency > room:
            display.say(f"concurrency {space.concurrency}: there is room for {room} trials at once")
        seats = at_once(room, space.concurrency)
        if connection.local and (fits := count_in_memory(plan)) < seats:
            display.say(f"memory has room for {fits} trials at once, CPUs for {seats}")
            seats = fits
        bill = make_bill(space, plan, make_demands(spec, plan))
        display.say(f"the sweep takes {'; '.join(bill.describe())}")
        law = _keep_law(sweep, spec, plan)
        if law is not None:
            tree, space = with_law(tree, space, law)
            spec = with_numbers(spec, law.learning_rate, law.global_rows)
        scale = _keep_scale(sweep, spec, space, corpus)
        work = _Work(_Setting(sweep, tree, spec, space, scale, corpus), display)
        work.run(min(seats, work.study.num_wanted or seats))
    return sweep


def _describe(resources: Resources) -> str:
    gpus = f"{resources.gpus_per_worker:g} GPU and " if resources.gpus_per_worker else ""
    return f"{gpus}{resources.cpus_per_worker:g} CPUs"


def _has_cluster() -> bool:
    import ray

    return bool(os.environ.get("RAY_ADDRESS")) or ray.is_initialized()


def cpus_here(
    resources: Resources,
    address: str | None,
    concurrency: int | str = "auto",
    packing: int | str = "auto",
) -> float:
    """CPUs of a Ray that is started for the sweep: of all trials at once, with their readers."""
    a_trial = resources.max_workers * resources.cpus_per_worker + resources.reader_cpus
    if address is not None or _has_cluster():
        return a_trial
    room = count_here(resources) * most_packed(resources, packing)
    return a_trial * at_once(room, concurrency)


def _keep_law(sweep: Sweep, spec: Spec, plan: Plan) -> Law | None:
    """What the Step Law says of the spec, where it says anything; looked up when the sweep
    begins."""
    record = sweep.record()
    if spec.why_no_law or "law" in record:
        return Law(**record["law"]) if record.get("law") else None
    sweep.update(law=plan.law and plan.law.model_dump())
    return plan.law


def _keep_scale(sweep: Sweep, spec: Spec, space: Space, corpus: Corpus) -> Scale:
    """How this sweep measures its trials; decided when it begins."""
    kept = sweep.record().get("scale")
    if kept:
        return Scale(**kept)
    metric = space.metric or spec.validation.metric
    rows, tokens = (
        corpus.manifest.train.num_rows,
        spec.batch.global_rows * spec.row_tokens,
    )
    total = num_steps_of(spec.duration, spec.batch.global_rows, tokens, rows) or 1
    better = space.mode or ("min" if spec.task.metrics[metric] == "lower" else "max")
    scale = Scale(
        better,
        total,
        spec.batch.global_rows,
        spec.seed,
        spec.resources.max_workers * spec.resources.gpus_per_worker,
        spec.resources.max_workers,
        counts_steps=space.scheduler.name == "pbt",
    )
    sweep.update(scale=vars(scale), metric=metric, mode=better)
    return scale


@dataclass(frozen=True)
class _Setting:
    """What all trials of a sweep share."""

    sweep: Sweep
    tree: Mapping[str, Any]
    spec: Spec
    """Of `tree`."""
    space: Space
    scale: Scale
    corpus: Corpus

    @property
    def sweeps_resources(self) -> bool:
        """Whether trials differ in what they take."""
        return any(path.startswith("resources.") for path in self.space.paths)


class _Work:
    """The trials at work."""

    def __init__(self, setting: _Setting, display: SweepDisplay) -> None:
        self._setting, self._display = setting, display
        sweep, spec, space, scale = setting.sweep, setting.spec, setting.space, setting.scale
        self._metric = space.metric or spec.validation.metric
        grace = space.scheduler.first_look(scale.total_steps)
        has_rungs = space.scheduler.name != "none"
        own = spec.validation.every_steps
        self._cadence = Cadence(min(grace, own or grace) if has_rungs else own)
        policy = make_policy(
            space.scheduler, scale.mode, scale.total_steps, grace, space.search.seed
        )
        self.study = Study(space, setting.tree, spec, scale, policy)
        self._changed = threading.Condition(threading.RLock())
        self._at_work: set[int] = set()
        self._reason = ""
        self._number: int | None = None
        """Of the signal that asked for it."""
        self._broken: BaseException | None = None
        """What ended a seat."""
        self._preparing = threading.Lock()
        self._hours = 0.0
        self._gauges = build_gauges(sweep.name)
        for _, event in sweep.events():
            self.study.apply(event)
        self.study.interrupt()

    # ---- the driver's thread --------------------------------------------------------------------

    def run(self, seats: int) -> None:
        """Run trials until nothing is left to begin. Raises RunFailed and Interrupted."""
        sweep, display = self._setting.sweep, self._display
        driver = sweep.take_over()
        heart = Heart(
            partial(sweep.heartbeat, driver),
            lambda error: self._stop("another driver has taken the sweep over"),
        )
        self._hours = float(sweep.record().get("hours", 0.0))
        parent = MlflowParent(self._setting.spec, sweep.storage, sweep.name, display.say)
        parent.start(self._setting.space.model_dump(mode="json", exclude_defaults=True))
        begun = time.monotonic()
        sweep.update(status="running", reason="")
        self._gauges.set("running", 1)
        self._watch()
        status, reason = "failed", "its driver ended"
        try:
            with heart, display.trials(self._summary), stops(noted=True) as signals:
                self._follow(seats, begun, signals)
            status, reason = self._name_end()
        finally:
            hours = self._hours + (time.monotonic() - begun) / 3600
            sweep.update(status=status, reason=reason, hours=hours)
            parent.finish(self._ending(status))
            self._gauges.set("running", 0)
            sweep.release(driver)
        if error := heart.replaced or self._broken:
            raise error
        best = self.study.best()
        if best is not None and "ladder" not in sweep.record():
            place = sweep.keep_best(
                make_best_spec(self._setting.tree, sweep.name, best, self._metric)
            )
            display.say(f"the spec of the best trial: {shown(place)}")
        if status == "interrupted":
            number = self._number or signal.SIGINT
            raise Interrupted(0, number, "every trial is saved; the same command goes on")
        if status == "failed":
            raise RunFailed(f"the sweep {sweep.name} failed: {reason}")

    def _follow(self, seats: int, begun: float, signals: Wishes) -> None:
        limit, kept = self._setting.space.budget.hours, self._hours
        threads = [
            threading.Thread(target=self._sit, name=f"seat-{index}", daemon=True)
            for index in range(seats)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            with self._changed:
                self._changed.wait(LOOK_SECONDS)
            hours = self._hours + (time.monotonic() - begun) / 3600
            if hours - kept > KEEP_HOURS:
                kept = hours
                self._setting.sweep.update(hours=hours)
            if signals and self._number is None:
                self._number = signals.numbers[0]
                self._stop(f"stopped by {signal.Signals(self._number).name}")
            elif limit is not None and hours >= limit:
                self._stop(f"its {limit:g} hours are over")
            self._display.look()
            self._gauges.keep()

    def _stop(self, reason: str) -> None:
        with self._changed:
            self._reason = self._reason or reason
            self._changed.notify_all()

    def _name_end(self) -> tuple[str, str]:
        """The status of the sweep, and why."""
        study = self.study
        if self._broken is not None:
            return "failed", self._reason
        if self._number is not None:
            return "interrupted", self._reason
        if cause := study.ruin():
            lost = [trial for trial in study.trials.values() if trial.cause == cause]
            return "failed", f"{len(lost)} trials were lost by {cause}: {lost[-1].reason}"
        if study.best() is None:
            return "failed", "no trial gave a result"
        if self._reason:
            return "stopped", self._reason
        used = study.spent()
        return "completed", "" if used in ("", "trials") else f"the budget of {used} is used up"

    def _ending(self, status: str) -> Ending:
        summary = self._summary()
        best = summary["best"]
        if best is None:
            return Ending(status, {}, {})
        metrics = next(t["metrics"] for t in summary["trials"] if t["name"] == best["name"])
        return Ending(status, metrics, best["parameters"])

    def _summary(self) -> dict[str, Any]:
        with self._changed:
            return summarize_study(self.study, self._setting.sweep.name, "running", self._metric)

    # ---- a seat's thread ------------------------------------------------------------------------

    def _sit(self) -> None:
        """Run trials until none is left. What is no trial's failure, e.g. a storage that no longer
        takes the log, ends the sweep."""
        _, error = caught(self._run_trials)
        if error is not None:
            self._broken = self._broken or error
            self._stop(f"{type(error).__name__}: {one_line(error)}")

    def _run_trials(self) -> None:
        """One trial after the other in a placement. A seat that has nothing to do holds none: the
        others' trials may need the room, to begin again elsewhere."""
        while self._wait_for_work():
            if not self._setting.sweeps_resources:
                with self._place(self._setting.spec) as placement:
                    while (
                        placement is not None
                        and not placement.is_broken()
                        and (begun := self._take()) is not None
                    ):
                        self._try(begun, self._trial_spec(begun), placement)
            elif (begun := self._take()) is not None:
                spec = self._trial_spec(begun)
                with self._place(spec) as placement:
                    self._try(begun, spec, placement)

    def _wait_for_work(self) -> bool:
        """Whether a trial can begin; waits while those at work may still have to begin again."""
        with self._changed:
            while not self._reason:
                if self.study.can_begin:
                    return True
                if not self._at_work:
                    return False
                self._changed.wait(LOOK_SECONDS)
            return False

    @contextmanager
    def _place(self, spec: Spec | Ended) -> Iterator[Placement | None]:
        """A placement once there is room for it; none if nothing is left to do by then."""
        if isinstance(spec, Ended):
            yield None
            return
        with reserved(spec.resources) as placement:
            try:
                placement.wait(self._display.say, self._nothing_left)
            except StoppedWaiting:
                yield None
                return
            yield placement

    def _nothing_left(self) -> str:
        with self._changed:
            return self._reason or ("" if self.study.can_begin else "no trial is left")

    def _take(self) -> Begun | None:
        """The next trial, recorded as begun; none if none can begin now."""
        with self._changed:
            while not self._reason:
                event = self.study.next()
                if event is None:
                    return None
                self._record(event)
                if isinstance(event, Begun):
                    self._at_work.add(event.trial)
                    return event
            return None

    def _trial_spec(self, begun: Begun) -> Spec | Ended:
        setting = self._setting
        try:
            spec = make_trial_spec(setting.tree, setting.space, begun, setting.scale, self._cadence)
            sweeps = setting.sweeps_resources
            resources = fixed(spec.resources) if sweeps else setting.spec.resources
            return spec.model_copy(update={"resources": resources})
        except UserError as error:
            return Ended(begun.trial, FAILED, cause=Cause.CONFIGURATION, reason=one_line(error))

    def _try(self, begun: Begun, spec: Spec | Ended, placement: Placement | None) -> None:
        """Run a trial and record how it ended."""
        number = begun.trial
        if isinstance(spec, Ended) or placement is None:
            ended = spec if isinstance(spec, Ended) else Ended(number, STOPPED)
        else:
            ended = self._run(spec, begun, placement)
        with self._changed:
            self._record(ended)
            self._at_work.discard(number)
            self._changed.notify_all()
            trial = self.study.trials[number]
            self._display.ended(
                summarize_trial(
                    trial, self._setting.sweep.name, self._metric, self._setting.scale.sign
                )
            )

    def _run(self, spec: Spec, begun: Begun, placement: Placement) -> Ended:
        number = begun.trial
        try:
            corpus = self._find_corpus(spec)
        except UserError as error:
            return Ended(number, FAILED, cause=Cause.DATA, reason=one_line(error))
        return run_trial(
            spec,
            begun,
            sweep=self._setting.sweep.name,
            storage=self._setting.sweep.storage,
            corpus=corpus,
            placement=placement,
            metric=self._metric,
            scale=self._setting.scale,
            report=self._report,
            stop=partial(self._why_stop, number, Mending(placement)),
            judged=partial(self._judged, number),
            display=self._display.of_trial(number),
        )

    def _find_corpus(self, spec: Spec) -> Corpus:
        """The sweep's corpus; for a trial with other data its own, prepared by one seat at a
        time."""
        before, now = self._setting.spec.model_dump(), spec.model_dump()
        told = any(column.told for column in spec.task.columns)  # by the model that it begins with
        keys = (*DATA_KEYS, "model", "seed") if told else DATA_KEYS
        if all(before[key] == now[key] for key in keys):
            return self._setting.corpus
        with self._preparing:
            return prepare(spec, self._setting.sweep.storage, self._display.say)

    def _report(self, event: Reported) -> None:
        with self._changed:
            if self.study.counts(event):
                self._record(event)

    def _record(self, event: Begun | Reported | Ended) -> None:
        """Keep an event, and then go by it."""
        self._setting.sweep.log(event)
        self.study.apply(event)
        self._gauges.set("progress_timestamp_seconds", time.time())
        if not isinstance(event, Reported):
            self._watch()

    def _watch(self) -> None:
        """Set the gauges of what trials begin and end with."""
        if not self._gauges.is_read:
            return
        numbers = dict.fromkeys(STATUSES, 0)
        for trial in self.study.trials.values():
            numbers[trial.status] += 1
        for status, number in numbers.items():
            self._gauges.set("sweep_trials", number, status)
        if (best := self.study.best()) is not None:
            self._gauges.set("sweep_best", best.value, self._metric)

    def _judged(self, number: int) -> str:
        """How a trial ends that the sweep itself has stop; empty: it has not."""
        with self._changed:
            return self.study.verdict(number)

    def _why_stop(self, number: int, mending: Mending) -> str:
        with self._changed:
            reason = self._reason or self.study.verdict(number)
        if not reason and mending.is_hopeless():
            return "it lost a part of its placement with a node; it begins again in a new one"
        return reason
