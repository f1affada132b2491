"""Runs that are written whole, since nothing trains them: those that compressing makes.

A name is held while one is made, so that two makers do not write into one folder. The record that
makes a folder a run comes last: whoever is killed before leaves no run, and what it left is
cleared by the next one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from dray.errors import Interrupted, RunFailed, StoreError
from dray.runs.beginning import make_record
from dray.runs.commit import CheckpointWriter
from dray.runs.drivers import Driver, Heart
from dray.runs.layout import COMPRESSION_FILE, DRIVERS, PLAN_FILE, RUN_FILE, SPEC_FILE, SWEEP_FILE
from dray.runs.row_log import make_json, save_json
from dray.runs.run import Run
from dray.spec import NAME_RULE, RUN_NAME, Spec, dump_spec
from dray.storage.exclusive import create_exclusive
from dray.storage.filesystem import (
    delete_file,
    delete_folder,
    exists,
    list_files,
    list_folders,
    open_filesystem,
    read_bytes,
    require_writable,
    shown,
    write_bytes,
)

if TYPE_CHECKING:
    import torch


def is_name_free(storage: str | os.PathLike[str], name: str) -> bool:
    """Whether neither a run nor a sweep has the name."""
    run = Run(os.fspath(storage), name)
    return not any(exists(run.filesystem, f"{run.path}/{file}") for file in (RUN_FILE, SWEEP_FILE))


def check_name_free(storage: str | os.PathLike[str], name: str) -> None:
    """Raise StoreError where a run or a sweep has the name, or the storage cannot be written."""
    if not re.fullmatch(RUN_NAME, name):
        raise StoreError(f"run {ascii(name)[:200]}", "not a name for a run", NAME_RULE)
    run = Run(os.fspath(storage), name)
    if not is_name_free(storage, name):
        raise StoreError(
            f"run {name!r}",
            f"exists already in {shown(run.storage)}",
            "a new run has a new name",
            "name another one: --name",
        )
    _check_ours(run)
    require_writable(run.filesystem, run.storage_path, run.storage)


def _check_ours(run: Run) -> None:
    """Raise StoreError for a folder that nobody has held a name by: what is in it is somebody's.
    What a maker that was killed has left may be cleared."""
    found = [*list_folders(run.filesystem, run.path), *list_files(run.filesystem, run.path)]
    if found and DRIVERS not in found:
        raise StoreError(
            f"run {run.name!r}",
            f"would lie in a folder of {shown(run.storage)} that holds {', '.join(found[:5])}",
            "a run has a folder of its own, and nothing of others is overwritten",
            "name another one: --name",
        )


@contextmanager
def holding_name(storage: str | os.PathLike[str], name: str) -> Iterator[tuple[Run, Driver]]:
    """A name for a run that is to be made: nobody else makes one by it meanwhile. Raises StoreError
    where another maker is at work.

    Where the block ends without a run nothing of the folder is left; but where it is interrupted,
    or what was trained in there failed, that stays, for the next maker to go on with.
    """
    run = Run(os.fspath(storage), name)
    _check_ours(run)
    driver, goes_on = run.take_over(), False
    try:
        with Heart(partial(run.heartbeat, driver), lambda error: None):
            yield run, driver
    except (KeyboardInterrupt, Interrupted, RunFailed):
        goes_on = set(list_folders(run.filesystem, run.path)) != {DRIVERS}
        raise
    finally:
        run.release(driver)
        if not goes_on and not exists(run.filesystem, f"{run.path}/{RUN_FILE}"):
            delete_folder(run.filesystem, run.path)


def clear(run: Run, *keep: str) -> None:
    """Delete what a maker that was killed has left in the folder of a name that is held, but for
    the folders to keep."""
    for name in list_folders(run.filesystem, run.path):
        if name not in (DRIVERS, *keep):
            delete_folder(run.filesystem, f"{run.path}/{name}")
    for name in list_files(run.filesystem, run.path):
        if name not in keep:
            delete_file(run.filesystem, f"{run.path}/{name}")


def create_finished(
    run: Run,
    driver: Driver,
    spec: Spec,
    *,
    like: Run,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any],
    step: int,
    compressed: Mapping[str, Any],
    table: Mapping[str, Any] | None = None,
) -> None:
    """Make the run that is held: its one checkpoint at `step` with `tensors` by fragment key and
    `metadata`, the corpus of `like`, and the record of what it was made from. Raises StoreError."""
    attempt = run.begin_attempt(1, step, driver.number)
    writer = CheckpointWriter(run, step, attempt)
    writer.commit([writer.write_rank(0, 1, tensors)], metadata)
    _copy_folder(like.corpus_copy, run.corpus_copy)
    run.keep_model(config)
    write_bytes(run.filesystem, f"{run.path}/{SPEC_FILE}", dump_spec(spec).encode())
    save_json(run.filesystem, f"{run.path}/{PLAN_FILE}", {"num_steps": step})
    if table is not None:
        save_json(run.filesystem, f"{run.path}/{COMPRESSION_FILE}", table)
    run.end_attempt(attempt, "completed", step)
    record = make_record(run, spec, like.corpus, like.record().get("corpus_key", ""))
    record |= {"status": "completed", "compressed": dict(compressed)}
    if not create_exclusive(run.filesystem, f"{run.path}/{RUN_FILE}", make_json(record, indent=1)):
        raise StoreError(f"run {run.name!r}", "was made by another meanwhile")


def _copy_folder(source: str, target: str) -> None:
    (filesystem, path), (other, there) = open_filesystem(source), open_filesystem(target)
    for name in list_files(filesystem, path):
        write_bytes(other, f"{there}/{name}", read_bytes(filesystem, f"{path}/{name}"))
    for name in list_folders(filesystem, path):
        _copy_folder(f"{source}/{name}", f"{target}/{name}")
