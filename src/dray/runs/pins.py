"""Pins: the checkpoints that must stay, because a fork started from them or somebody is reading
them.

A fork's pin counts for as long as the fork exists; a reader's until it is done, its process is
gone, or a day is over.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from pyarrow import fs as pafs

from dray.errors import StorageFailed
from dray.runs.drivers import is_gone, make_process
from dray.runs.layout import CHECKPOINTS, PINS, RUN_FILE
from dray.runs.row_log import load_json, now, save_json
from dray.storage.filesystem import delete_file, exists, list_files

HOLD = "_hold-"
"""How the names of readers' pins begin; no run's name, and so no fork's pin, begins so."""
HOLD_HOURS, FORK_HOURS = 24, 1
"""After how long a reader's pin ends by itself, and one of a fork that never came to be."""


@contextmanager
def hold(filesystem: pafs.FileSystem, checkpoint: str) -> Iterator[None]:
    """Keep a checkpoint (its path) from being deleted while the block runs. Where nothing can be
    written, nothing is held: whoever may only read cannot be waited for."""
    run_path, _, name = checkpoint.rsplit("/", 2)
    path = f"{run_path}/{PINS}/{HOLD}{uuid.uuid4().hex[:12]}.json"
    try:
        save_json(
            filesystem, path, {"folder": name, "time": now(), **make_process()}, durable=False
        )
        held = True
    except StorageFailed:
        held = False
    try:
        yield
    finally:
        if held:
            delete_file(filesystem, path)


def pinned_checkpoints(filesystem: pafs.FileSystem, run_path: str, storage: str) -> set[str]:
    """Paths of the checkpoints that a run must keep; `storage` is the path of its storage with a
    slash at its end.

    Readers' pins that are over are cleared away. A fork that is not there yet may be just
    beginning.
    """
    folder, pinned = f"{run_path}/{PINS}", set[str]()
    for name in list_files(filesystem, folder):
        try:
            pin = load_json(filesystem, f"{folder}/{name}")
        except FileNotFoundError:  # its reader is done
            continue
        if not name.startswith(HOLD):
            if _is_younger(pin["pinned"], FORK_HOURS) or exists(
                filesystem, f"{storage}{pin['run']}/{RUN_FILE}"
            ):
                pinned.add(f"{storage}{pin['checkpoint']}")
        elif not is_gone(pin) and _is_younger(pin["time"], HOLD_HOURS):
            pinned.add(f"{run_path}/{CHECKPOINTS}/{pin['folder']}")
        else:
            delete_file(filesystem, f"{folder}/{name}")
    return pinned


def _is_younger(time: str, hours: float) -> bool:
    return time > (datetime.now(UTC) - timedelta(hours=hours)).isoformat()
