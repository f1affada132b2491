"""How a run begins: new, as a fork, or by going on under a spec of the same identity.

Refuses to go on with a run under a spec of another identity, and to change a duration once the
learning rate depends on the old one.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from dray.errors import StoreError
from dray.runs.checkpoint_manifest import CheckpointInfo
from dray.runs.checkpoint_reader import inspect_checkpoint
from dray.runs.drivers import check_free
from dray.runs.layout import (
    PINS,
    PLAN_FILE,
    RUN_FILE,
    SPEC_FILE,
    check_run_name,
    parse_checkpoint_owner,
)
from dray.runs.row_log import make_json, now, save_json
from dray.runs.run import Run
from dray.spec import Spec, differing_paths, dump_spec, without_places
from dray.storage.exclusive import create_exclusive
from dray.storage.filesystem import (
    absolute,
    exists,
    open_filesystem,
    require_writable,
    shown,
    write_bytes,
)


def check_storage(storage: str | os.PathLike[str]) -> None:
    """Raise StoreError unless runs can be written there. Leaves nothing behind."""
    filesystem, path = open_filesystem(storage)
    require_writable(filesystem, path, absolute(storage))


def open_or_create(
    storage: str | os.PathLike[str],
    name: str,
    spec: Spec,
    plan: Mapping[str, Any],
    *,
    corpus: str = "",
    corpus_key: str = "",
    fork: str | None = None,
) -> Run:
    """Begin the run of that name or go on with it; with `fork`, begin (or go on with) a fork of
    it by that name.

    `plan` is the plan as plain values. Raises StoreError, with nothing written, if the storage
    cannot be written, the run there has another identity or is being driven already, or there
    is nothing to fork from.
    """
    run = find_begun(storage, name, fork)
    if run is not None:
        _take_up(run, spec, plan, corpus, corpus_key)
        return run
    if fork:
        return fork_run(storage, name, fork, spec, plan, corpus=corpus, corpus_key=corpus_key)
    return create_run(storage, name, spec, plan, corpus=corpus, corpus_key=corpus_key)


def find_begun(storage: str | os.PathLike[str], name: str, fork: str | None = None) -> Run | None:
    """The run of that name, or the fork of it by the name `fork`, if it has begun. Raises
    StoreError for names that cannot be, a run that another driver drives, and a fork of another
    run."""
    check_run_name(name)
    run = Run.find(storage, fork or name)
    if run is not None:
        _check_has_states(run)
    if run is not None and fork and (run.origin() or {}).get("run") != name:
        raise StoreError(
            f"run {fork!r}", f"exists, and is no fork of {name!r}", "a fork gets a new name"
        )
    if run is not None:
        check_free(run.filesystem, run.path, f"run {run.name!r}")
    return run


def find_origin(storage: str | os.PathLike[str], source: str) -> tuple[Run, CheckpointInfo]:
    """The run that a fork is to start from, with its newest checkpoint. Raises StoreError if it
    has none."""
    origin = Run.open(storage, source)
    _check_has_states(origin)
    info = origin.latest_checkpoint()
    if info is None:
        raise StoreError(
            f"run {source!r}",
            "has no sound checkpoint to fork from",
            way_out="train it to its first checkpoint, or start afresh under another name",
        )
    return origin, info


def _check_has_states(run: Run) -> None:
    """Raise StoreError for a run that was made by compressing another: nothing of an optimiser came
    with it."""
    made = run.compressed()
    if made is None:
        return
    further = (
        f"train {made['run']} further, and compress it again"
        if made["packed"]
        else f"begin another run from its weights: model.run={run.name}, and "
        "regularization.keep_zeros=true if its zeros are to stay"
    )
    raise StoreError(
        f"run {run.name!r}",
        f"was compressed from {made['run']}, and holds weights alone",
        "a run goes on with its optimiser's states",
        further,
    )


def create_run(
    storage: str | os.PathLike[str],
    name: str,
    spec: Spec,
    plan: Mapping[str, Any],
    *,
    corpus: str = "",
    corpus_key: str = "",
) -> Run:
    """Begin a new run. Raises StoreError if the name is taken or the storage cannot be
    written."""
    return _begin(Run(os.fspath(storage), name), spec, plan, corpus, corpus_key)


def keep_checkpoint(run: Run, path: str, name: str, purpose: str = "") -> None:
    """Spare a checkpoint (its path, in the storage of `run`) for as long as the run called `name`
    exists. `purpose`: where that run needs several of one run."""
    checkpoint = run.keep_path(path)
    pin = {"run": name, "checkpoint": checkpoint, "pinned": now()}
    # No name of a run holds a tilde.
    file = f"{name.replace('/', '~')}{purpose and f'~{purpose}~'}.json"
    owner = parse_checkpoint_owner(checkpoint)
    save_json(run.filesystem, f"{run.storage_path}/{owner}/{PINS}/{file}", pin)


def fork_run(
    storage: str | os.PathLike[str],
    source: str,
    name: str,
    spec: Spec,
    plan: Mapping[str, Any],
    *,
    corpus: str = "",
    corpus_key: str = "",
) -> Run:
    """Begin a new run from the newest checkpoint of another in the same storage, whatever its
    identity.

    The source's retention spares that checkpoint for as long as the fork exists. Raises
    StoreError if the source has no sound checkpoint, or the name is taken.
    """
    (origin, info), run = find_origin(storage, source), Run(os.fspath(storage), name)
    if Run.find(storage, name) is not None:
        raise StoreError(f"run {name!r}", "exists already", "a fork gets a new name")
    require_writable(run.filesystem, run.path, run.uri)
    keep_checkpoint(run, info.path, name)
    if not inspect_checkpoint(run.filesystem, info.path).verified:
        raise StoreError(
            f"run {source!r}", f"step {info.step} was deleted meanwhile", way_out="fork again"
        )
    return _begin(
        run,
        spec,
        plan,
        corpus,
        corpus_key,
        left_out=_inherit_left_out(origin, spec, corpus_key),
        origin={
            "run": source,
            "step": info.step,
            "attempt": info.attempt,
            "checkpoint": run.keep_path(info.path),
            "fingerprint": origin.fingerprint,
            "differing": differing_paths(origin.record()["identity"], spec.identity()),
        },
    )


def make_record(run: Run, spec: Spec, corpus: str, corpus_key: str) -> dict[str, Any]:
    """The record of a run that begins, from nothing."""
    return {
        "name": run.name,
        "created": now(),
        "nonce": uuid.uuid4().hex,
        "status": "created",
        "reason": "",
        "fingerprint": spec.fingerprint(),
        "identity": spec.identity(),
        "corpus": run.keep_place(corpus),
        "corpus_key": corpus_key,
        "origin": None,
    }


def _begin(
    run: Run,
    spec: Spec,
    plan: Mapping[str, Any],
    corpus: str,
    corpus_key: str,
    *,
    origin: dict[str, Any] | None = None,
    left_out: Sequence[int] = (),
) -> Run:
    """Write the record, whose presence makes the folder a run: of two simultaneous beginners
    one wins."""
    require_writable(run.filesystem, run.path, run.uri)
    record = make_record(run, spec, corpus, corpus_key) | {"origin": origin}
    if left_out:
        record["left_out"] = list(left_out)
    if not create_exclusive(run.filesystem, f"{run.path}/{RUN_FILE}", make_json(record, indent=1)):
        raise StoreError(
            f"run {run.name!r}",
            f"exists already in {shown(run.storage)}",
            "a new run has a new name",
            "go on with it, or name another run with --run",
        )
    _take_up(run, spec, plan, corpus, corpus_key)
    return run


def _take_up(run: Run, spec: Spec, plan: Mapping[str, Any], corpus: str, corpus_key: str) -> None:
    """Check the identity, then store spec and plan: their place may be new, and their duration
    longer."""
    record = run.record()
    check_identity(run, spec)
    if record["corpus_key"] and corpus_key and record["corpus_key"] != corpus_key:
        raise StoreError(
            f"run {run.name!r}",
            f"its corpus was {record['corpus_key']} and is {corpus_key} now",
            "a run keeps its rows: files were changed, added or removed since it began",
            "put them back, name another run with --run, or --fork NEW_NAME",
        )
    _check_decay(run, spec, plan)
    write_bytes(run.filesystem, f"{run.path}/{SPEC_FILE}", dump_spec(spec).encode())
    save_json(run.filesystem, f"{run.path}/{PLAN_FILE}", plan)
    place = run.keep_place(corpus)
    if place and (record["corpus"], record["corpus_key"]) != (place, corpus_key):
        run.update(corpus=place, corpus_key=corpus_key)


def check_identity(run: Run, spec: Spec) -> None:
    """Raise StoreError, naming what differs, for a spec that is another run's. Where its inputs
    lie is no part of what a run is; what they hold is, and whoever has them compares it
    (`moved_paths`)."""
    differing = differing_paths(
        without_places(run.record()["identity"]), without_places(spec.identity())
    )
    if differing:
        rule = "a run keeps its identity"
        if spec.duration_is_identity and any(path.startswith("duration") for path in differing):
            rule += (
                f": the {spec.schedule.name} schedule without decay_steps ends with the duration"
            )
        raise StoreError(
            f"run {run.name!r}",
            f"its spec differs in {', '.join(differing)}",
            rule,
            "undo the change, name another run with --run, or start from its "
            "newest checkpoint with --fork NEW_NAME",
        )


def moved_paths(run: Run, spec: Spec) -> list[str]:
    """The dotted paths of the inputs that lie elsewhere by this spec than by the one that the
    run began with."""
    return differing_paths(run.record()["identity"], spec.identity())


def _check_decay(run: Run, spec: Spec, plan: Mapping[str, Any]) -> None:
    """A wsd run whose decay has begun has spent its duration."""
    if spec.schedule.name != "wsd" or not exists(run.filesystem, f"{run.path}/{PLAN_FILE}"):
        return
    old, new = run.plan().get("num_steps"), plan.get("num_steps")
    newest = run.latest_checkpoint()
    if old is None or new is None or old == new or newest is None:
        return
    start = min(_decay_start(spec, old), _decay_start(spec, new))
    if newest.step > start:
        raise StoreError(
            f"run {run.name!r}",
            f"duration changes from {old} to {new} steps at step {newest.step}",
            f"its learning rate decays from step {start} on, which a new duration would move",
            "keep the duration, or --fork NEW_NAME",
        )


def _inherit_left_out(origin: Run, spec: Spec, corpus_key: str) -> list[int]:
    """The batches that a fork leaves out since its origin did, where both read the same order:
    without them it would read batches again. In another order the numbers name other rows."""
    record = origin.record()
    changed = {"seed", "batch.global_rows"} & set(
        differing_paths(record["identity"], spec.identity())
    )
    return (
        [] if changed or record["corpus_key"] != corpus_key else list(record.get("left_out") or ())
    )


def _decay_start(spec: Spec, num_steps: int) -> int:
    return max(0, num_steps - (spec.schedule.decay_steps or max(1, num_steps // 10)))
