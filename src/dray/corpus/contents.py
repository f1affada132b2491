"""What input files hold: a digest each, which makes the identity of a corpus, and the check that
they hold still.

Neither path nor time of a file counts: what was copied, moved or touched is the same data. Refuses
files that change while they are read, and those that are not what they were when the inputs were
listed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from pyarrow import fs as pafs

from dray.corpus.sources import InputFile, current_stamp
from dray.errors import CorpusError, StorageFailed
from dray.storage.digests import digest_files
from dray.storage.retrying import retry

READ_BYTES = 1024 * 1024
REMOTE_AT_ONCE = 16


def with_digests(files: Sequence[InputFile]) -> list[InputFile]:
    """The files, each with what its content is known by. Raises CorpusError, and StorageFailed.

    Local files and those of storages that know no ETag are read, several at once; an object store's
    ETag and size stand for the content, which costs one request a file. The ETag of an upload in
    pieces depends on their size: a copy that was cut otherwise counts as other data.
    """
    try:
        local = digest_files([file.path for file in files if file.is_local], retry)
        with ThreadPoolExecutor(REMOTE_AT_ONCE) as pool:
            remote = iter(
                list(pool.map(_remote_digest, (file for file in files if not file.is_local)))
            )
    except StorageFailed:
        raise
    except OSError as error:
        raise CorpusError(
            str(error.filename or "data"),
            f"cannot be read ({error.strerror or error})",
            "inputs must be readable and hold still",
            "start again",
        ) from error
    return [
        replace(file, digest=local[file.path] if file.is_local else next(remote)) for file in files
    ]


def check_unchanged(files: Iterable[InputFile]) -> None:
    """Raises CorpusError for a file that does not hold what it held when the inputs were listed.
    One that was only touched, or replaced by its like, holds the same."""
    for file in files:
        try:
            same = current_stamp(file) == (file.num_bytes, file.stamp) or (
                bool(file.digest) and with_digests([file])[0].digest == file.digest
            )
        except FileNotFoundError:
            same = False
        if not same:
            raise changed_meanwhile(file.name)


def changed_meanwhile(name: str) -> CorpusError:
    """The refusal of a file that was written while the corpus was being prepared."""
    return CorpusError(
        name, "changed while the corpus was being prepared", "inputs must hold still", "start again"
    )


def _remote_digest(file: InputFile) -> str:
    def ask() -> str:
        with file.open().open_input_stream(file.path, compression=None) as stream:
            etag = (stream.metadata() or {}).get("ETag", b"").decode() or _known_etag(file)
            if etag:
                return f"etag {etag} {file.num_bytes}"
            found = hashlib.sha256()
            while data := stream.read(READ_BYTES):
                found.update(data)
            return found.hexdigest()

    return retry(ask, file.name)


def _known_etag(file: InputFile) -> str:
    """The ETag that an fsspec filesystem knows; empty where there is none."""
    handler = getattr(file.open(), "handler", None)
    if not isinstance(handler, pafs.FSSpecHandler):
        return ""
    details: dict[str, Any] = handler.fs.info(file.path)
    return str(details.get("ETag") or details.get("etag") or "")
