"""The stages of a release: what each finds there already, and what it does otherwise.

Whether something is there goes by what it is: a corpus by its key, a run by its fingerprint, a
checkpoint by the digest of its manifest, a compressed run by what it was made from and how, an
export by the weights in its manifest, a version by its pinned weights.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from dray.corpus.prepare import prepare
from dray.corpus.redacting import make_redactor
from dray.errors import PlanError, RunFailed, SpecError, StoreError, UserError
from dray.release.compress.compress import compress, default_name
from dray.release.compress.gate import make_limits
from dray.release.compress.methods import make_methods
from dray.release.evaluate import evaluate, prepare_other
from dray.release.export.exporting import check_suits, identify, write_export
from dray.release.export.forms import Options
from dray.release.export.manifest import is_export, load_told, verify_folder
from dray.release.export.signing import load_signer
from dray.release.export.staging import check_free
from dray.release.trained import Trained, open_trained
from dray.runs import CheckpointReader, Run
from dray.runs.finished import is_name_free
from dray.serve.following import POLL_SECONDS
from dray.serve.foreground import (
    check_installed,
    check_open,
    is_service,
    is_taken,
    promoted_version,
    serve_models,
)
from dray.serve.limits import Limits
from dray.serve.pinning import pin
from dray.serve.promoting import check_kind, kind_of_task, promote
from dray.serve.request_log import Logged, check_log
from dray.serve.served import Served
from dray.serve.tls import read_tls
from dray.serve.versions import Record
from dray.spec import Export, Serve, Spec
from dray.train.driver import train

FOLLOWING_SECONDS = 180.0
"""How long a service that answers already is waited for to follow."""
MOST_NAMES = 1000
"""How many runs of one name and a number are looked through for one that is there already."""


@dataclass(frozen=True)
class Told:
    """What became of a stage."""

    what: str
    artifact: str = ""
    """Where what it made lies: a folder, or the name of a run or of a service."""
    was_there: bool = False
    missed: str = ""
    """The gate that does not hold."""


@dataclass(frozen=True)
class Done:
    """A stage that was gone through."""

    stage: str
    was_there: bool
    what: str
    seconds: float
    artifact: str


class Release:
    """One spec on its way. Stages are its methods, called in order."""

    def __init__(
        self,
        spec: Spec,
        storage: str,
        name: str,
        *,
        address: str | None,
        verbose: bool,
        say: Callable[[str], None],
    ) -> None:
        self._spec, self._storage, self._name, self._say = spec, storage, name, say
        self._address, self._verbose = address, verbose
        self._corpus: Any = None
        self._compressed: str | None = None

    def check(self, stages: Sequence[str]) -> None:
        """Raise UserError for what of the spec's sections cannot be, before anything is done."""
        spec, folders = self._spec, set[str]()
        if spec.compress is not None and "compress" in stages:
            with _said("--with", "compress.methods"):
                for method in make_methods(spec.compress.methods):
                    method.suits(spec)
        for number, one in enumerate(spec.export if "export" in stages else ()):
            with _said("--", f"export.{number}."):
                check_suits(_options(one), spec)
                if one.sign is not None:
                    load_signer(one.sign)
            folder = self._folder(one, self._exported_name(one), 0)
            if folder in folders:
                raise SpecError(
                    f"export.{number}.folder = {folder}",
                    "is that of another export, too",
                    "each has a folder of its own",
                )
            folders.add(folder)
            if "{step}" not in one.folder and not is_export(folder):
                with _said(folder, f"export.{number}.folder = {folder}"):
                    check_free(folder)
        if spec.serve is not None and "promote" in stages:
            name = spec.serve.name or self._name
            check_kind(Record(self._storage, name), kind_of_task(spec.task), "what the spec trains")
            if "serve" in stages:
                check_installed()
                self._check_port()
                with _said("--", "serve."):
                    check_open(spec.serve.host, self._storage)
                    read_tls(spec.serve.tls_cert, spec.serve.tls_key)
                    make_redactor(spec.serve.redact, "serve.redact")
                    if spec.serve.log and not self._address:
                        check_log(Logged(file=os.path.abspath(spec.serve.log)))

    # --- training --------------------------------------------------------------------------------

    def prepare(self) -> Told:
        """Raw data → token shards; a run that has begun keeps its own."""
        if (run := Run.find(self._storage, self._name)) is not None:
            return Told(f"run {self._name} has its rows", run.corpus, was_there=True)
        corpus = prepare(self._spec, self._storage, self._say)
        for line in corpus.describe() if corpus.is_new else ():
            self._say(line)
        rows = f"{corpus.manifest.train.num_rows:,} rows"
        self._corpus = corpus
        return Told(rows, corpus.folder, was_there=not corpus.is_new)

    def train(self) -> Told:
        """A run, begun or gone on with."""
        before = self._newest_step()
        ended = train(
            self._spec,
            storage=self._storage,
            run_name=self._name,
            address=self._address,
            verbose=self._verbose,
            corpus=self._corpus,
        )
        step = self._newest_step()
        what = f"run {self._name}, {ended.status} at step {step:,}"
        return Told(what, self._name, was_there=step == before)

    def _newest_step(self) -> int:
        run = Run.find(self._storage, self._name)
        newest = None if run is None else run.latest_checkpoint()
        return 0 if newest is None else newest.step

    # --- the checkpoint that is released ---------------------------------------------------------

    @cached_property
    def _trained(self) -> Trained:
        """What was trained, at the step that is released."""
        step = None if self._spec.evaluate is None else self._spec.evaluate.step
        if step is None:
            step = "newest" if self._spec.data.validation is None else "best"
        return open_trained(self._storage, self._name, None if step == "newest" else step)

    @property
    def step(self) -> int | None:
        """The step that is released, once a stage has asked for it."""
        found = self.__dict__.get("_trained")
        return None if found is None else found.checkpoint.step

    @cached_property
    def _digest(self) -> str:
        """Of the manifest of the checkpoint that is released."""
        with CheckpointReader(self._trained.run, self._trained.checkpoint) as reader:
            return reader.manifest_sha256

    def evaluate(self) -> Told:
        """Metrics of the checkpoint, held against the gate."""
        section, trained = self._spec.evaluate, self._trained
        assert section is not None
        data = section.words
        corpus = None
        if data:
            with _said("--data", "evaluate.data"):
                corpus = prepare_other(trained, data, self._storage)[0].folder
        known = {"manifest_sha256": self._digest, "corpus": corpus and os.path.basename(corpus)}
        found = trained.run.find_evaluation(known)
        was_there = found is not None
        if found is None:
            with _said("--data", "evaluate.data"):
                found = evaluate(
                    self._storage,
                    self._name,
                    data=data or None,
                    step=trained.checkpoint.step,
                    address=self._address,
                    verbose=self._verbose,
                )
            trained.run.keep_evaluation(known, found, data)
        shown = [_shown(name, found.get(name)) for name in section.gate or trained.task.metrics]
        what = f"step {trained.checkpoint.step:,}, {found['num_rows']:,} rows: {', '.join(shown)}"
        return Told(what, self._name, was_there, _missed(section.gate, found, trained.task.metrics))

    # --- what is made of it ----------------------------------------------------------------------

    def compress(self) -> Told:
        """A smaller run; one that was made of this checkpoint by these methods is taken."""
        section, trained = self._spec.compress, self._trained
        assert section is not None
        methods = make_methods(section.methods)
        source = {"run": self._name, "step": trained.checkpoint.step}
        source |= {"manifest_sha256": self._digest, "methods": [one.told() for one in methods]}
        drops = [f"{metric}={amount}" for metric, amount in section.max_drop.items()]
        name, found = self._find_made(section.name or default_name(self._name, methods), source)
        if found is not None:
            table = found.compression() or {}
            limits = make_limits(drops, trained.task.metrics)
            table["gate"] = [limit.judge(table.get("metrics") or {}) for limit in limits]
        else:
            with _said("--with", "compress.methods", "--max-drop", "compress.max_drop"):
                table = compress(
                    self._storage,
                    self._name,
                    section.methods,
                    new_name=name,
                    step=trained.checkpoint.step,
                    max_drop=drops,
                    train=partial(train, address=self._address, verbose=self._verbose),
                    address=self._address,
                    verbose=self._verbose,
                    say=self._say,
                ).table
        missed = [one["metric"] for one in table["gate"] if not one["holds"]]
        self._compressed = name
        return Told(
            f"run {name}, {_smaller(table, section.max_drop or [self._spec.validation.metric])}",
            name,
            was_there=found is not None,
            missed=f"{', '.join(missed)} of {name} got worse by more than compress.max_drop allows"
            if missed
            else "",
        )

    def _find_made(self, name: str, source: Mapping[str, Any]) -> tuple[str, Run | None]:
        """The run of that name, or of one with a number after it, that was made from `source`; else
        the first such name that is free. Raises StoreError where there is neither."""
        given = self._spec.compress is not None and self._spec.compress.name is not None
        for number in range(1, MOST_NAMES):
            called = name if number == 1 else f"{name}-{number}"
            if is_name_free(self._storage, called):
                return called, None
            run = Run.find(self._storage, called)
            made = None if run is None else run.compressed()
            if run is not None and made and all(made.get(key) == source[key] for key in source):
                return called, run
            if given:
                break
        raise StoreError(
            f"compress.name = {name}",
            "is another run, not made from this checkpoint by these methods",
            "a run stays what it is",
            "give another name, or leave it out",
        )

    def export(self) -> Told:
        """Folders for others; one that holds these weights in this form is taken."""
        told = [
            self._export(number, one, self._take(one))
            for number, one in enumerate(self._spec.export)
        ]
        return Told(
            "; ".join(one.what for one in told),
            ", ".join(one.artifact for one in told),
            was_there=all(one.was_there for one in told),
        )

    def _take(self, section: Export | Serve) -> tuple[str, int]:
        """Name and step of the run that is exported or served."""
        name = self._name if section.of == "trained" else self._compressed or self._name
        return name, self._trained.checkpoint.step

    def _export(self, number: int, section: Export, taken: tuple[str, int]) -> Told:
        name, step = taken
        options = _options(section)
        folder = self._folder(section, name, step)
        trained = open_trained(self._storage, name, step, unpacked=True)
        what = f"{folder} ({section.format})"
        if is_export(folder):
            wanted = identify(trained).to_json() | options.told()
            told = load_told(folder)
            different = [key for key in wanted if told.get(key) != wanted[key]]
            if different:
                raise StoreError(
                    folder,
                    f"holds another export: {_differences(told, wanted, different)}",
                    "nothing is overwritten",
                    f"move it away, or give export.{number}.folder with {{step}} in it",
                )
            public = None if section.sign is None else load_signer(section.sign).public
            report = verify_folder(folder, public)
            if not report.ok:
                raise StoreError(
                    folder, f"is damaged: {report.problems[0]}", "", "move it away, and try again"
                )
            if section.sign is not None and report.signature == "none":
                raise StoreError(folder, "is not signed", "", "move it away, and try again")
            return Told(what, folder, was_there=True)
        with _said("--", f"export.{number}."):
            write_export(trained, folder, options, say=self._say)
        return Told(what, folder)

    def _exported_name(self, section: Export) -> str:
        """The run that an export is of, before there is one: as far as can be told."""
        if section.of == "trained" or self._spec.compress is None:
            return self._name
        given = self._spec.compress.name
        return given or default_name(self._name, make_methods(self._spec.compress.methods))

    @staticmethod
    def _folder(section: Export, name: str, step: int) -> str:
        return section.folder.replace("{run}", name).replace("{step}", str(step))

    # --- serving ---------------------------------------------------------------------------------

    @property
    def _served(self) -> Served:
        section = self._spec.serve
        assert section is not None
        name, step = self._take(section)
        return pin(
            Served(name=section.name or self._name, storage=self._storage, run=name, step=step)
        )

    def promote(self) -> Told:
        """A version of the served name; services of this storage follow."""
        served = self._served
        record = Record(self._storage, served.called)
        state = record.read()
        answering = state.versions.get(state.stable)
        was_there = answering is not None and answering.bare == served.bare
        if not was_there or state.canary is not None or state.shadow is not None:
            state, was_there = promote(record, served), False
        what = f"version {state.stable} of {served.called}: {served.run}@{served.step}"
        return Told(what, served.called, was_there)

    @property
    def is_served(self) -> bool:
        """Whether somebody listens there already."""
        section = self._spec.serve
        if section is None or self._address:
            return False
        return is_taken(section.host, section.port)

    @property
    def _place(self) -> str:
        """Where it is served."""
        section = self._spec.serve
        assert section is not None
        return f"{section.scheme}://{section.host}:{section.port}"

    def _check_port(self) -> None:
        """Raise PlanError where somebody else listens."""
        section = self._spec.serve
        if section is not None and self.is_served and not is_service(self._place):
            raise PlanError(
                f"serve.port = {section.port}",
                f"something that is no service of models answers at {self._place}",
                "a port has one server",
                "give another port",
            )

    def _followed(self, place: str, name: str) -> str:
        """What becomes of a service that answers already: it follows what was promoted, once the
        new version's replicas are there, and that is awaited where anybody may ask what answers."""
        wanted = Record(self._storage, name).read().stable
        end = time.monotonic() + FOLLOWING_SECONDS
        told = False
        while (found := promoted_version(place, name)) is not None and time.monotonic() < end:
            if found == wanted:
                return f"{place} answers for {name} by version {wanted}"
            if not told:
                self._say(f"{place} answers by version {found}; version {wanted} is on its way")
                told = True
            time.sleep(POLL_SECONDS)
        if found is None:
            return f"somebody answers at {place}: a `dray serve` of this storage follows by itself"
        return (
            f"{place} still answers for {name} by version {found}: is it a `dray serve` of this "
            "storage?"
        )

    def serve(self) -> Told:
        """Answers until it is told to stop; where somebody listens already, that is left so."""
        section, served = self._spec.serve, self._served
        assert section is not None
        place = self._place
        if self.is_served:
            self._check_port()
            return Told(self._followed(place, served.called), place, was_there=True)
        serve_models(
            [served],
            host=section.host,
            port=section.port,
            replicas=section.range,
            address=self._address,
            verbose=self._verbose,
            limits=Limits(),
            storage=self._storage,
            say=self._say,
            tls=read_tls(section.tls_cert, section.tls_key),
            logged=Logged(file=os.path.abspath(section.log)) if section.log else None,
            feedback=section.feedback,
            redactor=make_redactor(section.redact, "serve.redact"),
        )
        return Told(f"{place} has ended", place)


def _options(section: Export) -> Options:
    return Options(
        form=section.format,
        values=section.values,
        license=section.license,
        key_file=section.sign,
    )


def _missed(gate: Mapping[str, float], found: Mapping[str, Any], better: Mapping[str, str]) -> str:
    """What of the gate does not hold; a metric that stands for nothing on the rows does not."""
    told = []
    for metric, bound in gate.items():
        value, higher = found.get(metric), better[metric] == "higher"
        if value is None or not (value >= bound if higher else value <= bound):
            least = "at least" if higher else "at most"
            told.append(f"{_shown(metric, value)}, and {least} {bound:g} is wanted")
    return f"evaluate.gate: {'; '.join(told)}" if told else ""


def _shown(metric: str, value: float | None) -> str:
    return f"{metric} {_value(value)}"


def _value(value: float | None) -> str:
    return "undefined on these rows" if value is None else f"{value:.4g}"


def _smaller(table: Mapping[str, Any], metrics: Iterable[str]) -> str:
    """Sizes and times of a compressed run, and what became of some metrics."""
    before, after = (table["sizes"][when]["weights_bytes"] for when in ("before", "after"))
    speed = table["speed"]["row_seconds"]["speedup"]
    changes = [
        f"{_shown(name, found['before']['value'])} → {_value(found['after']['value'])}"
        for name in metrics
        if (found := table["metrics"].get(name)) is not None
    ]
    return f"÷ {before / max(1, after):.2f} on disk, × {speed:.2f} as fast; {', '.join(changes)}"


def _differences(told: Mapping[str, Any], wanted: Mapping[str, Any], keys: Sequence[str]) -> str:
    key = next((key for key in ("run", "step", "format") if key in keys), keys[0])
    return f"{key} {told.get(key)} instead of {wanted[key]}"


@contextmanager
def _said(*names: str) -> Iterator[None]:
    """Name keys of the spec in errors instead of the options of commands that nobody has typed:
    `names` are options, each followed by its key."""
    try:
        yield
    except RunFailed:
        raise
    except UserError as error:
        where = error.where
        for option, key in zip(names[::2], names[1::2], strict=True):
            if where.startswith(option):
                where = f"{key}{where[len(option) :]}"
                break
        raise type(error)(where, error.what, error.rule, error.way_out) from error
