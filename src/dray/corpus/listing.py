"""What lies below a folder, each file once, and a count of what is left out of it by reason.

On a local disk links are followed, but a folder that a link comes back to, and a file that a second
link names, are not read twice. Nothing is left out without being counted here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

from pyarrow import fs as pafs

from dray.corpus.manifest import LeftOut
from dray.storage.filesystem import is_local

MAX_EXAMPLES = 5
"""Names that are kept of the files left out for one reason; all are counted."""
SKIPPED_NAMES = {"__pycache__", "_SUCCESS", "_metadata", "_common_metadata"}
HIDDEN = "hidden or bookkeeping"


@dataclass(frozen=True)
class Entry:
    """A file as the filesystem lists it."""

    path: str
    num_bytes: int
    stamp: str
    is_link: bool = False
    identity: tuple[int, int] = (0, 0)
    """Device and inode of a local file."""


@dataclass
class Leavings:
    """Counts files that are left out, by reason, and keeps the first names of each."""

    by_reason: dict[str, LeftOut] = field(default_factory=dict)

    def add(self, reason: str, path: str, num_bytes: int = 0, num_files: int = 1) -> None:
        """Count a file (or a folder, for the files in it that nobody counted) as left out."""
        known = self.by_reason.get(reason) or LeftOut(
            reason=reason, num_files=0, num_bytes=0, examples=()
        )
        self.by_reason[reason] = LeftOut(
            reason=reason,
            num_files=known.num_files + num_files,
            num_bytes=known.num_bytes + num_bytes,
            examples=(*known.examples, path)[:MAX_EXAMPLES],
        )

    def merge(self, others: tuple[LeftOut, ...]) -> None:
        """Add the counts of other leavings."""
        for other in others:
            for nth, path in enumerate(other.examples):
                self.add(
                    other.reason,
                    path,
                    other.num_bytes * (nth == 0),
                    other.num_files - len(other.examples) + 1 if nth == 0 else 1,
                )

    def to_records(self) -> tuple[LeftOut, ...]:
        """The counts in the order of the reasons' names."""
        return tuple(self.by_reason[reason] for reason in sorted(self.by_reason))


def is_hidden(relative: str) -> bool:
    """Whether a name on the way to the file begins with a dot, or is one that frameworks leave
    behind."""
    return any(part.startswith(".") or part in SKIPPED_NAMES for part in relative.split("/"))


def list_entries(
    filesystem: pafs.FileSystem,
    root: str,
    recursive: bool,
    leavings: Leavings,
    stamp_of: Callable[[pafs.FileInfo], str],
) -> list[Entry]:
    """The files below a folder, sorted by path. Raises OSError if a folder cannot be listed."""
    if is_local(filesystem):
        return sorted(_walk(root, recursive, leavings), key=lambda entry: entry.path)
    items = filesystem.get_file_info(pafs.FileSelector(root, recursive=recursive))
    return [
        Entry(cast(str, item.path), int(item.size or 0), stamp_of(item))
        for item in sorted(items, key=lambda item: str(item.path))
        if item.type == pafs.FileType.File
    ]


def _walk(root: str, recursive: bool, leavings: Leavings) -> Iterator[Entry]:
    """Files below a local folder. Folders come before links to folders, so that the real path is
    the one kept."""
    visited: set[tuple[int, int]] = set()
    folders, links = [root], list[str]()
    while folders or links:
        path = folders.pop() if folders else links.pop(0)
        status = os.stat(path)
        # A link to a folder above comes back to where it lies, even if that one was not visited
        # itself.
        if (status.st_dev, status.st_ino) in visited or _leads_up(path, root):
            leavings.add("links to folders that are read already", path)
            continue
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(path) as listing:
            items = sorted(listing, key=lambda item: item.name)
        for item in items:
            if not os.path.isdir(
                item.path
            ):  # not item.is_dir(), which raises for links in a circle
                entry = _entry(item, leavings)
                if entry is not None:
                    yield entry
            elif recursive and is_hidden(item.name):
                leavings.add(HIDDEN, item.path + "/")
            elif recursive:
                (links if item.is_symlink() else folders).append(item.path)


def _leads_up(path: str, root: str) -> bool:
    """Whether a link leads to a folder that holds it."""
    if path == root or not os.path.islink(path):
        return False
    target = os.path.realpath(path)
    return os.path.realpath(os.path.dirname(path)).startswith(target.rstrip("/") + "/")


def _entry(item: os.DirEntry[str], leavings: Leavings) -> Entry | None:
    try:
        status = item.stat()
    except OSError as error:  # a link that leads nowhere, or in a circle
        leavings.add("links that lead nowhere", f"{item.path} ({error.strerror})")
        return None
    if not stat.S_ISREG(status.st_mode):
        leavings.add("pipes, sockets and devices", item.path)
        return None
    return Entry(
        item.path,
        status.st_size,
        str(status.st_mtime_ns),
        item.is_symlink(),
        (status.st_dev, status.st_ino),
    )


def drop_second_links(entries: list[Entry], leavings: Leavings) -> list[Entry]:
    """The entries without links to files that are among them under another name."""
    kept = [entry for entry in entries if not entry.is_link]
    seen = {entry.identity for entry in kept}
    for entry in entries:
        if entry.is_link and entry.identity in seen:
            leavings.add("links to files that are read already", entry.path, entry.num_bytes)
        elif entry.is_link:
            seen.add(entry.identity)
            kept.append(entry)
    return sorted(kept, key=lambda entry: entry.path)
