"""One run is one folder: its spec, plan, record, attempts, metrics, events and checkpoints, on any
filesystem.

A `Run` holds no open files and may be pickled: the copy opens the folder anew. How one begins is
told in beginning.py.
"""

from __future__ import annotations

import hashlib
import json
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
    COMPRESSION_FILE,
    CORPORA,
    CORPUS,
    DELETING_FILE,
    EVALUATIONS,
    EVENTS,
    MARKER_FILE,
    METRICS,
    MODEL_FILE,
    NOISE_FILE,
    PARQUET_FILE,
    PLAN_FILE,
    REJECTED_FILE,
    RESERVED_NAMES,
    RUN_FILE,
    SPEC_FILE,
    SWEEP_FILE,
    VALIDATION,
    check_kept_checkpoint,
    check_run_name,
    make_attempt_file,
    parse_attempt_file,
    parse_trial_name,
)
from dray.runs.pins import hold
from dray.runs.records import AttemptRecord
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
    make_spec,
    read_yaml,
)
from dray.storage.exclusive import create_exclusive
from dray.storage.filesystem import (
    PROBE_SECONDS,
    absolute,
    child,
    exists,
    is_file,
    is_local,
    is_uri,
    list_files,
    list_folders,
    open_filesystem,
    read_bytes,
    shown,
    write_bytes,
    write_whole,
)
from dray.storage.retrying import first_safe_line, patience

_CHECKPOINT_BELOW = re.compile(rf"(^[^/]+/\d{{4,}}|/[^/]+)/{CHECKPOINTS}/[^/]+/?$")
"""The end of a checkpoint's path: below a trial of a sweep, or below another run."""

STATUSES = ("created", "running", "completed", "stopped", "failed", "interrupted")


class Run:
    """A run in storage. Found by `open` and `find`; `runs.beginning` makes new ones."""

    def __init__(self, storage: str, name: str) -> None:
        self.storage, self.name = absolute(storage), check_run_name(name)
        self.uri = child(self.storage, name)
        self.filesystem, self.path = open_filesystem(self.uri)
        self.storage_path = self.path.removesuffix(f"/{name}")
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
        return path.removeprefix(f"{self.storage_path}/")

    def find_path(self, kept: str) -> str:
        """The path that a record keeps, where the storage is now. Records of earlier versions hold
        it whole. Raises StoreError for one that is no checkpoint's."""
        below = kept.removeprefix(f"{self.storage_path}/")
        if below == kept and (
            found := _CHECKPOINT_BELOW.search(kept) or _CHECKPOINT_BELOW.search(f"/{kept}")
        ):
            below = found[0].lstrip("/")
        return f"{self.storage_path}/{check_kept_checkpoint(below)}"

    @property
    def corpus(self) -> str:
        """Where the run's corpus lies (absolute path or URI); empty if none is on record.

        One below the storage moves with it, one elsewhere stays where it was. Raises StoreError for
        one that only pretends to lie below.
        """
        record = self.record()
        kept, key = record.get("corpus") or "", record.get("corpus_key")
        if ".." in kept.split("/"):
            raise StoreError(
                f"run {self.name!r}",
                f"its corpus {kept!r} leaves the storage",
                "what lies elsewhere is named by an absolute path or a URI",
            )
        if not kept or not (is_uri(kept) or os.path.isabs(kept)):
            return kept and child(self.storage, *kept.split("/"))
        if key and not exists(
            *open_filesystem(kept)
        ):  # an earlier version's record of a storage that was moved
            moved = child(self.storage, CORPORA, key)
            return moved if exists(*open_filesystem(moved)) else kept
        return kept

    def keep_place(self, place: str) -> str:
        """A place as records keep it: below the storage, or whole where it lies elsewhere."""
        storage = f"{shown(self.storage).rstrip('/')}/"
        return shown(place).removeprefix(storage) if shown(place).startswith(storage) else place

    # ---- opening --------------------------------------------------------------------------------

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

    # ---- records --------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """run.json: name, created, status, fingerprint, identity, corpus, and what `update`
        added. Raises StoreError for one that is no record of a run."""
        path = f"{self.path}/{RUN_FILE}"
        # Records of earlier versions may hold URIs with credentials.
        found = cast("dict[str, Any]", take_in_all(load_json(self.filesystem, path)))
        if not all(isinstance(found.get(name), str) for name in ("status", "fingerprint")):
            raise StoreError(
                path,
                "is no record of a run",
                "it has a status and a fingerprint",
                "put the file back from a copy of the run",
            )
        return found

    def update(self, **fields: Any) -> None:
        """Set fields of run.json. One process at a time: the driver."""
        save_json(self.filesystem, f"{self.path}/{RUN_FILE}", self.record() | fields)

    def spec(self) -> Spec:
        """The spec as last run. Raises StoreError if it is not there."""
        path = f"{self.path}/{SPEC_FILE}"
        try:
            tree = read_yaml(read_bytes(self.filesystem, path).decode())
            return make_spec(tree, path, kept=True)
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

    def noise(self) -> dict[str, Any] | None:
        """What the noise of a private run follows from: `key` and `noise_multiplier`. A secret."""
        try:
            return load_json(self.filesystem, f"{self.path}/{NOISE_FILE}")
        except FileNotFoundError:
            return None

    def keep_noise(self, kept: Mapping[str, Any]) -> None:
        """Keep it, for the run's owner alone where the storage is a disk."""
        path = f"{self.path}/{NOISE_FILE}"
        create_exclusive(self.filesystem, path, json.dumps(kept).encode())
        if is_local(self.filesystem):
            os.chmod(path, 0o600)

    @property
    def corpus_copy(self) -> str:
        """Where the run keeps the manifest and the tokeniser of its corpus (absolute path or
        URI)."""
        return child(self.uri, CORPUS)

    def origin(self) -> dict[str, Any] | None:
        """What a fork started from: run, step, attempt, checkpoint (path below the storage),
        fingerprint, differing. Raises StoreError for a checkpoint that lies elsewhere."""
        origin = cast("dict[str, Any] | None", self.record().get("origin"))
        if origin is not None:
            check_kept_checkpoint(origin["checkpoint"])
        return origin

    def compressed(self) -> dict[str, Any] | None:
        """What a compressed run was made from: run, step, attempt, manifest_sha256, methods, and
        whether its weights are `packed` in fewer bytes; none for a run that was trained."""
        return cast("dict[str, Any] | None", self.record().get("compressed"))

    def compression(self) -> dict[str, Any] | None:
        """The table of a compressed run, before and after; none for a run that was trained."""
        try:
            return load_json(self.filesystem, f"{self.path}/{COMPRESSION_FILE}")
        except FileNotFoundError:
            return None

    def keep_evaluation(
        self, known: Mapping[str, Any], measured: Mapping[str, Any], data: Sequence[str] = ()
    ) -> None:
        """Keep what was measured of a checkpoint: `known` says of which, and on what; `data` is
        that in words, nothing the validation rows."""
        record = {"of": dict(known), "data": list(data), "measured": dict(measured)}
        save_json(self.filesystem, self._evaluation(known), record)

    def find_evaluation(self, known: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was measured and kept; none where nothing was."""
        try:
            record = load_json(self.filesystem, self._evaluation(known))
        except FileNotFoundError:
            return None
        return cast("dict[str, Any]", record["measured"])

    def evaluations(self, step: int) -> list[tuple[list[str], dict[str, Any]]]:
        """All that was kept of a step: on which data, and what was measured."""
        folder = f"{self.path}/{EVALUATIONS}"
        records = [
            load_json(self.filesystem, f"{folder}/{name}")
            for name in sorted(list_files(self.filesystem, folder))
            if name.endswith(".json")
        ]
        found = [(list(one["data"]), dict(one["measured"])) for one in records]
        return [(data, measured) for data, measured in found if measured.get("step") == step]

    def _evaluation(self, known: Mapping[str, Any]) -> str:
        digest = hashlib.sha256(make_json(dict(sorted(known.items())))).hexdigest()
        return f"{self.path}/{EVALUATIONS}/{digest[:32]}.json"

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
        newest one. `fields`: others of an AttemptRecord. Raises StoreError if a later driver has
        taken the run over.
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

    def attempts(self) -> list[AttemptRecord]:
        """The attempts by number. Raises StoreError for a record that is none."""
        found = self._attempts.load()
        numbers = sorted(number for number in map(parse_attempt_file, found) if number is not None)
        attempts = []
        for number in numbers:
            file = make_attempt_file(number)
            try:
                attempt = AttemptRecord.from_json(
                    found[file] | found.get(f"{number:04d}-end.json", {})
                )
            except (KeyError, TypeError, ValueError) as error:
                raise StoreError(
                    f"{self.path}/{ATTEMPTS}/{file}",
                    f"is no record of an attempt ({type(error).__name__}: {error})",
                    way_out="put the file back from a copy of the run",
                ) from error
            attempts.append(attempt)
        return attempts

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
            if attempt.driver >= newest:
                newest = attempt.driver
                found[attempt.number] = attempt.start_step
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
        info = inspect_checkpoint(self.filesystem, f"{self.storage_path}/{origin['checkpoint']}")
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
            "attempts": [attempt.to_json() for attempt in self.attempts()],
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
            **({"compression": self.compression()} if record.get("compressed") else {}),
        }


def verify_all(run: Run) -> list[CheckpointReport]:
    """Check every byte of every committed checkpoint of a run, by step."""
    return [
        verify_checkpoint(run, info)
        for info in run.checkpoints(verified_only=False)
        if info.committed
    ]


def list_names(storage: str | os.PathLike[str]) -> list[str]:
    """Names of the folders in a storage place that may be runs or sweeps; none where there is no
    such place. Raises StoreError for a file."""
    filesystem, path = open_filesystem(storage)
    with patience(PROBE_SECONDS):  # an address that is mistyped is found out here
        if is_file(filesystem, path):
            raise StoreError(
                shown(absolute(storage)), "is a file", "the storage is a folder of runs"
            )
    return [
        name
        for name in list_folders(filesystem, path)
        if re.fullmatch(RUN_NAME, name) and name not in RESERVED_NAMES
    ]


def list_runs(storage: str | os.PathLike[str], *, trials: bool = False) -> list[Run]:
    """The runs in a storage place by time of creation; of sweeps, too, if their `trials` are asked
    for; none where there is no such place."""
    filesystem, path = open_filesystem(storage)
    names = []
    for name in list_names(storage):
        if exists(filesystem, f"{path}/{name}/{RUN_FILE}"):
            names.append(name)
        elif trials and exists(filesystem, f"{path}/{name}/{SWEEP_FILE}"):
            within = (f"{name}/{folder}" for folder in list_folders(filesystem, f"{path}/{name}"))
            names += [
                trial
                for trial in within
                if parse_trial_name(trial) and exists(filesystem, f"{path}/{trial}/{RUN_FILE}")
            ]
    runs = [Run(os.fspath(storage), name) for name in names]
    return sorted(runs, key=lambda run: str(run.record().get("created")))
