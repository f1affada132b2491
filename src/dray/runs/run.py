"""One run is one folder: its spec, plan, record, attempts, metrics, events and checkpoints, on any
filesystem.

Refuses to go on with a run under a spec of another identity, and to change a duration once the
learning rate depends on the old one. A `Run` holds no open files and may be pickled: the copy opens
the folder anew.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any, cast

import pyarrow as pa

from dray.errors import SpecError, StoreError
from dray.redaction import redact, redact_fields, take_in_all
from dray.runs.checkpoint_manifest import CheckpointInfo
from dray.runs.checkpoint_reader import (
    CheckpointReport,
    find_checkpoints,
    inspect_checkpoint,
    verify_checkpoint,
)
from dray.runs.drivers import (
    Driver,
    check_driver,
    check_free,
    heartbeat,
    is_alive,
    is_gone,
    load_driver,
    make_process,
    newest_driver,
    release,
    take_over,
)
from dray.runs.history import Outline, iterate_history, last_rows, make_outline
from dray.runs.layout import (
    ATTEMPTS,
    CHECKPOINTS,
    CORPORA,
    CORPUS,
    DELETING_FILE,
    EVENTS,
    MARKER_FILE,
    METRICS,
    MODEL_FILE,
    PARQUET_FILE,
    PINS,
    PLAN_FILE,
    REJECTED_FILE,
    RESERVED_NAMES,
    RUN_FILE,
    SPEC_FILE,
    VALIDATION,
    check_run_name,
    make_attempt_file,
    parse_attempt_file,
)
from dray.runs.pins import hold
from dray.runs.row_log import (
    RecordCache,
    RowLog,
    load_json,
    make_history,
    make_json,
    make_table,
    now,
    save_json,
    write_table,
)
from dray.spec import (
    RUN_NAME,
    BadYaml,
    Spec,
    differing_paths,
    dump_spec,
    make_spec,
    read_yaml,
    without_places,
)
from dray.storage.exclusive import create_exclusive
from dray.storage.filesystem import (
    PROBE_SECONDS,
    absolute,
    child,
    exists,
    is_file,
    is_uri,
    list_files,
    list_folders,
    open_filesystem,
    read_bytes,
    require_writable,
    shown,
    write_bytes,
    write_whole,
)
from dray.storage.retrying import first_safe_line, patience

_CHECKPOINT_BELOW = re.compile(rf"/[^/]+/{CHECKPOINTS}/[^/]+/?$")

STATUSES = ("created", "running", "completed", "stopped", "failed", "interrupted")


class Run:
    """A run in storage. Made by `open_or_create`, `create`, `fork` and `open`."""

    def __init__(self, storage: str, name: str) -> None:
        self.storage, self.name = absolute(storage), check_run_name(name)
        self.uri = child(self.storage, name)
        self.filesystem, self.path = open_filesystem(self.uri)
        self._storage_path = self.path.removesuffix(f"/{name}")
        self._attempts = RecordCache(self.uri, self.filesystem, f"{self.path}/{ATTEMPTS}")
        self._metrics = RowLog(self.filesystem, f"{self.path}/{METRICS}")
        self._validation = RowLog(self.filesystem, f"{self.path}/{VALIDATION}")
        self._events = RowLog(self.filesystem, f"{self.path}/{EVENTS}")

    def __reduce__(self) -> tuple[Any, ...]:
        return Run, (self.storage, self.name)

    def __repr__(self) -> str:
        return f"Run({shown(self.uri)!r})"

    # ---- places ---------------------------------------------------------------------------------

    def keep_path(self, path: str) -> str:
        """A path of the run's filesystem as records keep it: below the storage, so that this may be
        moved."""
        return path.removeprefix(f"{self._storage_path}/")

    def find_path(self, kept: str) -> str:
        """The path that a record keeps, where the storage is now. Records of earlier versions hold
        it whole."""
        if not kept.startswith(f"{self._storage_path}/") and (
            below := _CHECKPOINT_BELOW.search(f"/{kept}")
        ):
            return f"{self._storage_path}{below[0]}"
        return kept

    @property
    def corpus(self) -> str:
        """Where the run's corpus lies (absolute path or URI); empty if none is on record.

        One below the storage moves with it, one elsewhere stays where it was.
        """
        record = self.record()
        kept, key = record.get("corpus") or "", record.get("corpus_key")
        if not kept or not (is_uri(kept) or os.path.isabs(kept)):
            return kept and child(self.storage, *kept.split("/"))
        if key and not exists(
            *open_filesystem(kept)
        ):  # an earlier version's record of a storage that was moved
            moved = child(self.storage, CORPORA, key)
            return moved if exists(*open_filesystem(moved)) else kept
        return kept

    def _keep_place(self, place: str) -> str:
        """A place as records keep it: below the storage, or whole where it lies elsewhere."""
        storage = f"{shown(self.storage).rstrip('/')}/"
        return shown(place).removeprefix(storage) if shown(place).startswith(storage) else place

    # ---- beginning ------------------------------------------------------------------------------

    @staticmethod
    def check_storage(storage: str | os.PathLike[str]) -> None:
        """Raise StoreError unless runs can be written there. Leaves nothing behind."""
        filesystem, path = open_filesystem(storage)
        require_writable(filesystem, path, absolute(storage))

    @classmethod
    def open_or_create(
        cls,
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
        run = cls.find_begun(storage, name, fork)
        if run is not None:
            run._take_up(spec, plan, corpus, corpus_key)
            return run
        if fork:
            return cls.fork(storage, name, fork, spec, plan, corpus=corpus, corpus_key=corpus_key)
        return cls.create(storage, name, spec, plan, corpus=corpus, corpus_key=corpus_key)

    @classmethod
    def find_begun(
        cls, storage: str | os.PathLike[str], name: str, fork: str | None = None
    ) -> Run | None:
        """The run of that name, or the fork of it by the name `fork`, if it has begun. Raises
        StoreError for names that cannot be, a run that another driver drives, and a fork of another
        run."""
        check_run_name(name)
        run = cls.find(storage, fork or name)
        if run is not None and fork and (run.origin() or {}).get("run") != name:
            raise StoreError(
                f"run {fork!r}", f"exists, and is no fork of {name!r}", "a fork gets a new name"
            )
        if run is not None:
            check_free(run.filesystem, run.path, f"run {run.name!r}")
        return run

    @classmethod
    def find_origin(
        cls, storage: str | os.PathLike[str], source: str
    ) -> tuple[Run, CheckpointInfo]:
        """The run that a fork is to start from, with its newest checkpoint. Raises StoreError if it
        has none."""
        origin = cls.open(storage, source)
        info = origin.latest_checkpoint()
        if info is None:
            raise StoreError(
                f"run {source!r}",
                "has no sound checkpoint to fork from",
                way_out="train it to its first checkpoint, or start afresh under another name",
            )
        return origin, info

    @classmethod
    def create(
        cls,
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
        return cls(os.fspath(storage), name)._begin(spec, plan, corpus, corpus_key)

    @classmethod
    def fork(
        cls,
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
        (origin, info), run = cls.find_origin(storage, source), cls(os.fspath(storage), name)
        if cls._exists(storage, name):
            raise StoreError(f"run {name!r}", "exists already", "a fork gets a new name")
        require_writable(run.filesystem, run.path, run.uri)
        checkpoint = run.keep_path(info.path)
        pinned = checkpoint.partition("/")[0]
        pin = {"run": name, "checkpoint": checkpoint, "pinned": now()}
        save_json(run.filesystem, f"{run._storage_path}/{pinned}/{PINS}/{name}.json", pin)
        if not inspect_checkpoint(run.filesystem, info.path).verified:
            raise StoreError(
                f"run {source!r}", f"step {info.step} was deleted meanwhile", way_out="fork again"
            )
        return run._begin(
            spec,
            plan,
            corpus,
            corpus_key,
            left_out=_inherit_left_out(origin, spec, corpus_key),
            origin={
                "run": source,
                "step": info.step,
                "attempt": info.attempt,
                "checkpoint": checkpoint,
                "fingerprint": origin.fingerprint,
                "differing": differing_paths(origin.record()["identity"], spec.identity()),
            },
        )

    @classmethod
    def open(cls, storage: str | os.PathLike[str], name: str) -> Run:
        """The run of that name. Raises StoreError if there is none."""
        run = cls.find(storage, name)
        if run is None:
            raise StoreError(
                f"run {name!r}",
                f"not found in {shown(absolute(storage))}",
                way_out="`dray runs` lists what is there; --storage names another place",
            )
        return run

    @classmethod
    def find(cls, storage: str | os.PathLike[str], name: str) -> Run | None:
        """The run of that name, if there is one."""
        return cls(os.fspath(storage), name) if cls._exists(storage, name) else None

    @classmethod
    def _exists(cls, storage: str | os.PathLike[str], name: str) -> bool:
        run = cls(os.fspath(storage), name)
        try:
            return exists(run.filesystem, f"{run.path}/{RUN_FILE}")
        except (OSError, pa.ArrowException) as error:
            raise StoreError(
                shown(run.storage),
                f"cannot be read ({first_safe_line(error)})",
                way_out="check the address, the credentials and the permissions",
            ) from error

    def _begin(
        self,
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
        require_writable(self.filesystem, self.path, self.uri)
        record = {
            "name": self.name,
            "created": now(),
            "nonce": uuid.uuid4().hex,
            "status": "created",
            "reason": "",
            "fingerprint": spec.fingerprint(),
            "identity": spec.identity(),
            "corpus": self._keep_place(corpus),
            "corpus_key": corpus_key,
            "origin": origin,
            **({"left_out": list(left_out)} if left_out else {}),
        }
        if not create_exclusive(
            self.filesystem, f"{self.path}/{RUN_FILE}", make_json(record, indent=1)
        ):
            raise StoreError(
                f"run {self.name!r}",
                f"exists already in {shown(self.storage)}",
                "a new run has a new name",
                "go on with it, or name another run with --run",
            )
        self._take_up(spec, plan, corpus, corpus_key)
        return self

    def _take_up(self, spec: Spec, plan: Mapping[str, Any], corpus: str, corpus_key: str) -> None:
        """Check the identity, then store spec and plan: their place may be new, and their duration
        longer."""
        record = self.record()
        self.check_identity(spec)
        if record["corpus_key"] and corpus_key and record["corpus_key"] != corpus_key:
            raise StoreError(
                f"run {self.name!r}",
                f"its corpus was {record['corpus_key']} and is {corpus_key} now",
                "a run keeps its rows: files were changed, added or removed since it began",
                "put them back, name another run with --run, or --fork NEW_NAME",
            )
        self._check_decay(spec, plan)
        write_bytes(self.filesystem, f"{self.path}/{SPEC_FILE}", dump_spec(spec).encode())
        save_json(self.filesystem, f"{self.path}/{PLAN_FILE}", plan)
        place = self._keep_place(corpus)
        if place and (record["corpus"], record["corpus_key"]) != (place, corpus_key):
            self.update(corpus=place, corpus_key=corpus_key)

    def check_identity(self, spec: Spec) -> None:
        """Raise StoreError, naming what differs, for a spec that is another run's. Where its inputs
        lie is no part of what a run is; what they hold is, and whoever has them compares it
        (`moved_paths`)."""
        differing = differing_paths(
            without_places(self.record()["identity"]), without_places(spec.identity())
        )
        if differing:
            rule = "a run keeps its identity"
            if spec.duration_is_identity and any(path.startswith("duration") for path in differing):
                rule += (
                    f": the {spec.schedule.name} schedule without decay_steps ends with the "
                    "duration"
                )
            raise StoreError(
                f"run {self.name!r}",
                f"its spec differs in {', '.join(differing)}",
                rule,
                "undo the change, name another run with --run, or start from its "
                "newest checkpoint with --fork NEW_NAME",
            )

    def moved_paths(self, spec: Spec) -> list[str]:
        """The dotted paths of the inputs that lie elsewhere by this spec than by the one that the
        run began with."""
        return differing_paths(self.record()["identity"], spec.identity())

    def _check_decay(self, spec: Spec, plan: Mapping[str, Any]) -> None:
        """A wsd run whose decay has begun has spent its duration."""
        if spec.schedule.name != "wsd" or not exists(self.filesystem, f"{self.path}/{PLAN_FILE}"):
            return
        old, new = self.plan().get("num_steps"), plan.get("num_steps")
        newest = self.latest_checkpoint()
        if old is None or new is None or old == new or newest is None:
            return
        start = min(_decay_start(spec, old), _decay_start(spec, new))
        if newest.step > start:
            raise StoreError(
                f"run {self.name!r}",
                f"duration changes from {old} to {new} steps at step {newest.step}",
                f"its learning rate decays from step {start} on, which a new duration would move",
                "keep the duration, or --fork NEW_NAME",
            )

    # ---- records --------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """run.json: name, created, status, fingerprint, identity, corpus, and what `update`
        added."""
        # Records of earlier versions may hold URIs with credentials.
        return cast(
            "dict[str, Any]", take_in_all(load_json(self.filesystem, f"{self.path}/{RUN_FILE}"))
        )

    def update(self, **fields: Any) -> None:
        """Set fields of run.json. One process at a time: the driver."""
        save_json(self.filesystem, f"{self.path}/{RUN_FILE}", self.record() | fields)

    def spec(self) -> Spec:
        """The spec as last run. Raises StoreError if it is not there."""
        path = f"{self.path}/{SPEC_FILE}"
        try:
            return make_spec(read_yaml(read_bytes(self.filesystem, path).decode()), path)
        except (FileNotFoundError, UnicodeDecodeError, BadYaml, SpecError) as error:
            raise StoreError(
                path, f"cannot be read ({error})", way_out="start the run again with its spec"
            ) from error

    def plan(self) -> dict[str, Any]:
        """The plan as last run, as plain values."""
        return load_json(self.filesystem, f"{self.path}/{PLAN_FILE}")

    def model(self) -> dict[str, Any] | None:
        """What the run keeps of its model: `config`, and `pretrained` where it starts from a folder
        of weights."""
        try:
            return load_json(self.filesystem, f"{self.path}/{MODEL_FILE}")
        except FileNotFoundError:
            return None

    def keep_model(
        self, config: Mapping[str, Any], pretrained: Mapping[str, Any] | None = None
    ) -> None:
        """Keep the model's configuration, and where its initial weights lie."""
        save_json(
            self.filesystem,
            f"{self.path}/{MODEL_FILE}",
            {"config": config, "pretrained": pretrained},
        )

    @property
    def corpus_copy(self) -> str:
        """Where the run keeps the manifest and the tokeniser of its corpus (absolute path or
        URI)."""
        return child(self.uri, CORPUS)

    def origin(self) -> dict[str, Any] | None:
        """What a fork started from: run, step, attempt, checkpoint (path below the storage),
        fingerprint, differing."""
        return cast("dict[str, Any] | None", self.record().get("origin"))

    @property
    def fingerprint(self) -> str:
        return cast(str, self.record()["fingerprint"])

    @property
    def status(self) -> str:
        """One of STATUSES; a run whose driver is gone counts as interrupted."""
        record = self.record()
        if record["status"] == "running" and self._driver_is_gone(record.get("driver") or {}):
            return "interrupted"
        return cast(str, record["status"])

    def _driver_is_gone(self, process: Mapping[str, Any]) -> bool:
        gone = is_gone(process)
        if (
            gone is None and (newest := self.driver()) is not None
        ):  # on another machine: signs of life tell
            return not is_alive(self.filesystem, self.path, newest, time.time())
        return bool(gone)

    def set_status(self, status: str, reason: str = "", driver: Driver | None = None) -> None:
        """Record the run's status; the process that says `running` is its driver. What a driver
        says that has been replaced by a later one is not recorded."""
        if status not in STATUSES:
            raise ValueError(f"status {status!r} is not one of {STATUSES}")
        if driver is not None and newest_driver(self.filesystem, self.path) > driver.number:
            return
        fields: dict[str, Any] = {"status": status, "reason": redact(reason), "changed": now()}
        if status == "running":
            fields["driver"] = make_process()
        self.update(**fields)

    # ---- drivers --------------------------------------------------------------------------------

    def take_over(self, wait_seconds: float = 0.0) -> Driver:
        """Become the run's one driver, before anything else is done to it; the token that
        `heartbeat` and `release` want, and whose `number` goes to `begin_attempt`.

        Raises StoreError while another driver is alive: on this machine its process tells,
        elsewhere its signs of life (`drivers.DEAD_SECONDS` without one end its hold).
        `wait_seconds`: how long to wait for a driver elsewhere to end or to be found dead, as a
        driver that is restarted by a scheduler should. From then on the attempts of earlier drivers
        commit nothing.
        """
        return take_over(self.filesystem, self.path, f"run {self.name!r}", wait_seconds)

    def heartbeat(self, driver: Driver) -> None:
        """Give a sign of life, every `drivers.HEARTBEAT_SECONDS`: one listing and one small file.
        Raises StoreError if another driver has taken the run over: this one must stop then."""
        heartbeat(self.filesystem, self.path, driver, f"run {self.name!r}")

    def release(self, driver: Driver) -> None:
        """Let the run go, after the last status was set: the next driver need not wait. Harmless if
        it is not ours."""
        release(self.filesystem, self.path, driver)

    def driver(self) -> dict[str, Any] | None:
        """Who took the run over last: number, host, pid, time, …, and `released` if it has let go;
        none if nobody."""
        return load_driver(self.filesystem, self.path)

    # ---- attempts -------------------------------------------------------------------------------

    def begin_attempt(
        self, num_ranks: int, start_step: int, driver: int | None = None, **fields: Any
    ) -> int:
        """Record one start of the worker group and return its number, which no other start gets.

        `start_step`: the step of the checkpoint it starts from (0: none). What earlier attempts did
        past it is undone. `driver`: the number of the driver that it belongs to; without, the
        newest one. Raises StoreError if a later driver has taken the run over.
        """
        folder, where = f"{self.path}/{ATTEMPTS}", f"run {self.name!r}"
        if driver is None:
            driver = newest_driver(self.filesystem, self.path)
        check_driver(self.filesystem, self.path, driver, where)
        numbers = map(parse_attempt_file, list_files(self.filesystem, folder))
        number = max((found for found in numbers if found is not None), default=0) + 1
        while True:
            record = {
                "attempt": number,
                "num_ranks": num_ranks,
                "start_step": start_step,
                "started": now(),
                "driver": driver,
                "nonce": uuid.uuid4().hex,
                **fields,
            }
            if create_exclusive(
                self.filesystem, f"{folder}/{make_attempt_file(number)}", make_json(record)
            ):
                break
            number += 1
        # Again, now that every later driver sees this attempt: so those of a later one have higher
        # numbers.
        check_driver(self.filesystem, self.path, driver, where)
        return number

    def end_attempt(self, attempt: int, status: str, step: int, reason: str = "") -> None:
        """Record how an attempt ended, at which step. One that was killed has no such record."""
        path = f"{self.path}/{ATTEMPTS}/{attempt:04d}-end.json"
        save_json(
            self.filesystem,
            path,
            {"ended": now(), "status": status, "end_step": step, "reason": reason},
        )

    def attempts(self) -> list[dict[str, Any]]:
        """The attempts by number: attempt, num_ranks, start_step, started, …, and ended, status,
        end_step, reason."""
        found = self._attempts.load()
        numbers = sorted(number for number in map(parse_attempt_file, found) if number is not None)
        return [
            found[make_attempt_file(number)] | found.get(f"{number:04d}-end.json", {})
            for number in numbers
        ]

    # ---- rows -----------------------------------------------------------------------------------

    def log_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, each with `step` and `attempt`; those with `kind: validation` go to a log of
        their own.

        They are stored when this returns: a killed process loses none of them.
        """
        logs: dict[tuple[bool, str], list[Mapping[str, Any]]] = {}
        for row in rows:
            if not {"step", "attempt"} <= row.keys():
                raise ValueError(f"a metrics row needs step and attempt: {sorted(row)}")
            key = row.get("kind") == "validation", f"a{int(row['attempt']):04d}"
            logs.setdefault(key, []).append(row)
        for (is_validation, name), group in logs.items():
            (self._validation if is_validation else self._metrics).append(name, group)

    def metrics(self) -> list[dict[str, Any]]:
        """One row a step, by step: the history that leads to the newest state, without what was
        done and undone."""
        return make_history(self._metrics.rows(), self._start_steps())

    def iterate_metrics(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Every metrics row as it was logged, also what was undone later or logged twice, one after
        another; with `columns` only those keys of it."""
        return self._metrics.iterate(columns=columns)

    def iterate_history(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """`metrics()`, one row after another: memory does not grow with the run."""
        return iterate_history(self._metrics, self._start_steps(), columns)

    def last_metrics(self, count: int) -> list[dict[str, Any]]:
        """The end of `metrics()`, without reading what came before."""
        return last_rows(self._metrics, self._start_steps(), count)

    def outline(self) -> Outline:
        """`metrics()` in outline, for a page, without reading all of it."""
        return make_outline(self._metrics, self._start_steps())

    def validations(self, since: int = 0, count: int | None = None) -> list[dict[str, Any]]:
        """One validation row a step, by step, of the same history; of steps from `since` on, and
        the last `count`."""
        return last_rows(self._validation, self._start_steps(), count, since)

    def _start_steps(self) -> dict[int, int]:
        """Attempt → the step it started from, without those that a driver recorded after its
        successor's: it saw so, and they never ran."""
        found, newest = dict[int, int](), 0
        for attempt in self.attempts():
            if attempt.get("driver", 0) >= newest:
                newest = attempt.get("driver", 0)
                found[attempt["attempt"]] = attempt["start_step"]
        return found

    def metrics_table(self) -> pa.Table:
        """`metrics()` as a table."""
        return make_table(self.metrics())

    def export_metrics_parquet(self) -> str:
        """Write `metrics()` as metrics.parquet into the run folder; its path there."""
        path = f"{self.path}/{PARQUET_FILE}"
        write_whole(self.filesystem, path, lambda stream: write_table(self.iterate_history, stream))
        return path

    def log_event(self, kind: str, **fields: Any) -> None:
        """Append one event, freed of secrets. Any process may."""
        self._events.append("events", [{"time": now(), "kind": kind, **redact_fields(fields)}])

    def events(self) -> list[dict[str, Any]]:
        """All events by time."""
        return sorted(self._events.rows(), key=lambda event: str(event.get("time", "")))

    # ---- checkpoints ----------------------------------------------------------------------------

    def checkpoints(self, verified_only: bool = True) -> list[CheckpointInfo]:
        """The run's own checkpoints by step; with `verified_only=False` also the unsound ones, each
        with its problem.

        One that an attempt committed past the start of a later attempt is no part of the history,
        and unsound.
        """
        start_steps = self._start_steps()
        found = []
        for info in find_checkpoints(self):
            later = [
                number
                for number, start in start_steps.items()
                if number > info.attempt and start < info.step
            ]
            if later and info.verified:
                problem = f"undone: attempt {min(later)} started before it"
                info = replace(info, verified=False, committed=False, problem=problem)
            found.append(info)
        return [info for info in found if info.verified or not verified_only]

    def latest_checkpoint(self) -> CheckpointInfo | None:
        """The newest sound checkpoint; for a fork that has none yet, the one it started from."""
        own = self.checkpoints()
        if own:
            return own[-1]
        origin = self.origin()
        if origin is None:
            return None
        info = inspect_checkpoint(self.filesystem, f"{self._storage_path}/{origin['checkpoint']}")
        if not info.verified:
            raise StoreError(
                f"run {self.name!r}",
                f"the checkpoint it was forked from is unsound: {info.problem}",
                f"it starts from step {origin['step']} of run {origin['run']}",
                "fork again",
            )
        return info

    def lost_steps(self) -> dict[int, str]:
        """Steps of the history that this run committed, each with what is wrong with its checkpoint
        by now; for a run that has no sound one of its own. A step that a later attempt undid, since
        it started before, is none of them.
        """
        starts, base = self._start_steps(), int((self.origin() or {}).get("step", 0))
        found = {
            (number, start): "its files are gone"
            for number, start in starts.items()
            if start > base
        }
        found |= {
            (int(event["attempt"]), int(event["step"])): "its files are gone"
            for event in self.events()
            if event["kind"] == "checkpoint"
        }
        found |= {
            (info.attempt, info.step): info.problem
            for info in find_checkpoints(self)
            if info.committed
        }
        return {
            step: problem
            for (attempt, step), problem in found.items()
            if not any(number > attempt and start < step for number, start in starts.items())
        }

    def set_aside(self, info: CheckpointInfo, reason: str) -> None:
        """Mark a checkpoint as unsound, with the reason: from now on the one before it is used."""
        write_bytes(self.filesystem, f"{info.path}/{REJECTED_FILE}", reason.encode())
        self.log_event("checkpoint_set_aside", step=info.step, attempt=info.attempt, reason=reason)

    @contextmanager
    def hold(self, info: CheckpointInfo) -> Iterator[None]:
        """Keep retention from deleting a checkpoint while the block reads it, in whichever run it
        lies.

        Raises StoreError if a sound one was deleted before it could be held. Where nothing can be
        written nothing is held, and the block runs all the same.
        """
        with hold(self.filesystem, info.path):
            names = list_files(self.filesystem, info.path)
            if info.verified and (MARKER_FILE not in names or DELETING_FILE in names):
                raise StoreError(
                    f"run {self.name!r}",
                    f"the checkpoint of step {info.step} was deleted meanwhile",
                    "retention keeps what is held before it looks",
                    "try again, or choose a newer one",
                )
            yield

    # ---- summary --------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """What `dray show --json` prints: name, status, fingerprint, step, num_steps, attempts,
        train_loss, …"""
        record, rows, validations = self.record(), self.last_metrics(50), self.validations(count=1)
        checkpoints = self.checkpoints(verified_only=False)
        sound = [info.step for info in checkpoints if info.verified]
        has_plan = exists(self.filesystem, f"{self.path}/{PLAN_FILE}")
        rates = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second")]
        return {
            **{
                key: record.get(key)
                for key in ("name", "reason", "created", "fingerprint", "origin")
            },
            "corpus": self.corpus,
            "status": self.status,
            "step": max([int(row["step"]) for row in rows[-1:]] + sound[-1:], default=0),
            "num_steps": self.plan().get("num_steps") if has_plan else None,
            "attempts": [
                {key: value for key, value in attempt.items() if key != "nonce"}
                for attempt in self.attempts()
            ],
            "train_loss": rows[-1].get("loss") if rows else None,
            "validation": {
                key: value
                for key, value in (validations[-1] if validations else {}).items()
                if key not in ("kind", "attempt", "time")
            },
            "tokens_per_second": float(median(rates)) if rates else None,
            "checkpoints": [
                {
                    "step": info.step,
                    "attempt": info.attempt,
                    "path": info.path,
                    "verified": info.verified,
                    "bytes": info.num_bytes,
                    "problem": info.problem,
                }
                for info in checkpoints
            ],
        }


def verify_all(run: Run) -> list[CheckpointReport]:
    """Check every byte of every committed checkpoint of a run, by step."""
    return [
        verify_checkpoint(run, info)
        for info in run.checkpoints(verified_only=False)
        if info.committed
    ]


def list_runs(storage: str | os.PathLike[str]) -> list[Run]:
    """The runs in a storage place by time of creation; none where there is no such place."""
    filesystem, path = open_filesystem(storage)
    with patience(PROBE_SECONDS):  # an address that is mistyped is found out here
        if is_file(filesystem, path):
            raise StoreError(
                shown(absolute(storage)), "is a file", "the storage is a folder of runs"
            )
    names = (name for name in list_folders(filesystem, path) if re.fullmatch(RUN_NAME, name))
    runs = [
        Run(os.fspath(storage), name)
        for name in names
        if name not in RESERVED_NAMES and exists(filesystem, f"{path}/{name}/{RUN_FILE}")
    ]
    return sorted(runs, key=lambda run: str(run.record().get("created")))


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
