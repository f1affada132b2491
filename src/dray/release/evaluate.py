"""Metrics of a run's checkpoint on its validation rows, or on other data prepared with the run's
own tokeniser."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from dray.cluster.connection import connect
from dray.cluster.needs import Needs
from dray.corpus.manifest import Split
from dray.corpus.prepare import Corpus, prepare
from dray.corpus.sources import suffix_form
from dray.corpus.tools import with_kept_files
from dray.errors import CorpusError, PlanError, SpecError, UserError
from dray.origin import Origin, make_origin
from dray.release.measuring import measure, measure_on_workers
from dray.release.trained import Chosen, Trained, Weights, load_trained, open_trained
from dray.spec import BadYaml, Source, Spec, make_spec, read_yaml
from dray.storage.filesystem import parent
from dray.tasks import Task, TaskMetrics


@dataclass(frozen=True)
class Measured:
    """A run's checkpoint that was measured on rows: the metrics keep what it gave for them."""

    trained: Trained
    task: Task
    corpus: Corpus
    split: Split
    metrics: TaskMetrics

    def told(self) -> dict[str, Any]:
        """As `evaluate` tells it."""
        trained, split = self.trained, self.split
        values: dict[str, float | None] = self.task.measured(self.metrics, split)
        told = {"run": trained.run.name, "step": trained.checkpoint.step}
        told |= {"num_rows": split.num_rows}
        kind = {} if trained.weights == "trained" else {"weights": trained.weights}
        return told | kind | trained.chosen.told() | values


def evaluate(
    storage: str, name: str, *, report: dict[str, dict[str, float]] | None = None, **settings: Any
) -> dict[str, Any]:
    """Metrics by name, with `step` and `num_rows` (and `weights`, where they are not the trained
    ones); None for one that stands for nothing on these rows. `report` gets what the task tells
    besides, by what it is of. Settings and errors are those of `measure_run`.
    """
    measured = measure_run(storage, name, **settings)
    if report is not None:
        report.update(measured.task.report(measured.metrics))
    return measured.told()


def measure_run(
    storage: str,
    name: str,
    *,
    data: Sequence[str] | None = None,
    step: str | int | None = None,
    weights: Weights = "trained",
    chosen: Chosen = Chosen(),  # noqa: B008 - frozen
    thorough: bool = False,
    workers: int | None = None,
    address: str | None = None,
    verbose: bool = False,
    by_row: bool = False,
) -> Measured:
    """A run's checkpoint measured.

    `data`: paths, or YAML mappings like a spec's data source; none: the run's validation rows.
    Other data may be any slice, of one class alone, too. `thorough`: to the letter of the task's
    metric, at a greater cost (`Task.thorough`). `workers`: how many measure at once, on Ray, with a
    CPU and, where the cluster has GPUs, a GPU each; none: this process does, and needs no Ray for
    the validation rows. `by_row`: metrics that keep sums of batches get each row by itself. Raises
    UserError for data that cannot be evaluated.
    """
    if workers is not None and workers < 1:
        raise PlanError("--workers", f"is {workers}", "at least one worker measures")
    trained = (open_trained if workers else load_trained)(storage, name, step, weights, chosen)
    task = trained.task
    if thorough:
        exact = task.thorough()
        if exact is None:
            raise SpecError(
                "--thorough",
                f"{task.name} is evaluated to the letter in any case",
                "it is for tasks whose validation takes a shorter way",
                "leave it out",
            )
        task = exact
    rows = None if data else held_out(trained)
    with ExitStack() as stack:
        if data or workers:
            stack.enter_context(
                connect(
                    address,
                    num_cpus=workers or 1,
                    worker=Needs({"CPU": 1.0} if workers else {}),
                    verbose=verbose,
                )
            )
        corpus, split = rows or prepare_other(trained, data or (), storage)
        if workers:  # which read it when their turn comes
            stack.enter_context(trained.run.hold(trained.checkpoint))
            metrics = measure_on_workers(trained, task, corpus, split, workers, by_row=by_row)
        else:
            every = split.num_rows
            metrics = measure(trained, task, corpus, split, first=0, end=every, by_row=by_row)
    return Measured(trained, task, corpus, split, metrics)


def held_out(trained: Trained) -> tuple[Corpus, Split]:
    """The run's validation rows."""
    if trained.manifest.validation is None:
        raise CorpusError(
            f"run {trained.run.name!r}", "has no validation rows", way_out="name data with --data"
        )
    return Corpus(trained.corpus, trained.manifest), trained.manifest.validation


def prepare_other(trained: Trained, data: Sequence[str], storage: str) -> tuple[Corpus, Split]:
    """Rows of other documents: the run's own settings, but nothing deduplicated or held out."""
    from dray.show.progress import Display

    with said_of_data():
        spec = make_evaluation_spec(trained.spec, data, trained.tokenizer_folder)
        corpus = prepare(
            spec,
            storage,
            Display().say,
            trained.manifest.labels,
            origin=_kept_origin(trained),
            fitted=trained.manifest.fitted,
        )
    return corpus, corpus.manifest.train


def _kept_origin(trained: Trained) -> Origin | None:
    """The weights that the run began with, as it keeps them; None: they were drawn."""
    kept = (trained.run.model() or {}).get("pretrained")
    return make_origin(kept, trained.run.storage) if kept else None


@contextmanager
def said_of_data() -> Iterator[None]:
    """Name `--data` in errors instead of the key that it stands for, which nobody has typed. A key
    is where the error is, or what the error begins with; a path that reads like one is left
    alone."""
    try:
        yield
    except UserError as error:
        where = re.sub(r"^data\.train(\.\d+)?(\.path)?$", "--data", error.where)
        where = re.sub(r"^data\.train(?:\.\d+)?\.(\w+)$", r"\1 of --data", where)
        what = error.what
        if error.where == "--data":  # of the spec that is made of it
            what = re.sub(r"^(unknown key )?data\.train\.\d+\.([\w.]+)", r"\1\2 of --data", what)
        raise type(error)(where, what, error.rule, error.way_out) from error


def make_evaluation_spec(spec: Spec, data: Sequence[str], tokenizer_folder: str) -> Spec:
    """The spec whose training documents are the data to evaluate.

    They are read as the run's own source of their kind is, but for what a mapping says otherwise.
    """
    sources = []
    for text in data:
        value = as_source(text)
        given = value.get("path")
        paths = [
            path
            for path in (given if isinstance(given, list) else [given])
            if isinstance(path, str)
        ]
        like = similar_source(spec, paths)
        own = {"path", "weight", "exclude", "records"}
        sources.append(like.model_dump(mode="json", exclude=own) | value)
    tree = spec.model_dump(mode="json")
    cleaning = tree["data"]["cleaning"] | {"deduplicate": "none"}
    cleaning.pop("near", None)
    tree["data"] |= {
        "train": sources,
        "validation": None,
        "cleaning": cleaning,
        "balance": 0.0,
    }
    tree["task"] = with_kept_files(spec.task, parent(tokenizer_folder))
    if spec.task.tokenizes:
        tree["tokenizer"] = {"path": tokenizer_folder}
    return make_spec(tree, "--data", kept=True)


def as_source(text: str) -> dict[str, Any]:
    """A value of `--data` as a source: a path, or a mapping. Raises SpecError."""
    if os.path.lexists(text):
        return {"path": text}
    try:
        value = read_yaml(text)
    except BadYaml as error:
        if text.startswith("{"):
            raise SpecError("--data", f"{text!r}: {error}", "a mapping is YAML") from error
        value = text
    if isinstance(value, dict):
        return value
    if not isinstance(value, str):
        raise SpecError(
            "--data",
            f"{text!r} is neither a path nor a mapping",
            way_out="e.g. '{path: test.tsv, header: false}'",
        )
    return {"path": text}


def similar_source(spec: Spec, paths: Sequence[str]) -> Source:
    """The run's own source that tells how to read the paths: one that names them, one of their
    form, or the first.

    Validation sources come first, as they are what is measured otherwise. A source of another form
    tells the columns alone.
    """
    validation = spec.data.validation if isinstance(spec.data.validation, tuple) else ()
    known = (*validation, *spec.data.train)
    named = {os.path.abspath(path) for path in paths}
    for source in known:
        if named and named <= {os.path.abspath(path) for path in source.paths}:
            return source
    forms = {suffix_form(path) for path in paths} - {""}
    for source in known:
        own = {suffix_form(path) for path in source.paths} - {""}
        # A suffix such as .txt says little beside a format that the source states.
        fits = (
            forms <= own | {source.format, "text"}
            if source.format != "auto"
            else not own or forms <= own
        )
        if fits:
            return source
    return known[0].model_copy(update={"format": "auto", "gather": None})
