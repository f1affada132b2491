"""Datasets of feedback in a storage: an entry is a file that is created once and never changed.

Below `STORAGE/serving/feedback/NAME`, `entries/ID.json` are the entries, `forgotten/ID.json` says
of one that is no more when and why, without a word of it, and `snapshots/DIGEST/` has two files
that training reads, `NAME-DIGEST-train.jsonl` and `…-held.jsonl`: the same entries give the same
bytes. So nothing is half written, an entry is taken once however often it is sent, and what a run
has learnt from can be told line by line. Refuses entries of a damaged dataset.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dray.errors import SpecError, StoreError
from dray.feedback.entry import Entry, make_line
from dray.runs.layout import SERVING
from dray.spec.sections import RunName
from dray.storage.exclusive import create_exclusive
from dray.storage.filesystem import (
    absolute,
    child,
    delete_file,
    delete_folder,
    exists,
    list_files,
    list_folders,
    read_bytes,
    share_filesystem,
    write_bytes,
)

PREFIX = "feedback:"
"""Before a dataset's name, where data is named."""
AT_ONCE = 16
"""Files that are read at once."""
_FILE = re.compile(r"([0-9a-f]{16}-[0-9]{1,6})\.json")


@dataclass(frozen=True)
class Snapshot:
    """What training reads of a dataset."""

    digest: str
    train: str
    """The file to learn from, absolute or a URI."""
    held: str
    """The file that is kept out, to measure on; empty where nothing is."""
    train_ids: tuple[str, ...]
    """Of the entries, a line each."""
    held_ids: tuple[str, ...]
    num_unusable: int
    """Entries of which nobody said what would have been right."""


class Dataset:
    """One of them."""

    def __init__(self, storage: str, name: str) -> None:
        try:
            TypeAdapter(RunName).validate_python(name)
        except ValidationError:
            rule = "letters, digits, dots, - and _, at most 100"
            raise SpecError(f"feedback {name!r}", "is no name", rule) from None
        self.name = name
        self.place = child(absolute(storage), SERVING, "feedback", name)
        self._filesystem, self._folder = share_filesystem(self.place)

    @property
    def exists(self) -> bool:
        """Whether anything was ever said."""
        return bool(self._ids("entries") or self._ids("forgotten"))

    def add(self, entry: Entry) -> bool:
        """Keep an entry; false where there is or was one of its id. Raises StoreError."""
        if exists(self._filesystem, self._path("forgotten", entry.id)):
            return False
        content = entry.model_dump_json(exclude_none=True).encode()
        return create_exclusive(self._filesystem, self._path("entries", entry.id), content)

    def entries(self) -> list[Entry]:
        """All of them, the oldest first. Raises StoreError."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = list(pool.map(self._read, self._ids("entries")))
        return sorted(found, key=lambda entry: (entry.at, entry.id))

    def forget(self, ids: Sequence[str], reason: str) -> list[str]:
        """Delete entries, and the snapshots that hold them; that there was one, when and why it
        went is kept. Returns the snapshots' digests. Raises SpecError for one that is not there."""
        known = set(self._ids("entries"))
        if missing := [one for one in ids if one not in known]:
            raise SpecError(f"feedback {self.name!r}", f"has no entry {missing[0]}")
        for one in ids:
            told = json.dumps({"id": one, "at": time.time(), "reason": reason}).encode()
            write_bytes(self._filesystem, self._path("forgotten", one), told)
            delete_file(self._filesystem, self._path("entries", one))
        return self._delete_snapshots_of(ids)

    def replace(self, entries: Sequence[Entry]) -> list[str]:
        """Write entries anew, without what was found in them that should not be kept, and delete
        the snapshots that hold them as they were. Returns these digests."""
        for entry in entries:
            content = entry.model_dump_json(exclude_none=True).encode()
            write_bytes(self._filesystem, self._path("entries", entry.id), content)
        return self._delete_snapshots_of([entry.id for entry in entries])

    def _delete_snapshots_of(self, ids: Sequence[str]) -> list[str]:
        gone = [one.digest for one in self.snapshots() if {*ids} & {*one.train_ids, *one.held_ids}]
        for digest in gone:
            delete_folder(self._filesystem, f"{self._folder}/snapshots/{digest}")
        return gone

    def forgotten(self) -> list[dict[str, Any]]:
        """What is known of entries that are no more."""
        paths = (self._path("forgotten", one) for one in self._ids("forgotten"))
        return [dict(json.loads(read_bytes(self._filesystem, path))) for path in paths]

    # --- what training reads ---------------------------------------------------------------------

    def snapshot(self, held_share: float) -> Snapshot:
        """The entries that tell what is right as two files of records, by what was asked: the same
        question is in one of them. Raises SpecError where there is none to learn from."""
        entries = sorted(self.entries(), key=lambda entry: entry.id)
        sides: tuple[list[Entry], list[Entry]] = ([], [])
        lines: tuple[list[str], list[str]] = ([], [])
        for entry in entries:
            record = entry.record()
            if record is None:
                continue
            is_held = int(entry.digest[:8], 16) < held_share * 2**32
            sides[is_held].append(entry)
            lines[is_held].append(make_line(entry, record))
        if not sides[0]:
            raise SpecError(
                f"feedback {self.name!r}",
                f"{len(entries)} entries, none of which says what is right",
                "an entry is learnt from by its label, its text, or a thumb up",
                "gather more of it",
            )
        contents = ["".join(own).encode() for own in lines]
        digest = hashlib.sha256(b"\0".join(contents)).hexdigest()[:16]
        folder = f"{self._folder}/snapshots/{digest}"
        for side, content in zip(("train", "held"), contents, strict=True):
            path = f"{folder}/{self._file(digest, side)}"
            if content and not exists(self._filesystem, path):
                write_bytes(self._filesystem, path, content)
        place = child(self.place, "snapshots", digest)
        return Snapshot(
            digest,
            child(place, self._file(digest, "train")),
            child(place, self._file(digest, "held")) if sides[1] else "",
            tuple(entry.id for entry in sides[0]),
            tuple(entry.id for entry in sides[1]),
            num_unusable=len(entries) - len(sides[0]) - len(sides[1]),
        )

    def snapshots(self) -> Iterator[Snapshot]:
        """Those that were made."""
        for digest in sorted(list_folders(self._filesystem, f"{self._folder}/snapshots")):
            place = child(self.place, "snapshots", digest)
            train, held = (self._lines_of(digest, side) for side in ("train", "held"))
            files = [child(place, self._file(digest, side)) for side in ("train", "held")]
            yield Snapshot(digest, files[0], files[1] if held else "", train, held, 0)

    def _file(self, digest: str, side: str) -> str:
        """A name that no other source of a corpus has."""
        return f"{self.name}-{digest}-{side}.jsonl"

    def _lines_of(self, digest: str, side: str) -> tuple[str, ...]:
        """The entries of the lines of a snapshot's file."""
        path = f"{self._folder}/snapshots/{digest}/{self._file(digest, side)}"
        if not exists(self._filesystem, path):
            return ()
        lines = read_bytes(self._filesystem, path).decode().split("\n")
        return tuple(str(json.loads(line)["feedback"]) for line in lines if line)

    # --- files -----------------------------------------------------------------------------------

    def _ids(self, kind: str) -> list[str]:
        files = list_files(self._filesystem, f"{self._folder}/{kind}")
        return sorted(found[1] for name in files if (found := _FILE.fullmatch(name)))

    def _path(self, kind: str, id: str) -> str:
        return f"{self._folder}/{kind}/{id}.json"

    def _read(self, id: str) -> Entry:
        path = self._path("entries", id)
        try:
            return Entry.model_validate_json(read_bytes(self._filesystem, path))
        except ValueError as error:
            raise StoreError(
                path, "is no entry of feedback", "it is written by `dray serve`", "move it away"
            ) from error
