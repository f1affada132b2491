"""SHA-256 of local files, read by several threads and remembered, so that a file is hashed once and
not at every start.

What is remembered lies in the user's cache, one small file for each folder of inputs, and holds
only for a file whose inode, size and times are still the same. Without a cache that can be written
everything is hashed again: it is never needed. Refuses files that change while they are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from dray.storage.cache import cache_folder

HASHED_BYTES = 1024 * 1024
MAX_THREADS = 16
FILES_AT_ONCE = 4096
SETTLED_SECONDS = 2.0
"""A file written less than this ago may be written again within one tick of its clock: it is
hashed, not remembered."""
MAX_TRIES = 3

Stamp = tuple[int, int, int, int]
"""Inode, size, and the times of the last change of content and of the inode, in nanoseconds."""
Attempt = Callable[[Callable[[], str], str], str]
"""Runs the hashing of one file, named by its path: tries again where a network mount fails for the
moment."""


class FileChanges(OSError):
    """A file is written while it is read: it has no digest."""


def digest_files(
    paths: Sequence[str], attempt: Attempt = lambda work, path: work()
) -> dict[str, str]:
    """Path → SHA-256 of the content, as 64 hexadecimal digits. Memory: a block a thread, and the
    digests.

    Raises FileNotFoundError and other OSErrors, FileChanges among them.
    """
    memory = _Memory({os.path.dirname(path) for path in paths})
    found: dict[str, str] = {}

    def look(path: str) -> tuple[str, str]:
        return path, memory.recall(path) or attempt(lambda: _digest_whole(path, memory), path)

    with ThreadPoolExecutor(min(MAX_THREADS, 2 * (os.cpu_count() or 1))) as pool:
        try:
            for start in range(0, len(paths), FILES_AT_ONCE):
                found.update(pool.map(look, paths[start : start + FILES_AT_ONCE]))
        finally:
            pool.shutdown(cancel_futures=True)
            memory.save()
    return found


def recall_digests(paths: Sequence[str], max_bytes: int = 0) -> dict[str, str]:
    """Path → digest of those files whose digest is remembered, and of as many others as hold
    `max_bytes` in all. Files that cannot be read are left out."""
    memory = _Memory({os.path.dirname(path) for path in paths})
    found: dict[str, str] = {}
    for path in paths:
        with suppress(OSError):
            digest = memory.recall(path)
            if not digest and (max_bytes := max_bytes - os.path.getsize(path)) >= 0:
                digest = _digest_whole(path, memory)
            if digest:
                found[path] = digest
    return found


def _digest_whole(path: str, memory: _Memory) -> str:
    for _ in range(MAX_TRIES):
        before = _stamp(path)
        digest = _digest(path)
        if _stamp(path) == before:
            memory.remember(path, before, digest)
            return digest
    raise FileChanges(f"{path} changes while it is read")


def _digest(path: str) -> str:
    found, block = hashlib.sha256(), bytearray(HASHED_BYTES)
    view = memoryview(block)
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(block):
            found.update(view[:count])
    return found.hexdigest()


def _stamp(path: str) -> Stamp:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class _Memory:
    """What is remembered of the files in some folders. Who saves last wins: others' digests are
    found out again."""

    def __init__(self, folders: set[str]) -> None:
        self._place = cache_folder("digests")
        self._known = {folder: self._load(folder) for folder in folders}
        self._changed: set[str] = set()

    def recall(self, path: str) -> str:
        """The digest of a file that is as it was, or an empty text. Raises FileNotFoundError."""
        kept = self._known[os.path.dirname(path)].get(os.path.basename(path))
        stamp = _stamp(path)
        return str(kept[-1]) if isinstance(kept, list) and tuple(kept[:-1]) == stamp else ""

    def remember(self, path: str, stamp: Stamp, digest: str) -> None:
        """Keep a digest, unless the file is so fresh that its times may not tell of the next
        change."""
        if time.time_ns() - max(stamp[2:]) > SETTLED_SECONDS * 1e9:
            folder, name = os.path.split(path)
            self._known[folder][name] = [*stamp, digest]
            self._changed.add(folder)

    def save(self) -> None:
        """Write what has been found out. A cache that cannot be written is no failure."""
        for folder in self._changed:
            with suppress(OSError):
                os.makedirs(self._place, mode=0o700, exist_ok=True)
                made = f"{self._file(folder)}.{uuid.uuid4().hex[:8]}"
                with open(made, "w", encoding="utf-8") as stream:
                    json.dump({"folder": folder, "files": self._known[folder]}, stream)
                os.replace(made, self._file(folder))
        self._changed.clear()

    def _load(self, folder: str) -> dict[str, list[int | str]]:
        try:
            with open(self._file(folder), encoding="utf-8") as stream:
                kept = json.load(stream)
            return dict(kept["files"]) if kept["folder"] == folder else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _file(self, folder: str) -> str:
        return os.path.join(
            self._place, hashlib.sha256(folder.encode(errors="surrogateescape")).hexdigest()[:24]
        )
