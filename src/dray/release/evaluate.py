"""Metrics of a run's checkpoint on its validation rows, or on other data prepared with the run's
own tokeniser."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from dray.corpus.manifest import Split
from dray.corpus.prepare import Corpus, prepare
from dray.corpus.sources import suffix_form
from dray.corpus.stream import read_rows
from dray.errors import CorpusError, SpecError, UserError
from dray.release.trained import Trained, Weights, load_trained
from dray.spec import BadYaml, Source, Spec, make_spec, read_yaml
from dray.tasks import draw_of

MAX_BATCH_ROWS, BATCH_TOKENS = 32, 32_768
LOGIT_BYTES = 512 * 1024 * 1024
"""Logits of a batch in fp32, at most; one row is the least that a batch can have."""


def evaluate(
    storage: str,
    name: str,
    *,
    data: Sequence[str] | None = None,
    step: str | int | None = None,
    weights: Weights = "trained",
    address: str | None = None,
    verbose: bool = False,
    report: dict[str, dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Metrics by name, with `step` and `num_rows` (and `weights`, where they are not the trained
    ones); None for one that stands for nothing on these rows. `report` gets what the task tells
    besides, by what it is of.

    `data`: paths, or YAML mappings like a spec's data source; none: the run's validation rows.
    Other data may be any slice, of one class alone, too. Raises UserError for data that cannot be
    evaluated.
    """
    trained = load_trained(storage, name, step, weights)
    if data:
        corpus = _prepare_other(trained, data, storage, address, verbose)
        split = corpus.manifest.train
    else:
        corpus, validation = Corpus(trained.corpus, trained.manifest), trained.manifest.validation
        if validation is None:
            raise CorpusError(
                f"run {name!r}", "has no validation rows", way_out="name data with --data"
            )
        split = validation
    values = measure(trained, corpus, split, report)
    told = {"run": name, "step": trained.checkpoint.step, "num_rows": split.num_rows}
    return told | ({} if weights == "trained" else {"weights": weights}) | values


@torch.no_grad()
def measure(
    trained: Trained,
    corpus: Corpus,
    split: Split,
    report: dict[str, dict[str, float]] | None = None,
) -> dict[str, float | None]:
    """The task's metrics of a model over all rows of a split, in this process, on the GPU where
    there is one."""
    spec = trained.spec
    task = spec.task.on(trained.manifest, spec.model.num_labels)
    metrics = task.new_metrics()
    device = trained.move_to_device()
    objective = task.objective(trained.model).eval()
    width, group = trained.manifest.sequence_tokens, corpus.manifest.group_rows
    outputs = trained.manifest.vocab_size if task.head.over == "vocabulary" else task.num_labels
    num_rows = batch_rows(width, outputs * (width if task.head.each == "token" else 1))
    for start in range(0, split.num_rows, group):  # a group is read at once
        ids = np.arange(start, min(start + group, split.num_rows), dtype=np.int64)
        rows = read_rows(corpus.folder, corpus.manifest, split, ids)
        for first in range(0, rows.num_rows, num_rows):
            batch = task.collate(rows.slice(first, num_rows), draw_of(spec.seed, 0))
            batch = {key: tensor.to(device) for key, tensor in batch.items()}
            _, output = objective(batch)
            metrics.update(batch, output)
    if report is not None:
        report.update(task.report(metrics))
    values: dict[str, float | None] = {**task.complete(metrics.compute(), split)}
    return values | dict.fromkeys(metrics.undefined())


def batch_rows(width: int, num_outputs: int) -> int:
    """Rows of `width` tokens and `num_outputs` logits each that are computed at once."""
    return max(1, min(MAX_BATCH_ROWS, BATCH_TOKENS // width, LOGIT_BYTES // (4 * num_outputs)))


def _prepare_other(
    trained: Trained, data: Sequence[str], storage: str, address: str | None, verbose: bool
) -> Corpus:
    """Rows of other documents: the run's own settings, but nothing deduplicated or held out."""
    from dray.cluster.connection import connect
    from dray.show.progress import Display

    with said_of_data():
        spec = make_evaluation_spec(trained.spec, data, trained.tokenizer_folder)
    with connect(address, num_cpus=1, verbose=verbose), said_of_data():
        return prepare(spec, storage, Display().say, trained.manifest.labels)


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
        value = _as_source(text)
        given = value.get("path")
        paths = [
            path
            for path in (given if isinstance(given, list) else [given])
            if isinstance(path, str)
        ]
        like = similar_source(spec, paths)
        sources.append(like.model_dump(mode="json", exclude={"path", "weight", "exclude"}) | value)
    tree = spec.model_dump(mode="json")
    cleaning = tree["data"]["cleaning"] | {"deduplicate": "none"}
    tree["data"] |= {"train": sources, "validation": None, "cleaning": cleaning}
    tree["tokenizer"] = {"path": tokenizer_folder}
    return make_spec(tree, "--data")


def _as_source(text: str) -> dict[str, Any]:
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
    return known[0].model_copy(update={"format": "auto"})
