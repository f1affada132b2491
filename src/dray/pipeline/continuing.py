"""`dray train --continue RUN`: a run goes on learning from other data, old rows among them, and is
let through only if it has forgotten nothing that matters.

The new run is a run like any other: it starts from the weights of the old one, its sources are
weighted, so its order is exact and its ledger tells old rows from new ones. Then both models are
measured on the rows that the old run held out and on data that was held out of the new. Refuses
runs without weights of their own, and data without a row to learn from.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

from dray.cluster.connection import connect
from dray.corpus.manifest import Manifest, load_run_manifest
from dray.corpus.prepare import list_inputs
from dray.errors import SpecError
from dray.feedback import Dataset, Snapshot
from dray.feedback.dataset import PREFIX
from dray.pipeline.learnt import find_learnt
from dray.release.compress.gate import Limit, make_limits
from dray.release.evaluate import Measured, as_source, held_out, prepare_other
from dray.release.judging.judge import judge_against
from dray.release.measuring import measure
from dray.release.trained import Trained, load_trained
from dray.runs import Run
from dray.runs.finished import is_name_free
from dray.serve.promoting import check_kind, kind_of_task, promote
from dray.serve.served import Served
from dray.serve.versions import Record
from dray.spec import TEXT_KINDS, Spec, make_spec
from dray.spec.loading import apply_overrides
from dray.train.driver import train

Say = Callable[[str], None]
EPOCHS = 3.0
"""Passes over the new data, unless a duration is given."""
REPLAYED, HELD = 0.5, 0.2
DRAWS = 200
"""Samples of the paired tests: enough for a look, and a fifth of the time of `dray evaluate`'s."""
FORGOTTEN = 0.01
"""By how much the metric may get worse on old rows, unless it is said."""


@dataclass(frozen=True)
class Wanted:
    """What is asked for."""

    data: Sequence[str]
    """`feedback:NAME`, or data as `dray evaluate --data` takes it."""
    held: Sequence[str] = ()
    """Data like the new, to measure on; of feedback a share is kept out by itself."""
    replay: float = REPLAYED
    """Share of the rows of a batch that are old ones."""
    held_share: float = HELD
    """Of feedback: the share that is kept out."""
    max_drop: Sequence[str] = ()
    """By how much metrics may get worse on the old rows."""
    promote: str | None = None
    """The served name that is to have the new model, if it is let through."""
    overrides: Sequence[str] = ()


@dataclass
class Continued:
    """What came of it."""

    run: str
    before: str
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of feedback: how many entries are given to learn from (`given`), of these how many the run
    has learnt by its ledger (`learnt`), how many are kept out, and say nothing of use."""
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By `old` and `new`: the metric before and after, with the paired test of both."""
    limits: list[dict[str, Any]] = field(default_factory=list)
    missed: str = ""
    """Why it is not let through; empty: it is."""
    promoted: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def continue_run(
    storage: str,
    name: str,
    wanted: Wanted,
    *,
    run_name: str | None = None,
    address: str | None = None,
    verbose: bool = False,
    say: Say = lambda line: None,
) -> Continued:
    """Train a new run from a run's weights, measure both, and promote the new one where that is
    asked for and nothing is missed. Called again it goes on with the new run. Raises UserError."""
    old = Run.open(storage, name)
    spec = old.spec()
    limits = make_limits(wanted.max_drop, spec.task.metrics)
    if not 0 <= wanted.replay < 1:
        raise SpecError(f"--replay {wanted.replay:g}", "is no share of old rows", "0 to below 1")
    if not 0 <= wanted.held_share < 1:
        raise SpecError(f"--held-share {wanted.held_share:g}", "is no share", "0 to below 1")
    if wanted.promote is not None:
        check_kind(Record(storage, wanted.promote), kind_of_task(spec.task), f"what {name} becomes")
    snapshots = _snapshots(storage, wanted)
    new_name = run_name or next_name(storage, name)
    done = Continued(new_name, name)
    for dataset, snapshot in snapshots.items():
        done.datasets[dataset] = {
            "digest": snapshot.digest,
            "given": len(snapshot.train_ids),
            "held": len(snapshot.held_ids),
            "unusable": snapshot.num_unusable,
        }
        say(_said_of(dataset, snapshot))
    begun = Run.find(storage, new_name)
    if begun is None:
        sources = [_feedback_source(spec, one.train) for one in snapshots.values()]
        others = [as_source(one) for one in wanted.data if not one.startswith(PREFIX)]
        num_new = None if others else sum(len(one.train_ids) for one in snapshots.values())
        given = make_continued_spec(
            old, [*sources, *others], wanted, name=new_name, num_new=num_new
        )
    else:
        given = begun.spec()
        if given.model.run != name:
            raise SpecError(
                f"--run {new_name}",
                f"is a run already, which does not start from {name}",
                "a run stays what it is",
                "give another name",
            )
        say(f"{new_name} is there: it goes on by the spec that it began with")
    train(given, storage=storage, run_name=new_name, address=address, verbose=verbose)
    new = Run.open(storage, new_name)
    for dataset in snapshots:
        steps = find_learnt(new, Dataset(storage, dataset))
        done.datasets[dataset]["learnt"] = sum(bool(own) for own in steps.values())
    held = [_feedback_source(spec, one.held) for one in snapshots.values() if one.held]
    held += [as_source(one) for one in wanted.held]
    words = [json.dumps(one) for one in held]
    with connect(address, num_cpus=1, verbose=verbose) if words else nullcontext():
        _measure(storage, done, limits, words)
    if wanted.promote is not None and not done.missed:
        done.promoted = _promoted(storage, wanted.promote, new_name)
    return done


def next_name(storage: str, name: str) -> str:
    """A free name: RUN-2 after RUN, RUN-3 after RUN-2."""
    stem, number = name, 1
    if found := re.fullmatch(r"(.+)-([0-9]{1,6})", name):
        stem, number = found[1], int(found[2])
    while not is_name_free(storage, f"{stem}-{number + 1}"):
        number += 1
    return f"{stem}-{number + 1}"


def make_continued_spec(
    old: Run,
    sources: Sequence[Mapping[str, Any]],
    wanted: Wanted,
    *,
    name: str,
    num_new: int | None = None,
) -> Spec:
    """The spec of a run that goes on from another's weights with its old sources and these ones.
    `num_new`: rows of these, where they are known; then it lasts for EPOCHS passes over them, else
    for one over all. Raises SpecError."""
    spec, manifest, replay = old.spec(), load_run_manifest(old), wanted.replay
    tree = spec.model_dump(mode="json")
    kept = _old_weights(spec, manifest) if replay else []
    new = [
        {**source, "weight": (1 - replay) * source.get("weight", 1 / len(sources))}
        for source in sources
    ]
    old_sources = [
        {**source, "weight": replay * weight}
        for source, weight in zip(tree["data"]["train"], kept, strict=bool(kept))
        if weight
    ]
    for section in ("evaluate", "compress", "export", "serve", "distil"):
        tree.pop(section, None)
    tree["name"] = name
    tree["data"] |= {"train": [*old_sources, *new], "balance": 0.0}
    tree["model"] = {"run": old.name, "num_labels": spec.model.num_labels}
    if spec.task.tokenizes:
        tree["tokenizer"] = {"run": old.name}
    tree["duration"] = {"epochs": 1}
    if num_new is not None:
        a_step = (1 - replay) * spec.batch.global_rows
        tree["duration"] = {"steps": math.ceil(EPOCHS * num_new / a_step)}
    tree["schedule"] |= {"warmup_steps": 0, "decay_steps": None}
    tree = apply_overrides(tree, wanted.overrides)
    return make_spec(tree, "dray train --continue", wanted.overrides)


def _old_weights(spec: Spec, manifest: Manifest) -> list[float]:
    """Each old source's share of the old rows that are read again; they add up to 1."""
    names = [source.name for source in list_inputs(spec).sources if source.split == "train"]
    rows = dict.fromkeys(names, 0.0)
    for source in manifest.train.sources:
        own = source.name if source.name in rows else source.name.rpartition("/")[0]
        rows[own] = rows.get(own, 0.0) + source.num_rows
    given = [source.weight for source in spec.data.train]
    shares = [
        (rows[name] if weight is None else weight) if rows[name] else 0.0
        for name, weight in zip(names, given, strict=True)
    ]
    return [share / sum(shares) for share in shares]


def _snapshots(storage: str, wanted: Wanted) -> dict[str, Snapshot]:
    """Of the datasets that are named. Raises SpecError."""
    if not wanted.data:
        raise SpecError("--continue", "has no data to learn from", "", "give --data feedback:NAME")
    found = {}
    for name in (one.removeprefix(PREFIX) for one in wanted.data if one.startswith(PREFIX)):
        dataset = Dataset(storage, name)
        if not dataset.exists:
            raise SpecError(
                f"--data {PREFIX}{name}",
                "there is no such feedback in this storage",
                f"`dray serve … --feedback {name}` takes it in",
            )
        found[name] = dataset.snapshot(wanted.held_share)
    return found


def _feedback_source(spec: Spec, path: str) -> dict[str, Any]:
    """A source of feedback's records: columns are called like the task's fields, and what is right
    `label`."""
    columns = {
        name: name if field.kind in TEXT_KINDS else "label"
        for name, field in spec.task.fields.items()
        if field.kind != "record" or field.column is not None
    }
    return {"path": path, "format": "jsonl", "columns": columns}


def _said_of(name: str, snapshot: Snapshot) -> str:
    unusable = snapshot.num_unusable
    more = f"; {unusable} say what is wrong, and not what is right" if unusable else ""
    return (
        f"feedback {name}: {len(snapshot.train_ids)} entries to learn from, "
        f"{len(snapshot.held_ids)} kept out{more}"
    )


# --- the gate ------------------------------------------------------------------------------------


def _measure(storage: str, done: Continued, limits: Sequence[Limit], held: Sequence[str]) -> None:
    """Both models on the old run's held-out rows, and on data that is like the new."""
    before, after = (load_trained(storage, name) for name in (done.before, done.run))
    metric = before.spec.validation.metric
    rows: dict[str, Any] = {}
    if before.manifest.validation is not None:
        rows["old"] = held_out(before)
    if held:
        rows["new"] = prepare_other(before, held, storage)
    for kind, (corpus, split) in rows.items():
        measured = [
            Measured(
                one, one.task, corpus, split,
                measure(one, one.task, corpus, split, first=0, end=split.num_rows, by_row=True),
            )
            for one in (before, after)
        ]  # fmt: skip
        done.metrics[kind] = _compared(measured[0], measured[1])
    better = before.task.metrics[metric]
    for limit in limits or [Limit(metric, FORGOTTEN, relative=False)] if "old" in rows else ():
        told = {"rows": "old", **limit.judge(_as_table(done.metrics["old"], before))}
        done.limits.append(told)
    if "new" in rows:
        values = done.metrics["new"]["values"]
        drop = _drop(values["before"].get(metric), values["after"].get(metric), better)
        holds = drop is not None and drop <= 0
        done.limits.append(
            {"rows": "new", "metric": metric, "most": 0.0, "relative": False, "drop": drop,
             "holds": holds}
        )  # fmt: skip
    done.missed = "; ".join(_told_missed(one) for one in done.limits if not one["holds"])
    if not rows:
        done.missed = "there are no held-out rows to measure on: give data.validation, or --held"


def _compared(before: Measured, after: Measured) -> dict[str, Any]:
    """The metrics of both, and the paired test where the task's metrics can be drawn again."""
    found: dict[str, Any] = {
        "num_rows": before.split.num_rows,
        "values": {
            when: {name: value for name, value in one.told().items()
                   if name in one.task.metrics}
            for when, one in (("before", before), ("after", after))
        },
    }  # fmt: skip
    try:
        found["test"] = judge_against(before, after, DRAWS)
    except SpecError as error:
        found["untested"] = str(error)
    return found


def _as_table(found: Mapping[str, Any], trained: Trained) -> dict[str, Any]:
    """As a gate reads it."""
    values = found["values"]
    return {
        name: {
            "better": better,
            "before": {"value": values["before"].get(name)},
            "after": {"value": values["after"].get(name)},
        }
        for name, better in trained.task.metrics.items()
    }


def _drop(before: float | None, after: float | None, better: str) -> float | None:
    if before is None or after is None:
        return None
    return before - after if better == "higher" else after - before


def _told_missed(one: Mapping[str, Any]) -> str:
    if one["drop"] is None:
        return f"{one['metric']} stands for nothing on the {one['rows']} rows"
    amount = f"{one['drop']:.2%}" if one["relative"] else f"{one['drop']:.4g}"
    most = f"{one['most']:.2%}" if one["relative"] else f"{one['most']:g}"
    where = "old held-out rows" if one["rows"] == "old" else "new held-out data"
    return f"{one['metric']} got worse by {amount} on the {where}, and {most} is allowed"


def _promoted(storage: str, name: str, run: str) -> str:
    state = promote(Record(storage, name), Served(name=name, storage=storage, run=run))
    return f"version {state.stable} of {name}"
