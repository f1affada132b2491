"""A sweep in a storage: its spec, its space, the log of its events, and who drives it.

All of it is JSON and YAML, written as a run's records are; its trials are runs in its folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import uuid
from collections.abc import Mapping
from typing import Any

import yaml

from dray.errors import StoreError
from dray.redaction import redact_fields
from dray.runs import Run, check_storage, list_names
from dray.runs.drivers import (
    Driver,
    check_free,
    heartbeat,
    is_alive,
    load_driver,
    release,
    take_over,
)
from dray.runs.layout import RUN_FILE, SWEEP_FILE, check_run_name, make_trial_name
from dray.runs.row_log import RowLog, load_json, make_json, now, save_json
from dray.spec import RUN_NAME, dump_spec, make_spec
from dray.storage.exclusive import create_exclusive
from dray.storage.filesystem import (
    absolute,
    child,
    exists,
    open_filesystem,
    require_writable,
    shown,
    write_bytes,
)
from dray.sweep.events import Event, from_json, to_json
from dray.sweep.space import Space, make_space

LOG = "log"
SPACE_FILE, SPEC_FILE, BEST_FILE = "space.yaml", "spec.yaml", "best.yaml"
CHANGEABLE = ("budget", "concurrency", "packing", "retries", "max_failures")
"""Keys of a space that may change when a sweep goes on: they say how far it goes, not how."""


class Sweep:
    """A sweep in storage, found by `find` and begun by `begin`. Threads of one process may share
    it."""

    def __init__(self, storage: str | os.PathLike[str], name: str) -> None:
        self.storage, self.name = absolute(storage), check_run_name(name)
        self.uri = child(self.storage, name)
        self.filesystem, self.path = open_filesystem(self.uri)
        self._log = RowLog(self.filesystem, f"{self.path}/{LOG}")
        self._lock = threading.Lock()

    @classmethod
    def find(cls, storage: str | os.PathLike[str], name: str) -> Sweep | None:
        """The sweep of that name, if there is one."""
        if not re.fullmatch(RUN_NAME, name):
            return None
        sweep = cls(storage, name)
        return sweep if exists(sweep.filesystem, f"{sweep.path}/{SWEEP_FILE}") else None

    @classmethod
    def open(cls, storage: str | os.PathLike[str], name: str) -> Sweep:
        """The sweep of that name. Raises StoreError if there is none."""
        sweep = cls.find(storage, name)
        if sweep is None:
            raise StoreError(
                f"sweep {name!r}",
                f"there is none in {shown(absolute(storage))}",
                way_out="`dray runs` lists what there is",
            )
        return sweep

    @classmethod
    def begin(
        cls,
        storage: str,
        name: str,
        tree: Mapping[str, Any],
        space: Space,
        ladder: Mapping[str, Any] | None = None,
    ) -> Sweep:
        """Begin a sweep, or go on with the one of that name. `ladder`: of what its trials are the
        rungs. Raises StoreError as `check` does."""
        sweep = cls.check(storage, name, tree, space)
        if not exists(sweep.filesystem, f"{sweep.path}/{SWEEP_FILE}"):
            sweep._begin(tree, space, {} if ladder is None else {"ladder": dict(ladder)})
            sweep._check_same(tree, space)  # two may have begun at once: one of them was faster
        elif ladder is not None:
            sweep.update(ladder=dict(ladder))
        text = yaml.safe_dump(space.model_dump(mode="json", exclude_unset=True), sort_keys=False)
        write_bytes(sweep.filesystem, f"{sweep.path}/{SPACE_FILE}", text.encode())
        return sweep

    @classmethod
    def check(cls, storage: str, name: str, tree: Mapping[str, Any], space: Space) -> Sweep:
        """Raise StoreError if the sweep of that name is another one or is being driven, a run has
        its name, or the storage cannot be written. Writes nothing."""
        check_storage(storage)
        sweep = cls.check_name(storage, name)
        if sweep is not None:
            sweep._check_same(tree, space)
            check_free(sweep.filesystem, sweep.path, f"sweep {name!r}")
        return sweep or cls(storage, name)

    @classmethod
    def check_name(cls, storage: str, name: str) -> Sweep | None:
        """The sweep of that name, if there is one. Raises StoreError for a name that is none, or a
        run's."""
        sweep = cls(storage, name)
        if exists(sweep.filesystem, f"{sweep.path}/{RUN_FILE}"):
            raise StoreError(
                f"sweep {name!r}",
                "a run has that name",
                "a sweep and a run do not share a folder",
                "choose another with --run",
            )
        return sweep if exists(sweep.filesystem, f"{sweep.path}/{SWEEP_FILE}") else None

    def _begin(self, tree: Mapping[str, Any], space: Space, besides: Mapping[str, Any]) -> None:
        require_writable(self.filesystem, self.path, self.uri)
        spec = make_spec(tree)
        record = {
            "name": self.name,
            "created": now(),
            "nonce": uuid.uuid4().hex,
            "status": "created",
            "reason": "",
            "fingerprint": make_fingerprint(tree, space),
            "spec": dict(tree),
            "space": space.model_dump(mode="json"),
            **besides,
        }
        write_bytes(self.filesystem, f"{self.path}/{SPEC_FILE}", dump_spec(spec).encode())
        create_exclusive(self.filesystem, f"{self.path}/{SWEEP_FILE}", make_json(record, indent=1))

    def _check_same(self, tree: Mapping[str, Any], space: Space) -> None:
        record = self.record()
        if record["fingerprint"] == make_fingerprint(tree, space):
            return
        before = make_space(record["space"])
        differing = [
            f"the space's {key}"
            for key in Space.model_fields
            if key not in CHANGEABLE and getattr(before, key) != getattr(space, key)
        ]
        raise StoreError(
            f"sweep {self.name!r}",
            f"{', '.join(differing) or 'the spec'} differs from what it began with",
            "a sweep compares runs of one spec by one space",
            "undo the change, or begin another sweep with --run NEW_NAME",
        )

    # ---- records --------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """sweep.json."""
        return load_json(self.filesystem, f"{self.path}/{SWEEP_FILE}")

    def update(self, **fields: Any) -> None:
        """Change what sweep.json says."""
        save_json(
            self.filesystem,
            f"{self.path}/{SWEEP_FILE}",
            {**self.record(), **redact_fields(fields)},
        )

    def log(self, event: Event) -> None:
        """Append an event; it is stored when this returns."""
        with self._lock:
            self._log.append("events", [{"time": now(), **redact_fields(to_json(event))}])

    def events(self) -> list[tuple[str, Event]]:
        """All events in their order, each with its time."""
        where = f"{self.uri}/{LOG}"
        return [(str(row.get("time", "")), from_json(row, where)) for row in self._log.rows()]

    def keep_best(self, text: str) -> str:
        """Write the spec of the best trial; its place."""
        write_bytes(self.filesystem, f"{self.path}/{BEST_FILE}", text.encode())
        return child(self.uri, BEST_FILE)

    def run(self, trial: int) -> Run | None:
        """The run of a trial, if it has begun."""
        return Run.find(self.storage, make_trial_name(self.name, trial))

    # ---- drivers --------------------------------------------------------------------------------

    def take_over(self) -> Driver:
        """Become its driver. Raises StoreError while another one lives."""
        return take_over(self.filesystem, self.path, f"sweep {self.name!r}")

    def heartbeat(self, driver: Driver) -> None:
        """Give a sign of life. Raises StoreError if another driver has taken it over."""
        heartbeat(self.filesystem, self.path, driver, f"sweep {self.name!r}")

    def release(self, driver: Driver) -> None:
        release(self.filesystem, self.path, driver)

    def is_driven(self, at: float) -> bool:
        """Whether its driver lives (`at`: seconds since 1970)."""
        record = load_driver(self.filesystem, self.path)
        return record is not None and is_alive(self.filesystem, self.path, record, at)


def make_fingerprint(tree: Mapping[str, Any], space: Space) -> str:
    """What makes a sweep this one: what its spec trains, and how its space is searched."""
    searched = space.model_dump(mode="json", exclude=set(CHANGEABLE))
    spec = make_spec(tree)
    trained = [spec.fingerprint(), spec.validation.metric, spec.duration.model_dump()]
    text = json.dumps([trained, searched], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def list_sweeps(storage: str | os.PathLike[str]) -> list[Sweep]:
    """The sweeps in a storage by time of creation."""
    found = [Sweep.find(storage, name) for name in list_names(storage)]
    return sorted(
        (sweep for sweep in found if sweep is not None),
        key=lambda sweep: str(sweep.record().get("created")),
    )
