"""A new run from a trained one, by methods in sequence: smaller, faster, or both, with a table of
what that costs.

The run that it is made from is never changed. Everything is measured before anything is stored;
what a gate refuses leaves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from dray.cluster.connection import connect
from dray.cluster.needs import Needs
from dray.corpus.manifest import Split
from dray.corpus.prepare import Corpus
from dray.errors import SpecError
from dray.models.adapters import merge
from dray.models.packed import install
from dray.release.compress.gate import Limit, make_limits
from dray.release.compress.keeping import Contents, keep
from dray.release.compress.method import Candidate, Method, Say
from dray.release.compress.methods import make_methods
from dray.release.compress.recovering import TrainRun, Workshop
from dray.release.compress.table import (
    Rows,
    compare,
    count_nonzero,
    measure_groups,
    sizes,
    time_both,
)
from dray.release.evaluate import held_out, prepare_other
from dray.release.trained import Trained, Weights, open_trained
from dray.runs import CheckpointReader
from dray.runs.finished import check_name_free, holding_name


@dataclass(frozen=True)
class Compressed:
    """How a call of `compress` ended."""

    name: str
    """Of the new run."""
    kept: bool
    """Whether the gate held, and the run is in the store."""
    table: dict[str, Any] = field(default_factory=dict)
    """Before and after, as the run keeps it (`compression.json`)."""


def compress(
    storage: str,
    name: str,
    wanted: Sequence[str],
    *,
    new_name: str | None = None,
    step: str | int | None = None,
    weights: Weights = "trained",
    data: Sequence[str] | None = None,
    max_drop: Sequence[str] = (),
    train: TrainRun | None = None,
    address: str | None = None,
    verbose: bool = False,
    say: Say = lambda line: None,
) -> Compressed:
    """Compress a run's checkpoint by the `wanted` methods (`METHOD:key=value,…`), one after the
    other, into a new run of the same storage.

    `data`: other data to measure on than the run's validation rows. `max_drop`: the gate's limits;
    where one does not hold nothing is kept. `train` trains a spec (`dray.train.driver.train`), for
    methods that do. Raises UserError, before any work is done, for what cannot be.
    """
    methods = make_methods(wanted)
    trained = open_trained(storage, name, step, weights, unpacked=True)
    if (made := trained.run.compressed()) is not None and made["packed"]:
        raise SpecError(
            f"run {name!r}",
            "has its weights as codes already",
            "codes cannot be changed",
            f"compress {made['run']} instead",
        )
    limits = make_limits(max_drop, trained.task.metrics)
    new_name = new_name or default_name(name, methods)
    check_name_free(storage, new_name)
    rows = None if data else held_out(trained)
    model = trained.model
    if hasattr(model, "dray_adapted"):
        merge(model)
    workshop = Workshop(storage, new_name, methods, trained, train=train, say=say)
    candidate = Candidate(trained, model, workshop.train, say)
    for method in methods:
        method.check(candidate)
    with ExitStack() as stack:
        if data:
            stack.enter_context(connect(address, num_cpus=1, worker=Needs({}), verbose=verbose))
            rows = prepare_other(trained, data, storage)
        assert rows is not None
        stack.enter_context(trained.run.hold(trained.checkpoint))
        names = Names(storage, new_name)
        return _compress(
            candidate, methods, limits, names=names, measured_on=rows, workshop=workshop
        )


@dataclass(frozen=True)
class Names:
    """Where the new run is to lie."""

    storage: str
    name: str


def default_name(name: str, methods: Sequence[Method]) -> str:
    """The name of a run that is made from another one: with those of the methods."""
    return "-".join([name.replace("/", "-"), *(method.name for method in methods)])


def _compress(
    candidate: Candidate,
    methods: Sequence[Method],
    limits: Sequence[Limit],
    *,
    names: Names,
    measured_on: tuple[Corpus, Split],
    workshop: Workshop,
) -> Compressed:
    parent, say = candidate.trained, candidate.say
    rows = Rows(parent, parent.task, *measured_on)
    before = Contents(candidate, names.name)
    count_before = count_nonzero(candidate.model)
    with holding_name(names.storage, names.name) as (run, driver):
        workshop.open(run)
        for number, method in enumerate(methods, start=1):
            say(f"{method.name} ({number} of {len(methods)})")
            workshop.enter(number, method)
            method.apply(candidate)
        contents = Contents(candidate, names.name)
        count_after = count_nonzero(candidate.model)
        with CheckpointReader(parent.run, parent.checkpoint) as reader:
            digest = reader.manifest_sha256
        original = replace(parent)  # its model is read anew: methods change the one they are given
        if hasattr(original.model, "dray_adapted"):
            merge(original.model)
        candidate.model = install(candidate.model, candidate.packed).eval()
        say("measuring before and after")
        table = _measure(rows, original, candidate.model)
        table["sizes"] = {
            "before": sizes(original.model, before.num_bytes, count_before[1], count_before[0]),
            "after": sizes(candidate.model, contents.num_bytes, count_after[1], count_after[0]),
        }
        table |= {
            "run": names.name,
            "parent": {"run": parent.run.name, "step": parent.checkpoint.step},
            "methods": [method.told() for method in methods],
            "gate": [limit.judge(table["metrics"]) for limit in limits],
        }
        kept = all(one["holds"] for one in table["gate"])
        if kept:
            workshop.close()
            values = {name: one["after"]["value"] for name, one in table["metrics"].items()}
            contents.metadata["validation"] = (
                {} if measured_on[1] is not parent.manifest.validation else values
            )
            keep(run, driver, candidate, methods, contents, manifest_sha256=digest, table=table)
    return Compressed(names.name, kept, table)


def _measure(rows: Rows, original: Trained, model: Any) -> dict[str, Any]:
    """Metrics and times of both, on the same rows and device."""
    device = original.move_to_device()
    if getattr(model, "dray_on_cpu", False):
        device = type(device)("cpu")
        original.model.to(device)
    model.to(device)
    before = measure_groups(rows, original.model, device)
    after = measure_groups(rows, model, device)
    return {
        "num_rows": rows.split.num_rows,
        "metrics": compare(rows.task, before, after),
        "speed": time_both(rows, (original.model, model), device),
    }
