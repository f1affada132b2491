"""A folder that appears whole or not at all: it is filled under a hidden name beside its own, and
renamed once all of it is on the disk.

Nothing is overwritten. What a killed process left is removed by the next one that writes the same
folder: as long as a process lives, the hidden folder is locked.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dray.errors import StoreError
from dray.storage.filesystem import sync

_NOT_EMPTY = (
    "exists and is not empty",
    "nothing is overwritten",
    "choose another folder",
)
_LEFT = ".partial"


def check_free(folder: str) -> Path:
    """The path of a folder that may be written: there is none, or an empty one. Raises
    StoreError."""
    target = Path(os.path.realpath(folder))
    try:
        taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except OSError as error:
        raise _unwritable(folder, error) from error
    if taken:
        raise StoreError(folder, *_NOT_EMPTY)
    return target


@contextmanager
def staged(folder: str, target: Path) -> Iterator[Path]:
    """A new empty folder, which becomes `target` when the block ends, and is gone if it fails.
    `folder` is how the person calls it. Raises StoreError where it cannot be written."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(target)
        staging = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}{_LEFT}")
        staging.mkdir()
        lock = os.open(staging, os.O_RDONLY)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        with suppress(OSError):  # a filesystem without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        whole = staging / "whole"
        try:
            whole.mkdir()
            yield whole
            _sync_all(whole)
            os.rename(whole, target)  # over an empty folder, too, but over no other
            sync(str(target.parent))
        except OSError as error:
            if isinstance(error, StoreError):  # of a storage that the run is read from
                raise
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise StoreError(folder, *_NOT_EMPTY) from error
            raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def check_room(folder: str, target: Path, num_bytes: int) -> None:
    """Raise StoreError unless the disk has room for so many bytes."""
    place = next(path for path in (target, *target.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise StoreError(
            folder,
            f"takes about {num_bytes / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB left",
            "a folder appears whole or not at all",
            "make room, or choose another disk",
        )


def _remove_left(target: Path) -> None:
    """Remove what processes left that were killed while they wrote this folder."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*{_LEFT}"):
        with suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


def _sync_all(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(str(path))
    sync(str(folder))


def _unwritable(folder: str, error: OSError) -> StoreError:
    return StoreError(folder, f"cannot be written ({error.strerror or error})")
