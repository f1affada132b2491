"""One way to reach any storage: local disk, S3, GCS and HDFS by pyarrow, every other scheme by
fsspec.

Files are written whole: on a local disk through a synced temporary file and a rename, on object
stores by one put. Every operation waits for a storage that fails for the moment (`retrying`).
Refuses: an unknown scheme, a place that is a file or cannot be written.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from threading import Lock
from typing import Any, TypeVar, cast
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

from dray.errors import StoreError
from dray.redaction import restored, take_in
from dray.storage.retrying import first_safe_line, patience, retry

ARROW_SCHEMES = ("s3", "gs", "gcs", "hdfs", "viewfs")
TEMPORARY = ".tmp-"
SDK_ATTEMPTS = 5
"""How often the S3 library tries a request itself, within some seconds; GCS_SECONDS is the same for
Google's."""
GCS_SECONDS = 15
PROBE_SECONDS = 10.0
"""How long a first look at a storage place waits: a mistyped address is likelier there than an
outage."""

T = TypeVar("T")


def is_uri(place: str | os.PathLike[str]) -> bool:
    """Whether the place has a scheme (`s3://…`), rather than being a local path."""
    scheme, separator, _ = os.fspath(place).partition("://")
    return bool(separator) and scheme.replace("+", "").replace("-", "").isalnum()


def absolute(place: str | os.PathLike[str]) -> str:
    """The place as an absolute local path or a URI: it means the same in every process of the
    machine.

    A URI's credentials are split off here and stay in memory (`redaction.take_in`): what comes back
    may be kept.
    """
    text = take_in(os.fspath(place))
    try:
        path = urlsplit(text).path
    except ValueError as error:
        raise StoreError(
            text.partition("?")[0], f"is no URI ({error})", "storage is a path or a URI"
        ) from error
    if text.startswith("file://"):
        text = path
    return text if is_uri(text) else os.path.abspath(os.path.expanduser(text))


def child(place: str | os.PathLike[str], *names: str) -> str:
    """The place below `place`, as an absolute path or URI; a URI's query (`?endpoint_override=…`)
    stays at its end."""
    text = absolute(place)
    if not is_uri(text):
        return os.path.join(text, *names)
    parts = urlsplit(text)
    path = "/".join((parts.path.rstrip("/"), *names))
    # Joined by hand: urlunsplit drops the slashes of an empty authority (hdfs:///data).
    return f"{parts.scheme}://{parts.netloc}{path}" + (f"?{parts.query}" if parts.query else "")


def parent(place: str | os.PathLike[str]) -> str:
    """The folder that a place is in, as `child` gives places."""
    text = absolute(place)
    if not is_uri(text):
        return os.path.dirname(text)
    whole, mark, query = text.partition("?")
    return f"{whole.rstrip('/').rpartition('/')[0]}{mark}{query}"


def open_filesystem(uri: str | os.PathLike[str]) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path or URI, and the path inside it (absolute, no trailing slash).

    Nothing is read or written there. Raises StoreError for an unknown scheme, or one whose library
    is missing.
    """
    place = absolute(uri)
    if not is_uri(place):
        return pafs.LocalFileSystem(), place
    scheme = place.partition("://")[0]
    try:
        if scheme in ARROW_SCHEMES:
            filesystem, path = _open_arrow(restored(place))
            if not path:
                raise ValueError("it names no bucket")
        else:
            filesystem, path = _open_fsspec(restored(place))
    except (pa.ArrowException, OSError, ValueError, ImportError) as error:
        raise StoreError(
            shown(place),
            f"cannot be opened ({first_safe_line(error)})",
            "storage is a path or a URI (s3://, gs://, hdfs://, or a scheme known to fsspec)",
            "check the scheme, its query and that its library is installed",
        ) from error
    return filesystem, path.rstrip("/") or path


def share_filesystem(uri: str | os.PathLike[str]) -> tuple[pafs.FileSystem, str]:
    """As `open_filesystem`, but opened once a process: an object store's connections are used
    again."""
    return _share(restored(absolute(uri)))  # other credentials are another client


@lru_cache(maxsize=64)
def _share(place: str) -> tuple[pafs.FileSystem, str]:
    return open_filesystem(place)


def _open_arrow(place: str) -> tuple[pafs.FileSystem, str]:
    """By pyarrow, with its own retries cut short: left alone, Google's library goes on for a
    quarter of an hour."""
    parts = urlsplit(place)
    if parts.scheme in ("gs", "gcs") and "retry_limit_seconds" not in dict(parse_qsl(parts.query)):
        place += f"{'&' if parts.query else '?'}retry_limit_seconds={GCS_SECONDS}"
    filesystem, path = pafs.FileSystem.from_uri(place)
    if isinstance(filesystem, pafs.S3FileSystem):
        # Rebuilt, since a URI says nothing of retries; and a small file opened late is one request
        # instead of three.
        options = filesystem.__reduce__()[1][0] | {"allow_delayed_open": True}
        strategy = pafs.AwsStandardS3RetryStrategy(max_attempts=SDK_ATTEMPTS)
        filesystem = pafs.S3FileSystem(**options, retry_strategy=strategy)
    return filesystem, cast(str, path)


def _open_fsspec(place: str) -> tuple[pafs.FileSystem, str]:
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(place)
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), cast(str, path)


def shown(place: str | os.PathLike[str]) -> str:
    """The place without user, password and query, fit for messages and records."""
    text = os.fspath(place)
    if not is_uri(text):
        return text
    parts = urlsplit(text)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def is_local(filesystem: pafs.FileSystem) -> bool:
    """Whether the files lie on a disk of this machine (or mounted there), with rename, links and
    fsync."""
    return isinstance(filesystem, pafs.LocalFileSystem)


def is_object_store(filesystem: pafs.FileSystem) -> bool:
    """Whether it is S3 or GCS: no folders, and a file is there as a whole or not at all."""
    return isinstance(filesystem, (pafs.S3FileSystem, pafs.GcsFileSystem))


def exists(filesystem: pafs.FileSystem, path: str) -> bool:
    """Whether there is a file or folder at the path."""
    return bool(_info(filesystem, path).type != pafs.FileType.NotFound)


def is_file(filesystem: pafs.FileSystem, path: str) -> bool:
    """Whether there is a file at the path."""
    return bool(_info(filesystem, path).type == pafs.FileType.File)


def modified(filesystem: pafs.FileSystem, path: str) -> float | None:
    """When a file was last written, in seconds by the storage's clock; none if it is missing or
    nothing is known."""
    nanoseconds = _info(filesystem, path).mtime_ns
    return None if nanoseconds is None else nanoseconds / 1e9


def _info(filesystem: pafs.FileSystem, path: str) -> Any:
    return retry(lambda: filesystem.get_file_info(path), path)


def read_bytes(filesystem: pafs.FileSystem, path: str) -> bytes:
    """The whole file. Raises FileNotFoundError, and StorageFailed."""

    def read() -> bytes:
        with filesystem.open_input_file(path) as stream:
            return cast(bytes, stream.read())

    return retry(read, path)


class RangeReader:
    """A file opened for reading ranges, from any number of threads. After a failure it is opened
    anew: the handle of a network mount that went stale never recovers."""

    def __init__(self, filesystem: pafs.FileSystem, path: str) -> None:
        self._filesystem, self.path = filesystem, path
        self._stream: Any = None
        self._lock = Lock()

    def read_at(self, num_bytes: int, offset: int) -> bytes:
        """Up to `num_bytes` bytes; fewer only at the file's end. Raises FileNotFoundError, and
        StorageFailed."""

        def read() -> bytes:
            with self._lock:
                stream = self._stream = self._stream or self._filesystem.open_input_file(self.path)
            try:
                return cast(bytes, stream.read_at(num_bytes, offset))
            except OSError:
                with self._lock:
                    self._stream = None if self._stream is stream else self._stream
                raise

        return retry(read, self.path)

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        with self._lock:
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()


def list_files(filesystem: pafs.FileSystem, folder: str) -> dict[str, int]:
    """File name → size in bytes of the files directly in a folder; none where there is no
    folder."""
    return {
        item.base_name: item.size
        for item in _entries(filesystem, folder)
        if item.type == pafs.FileType.File
    }


def list_stamps(filesystem: pafs.FileSystem, folder: str) -> dict[str, tuple[int, int | None]]:
    """File name → size and time of writing in nanoseconds, by the storage's clock; none where it
    keeps no times."""
    return {
        item.base_name: (item.size, item.mtime_ns)
        for item in _entries(filesystem, folder)
        if item.type == pafs.FileType.File
    }


def list_folders(filesystem: pafs.FileSystem, folder: str) -> list[str]:
    """Sorted names of the folders directly in a folder; none where there is no folder."""
    return sorted(
        item.base_name
        for item in _entries(filesystem, folder)
        if item.type == pafs.FileType.Directory
    )


def _entries(filesystem: pafs.FileSystem, folder: str) -> list[Any]:
    selector = pafs.FileSelector(folder, allow_not_found=True)
    try:
        return cast("list[Any]", retry(lambda: filesystem.get_file_info(selector), folder))
    except FileNotFoundError:  # Arrow looks twice, and it was made in between
        return []


def make_folder(filesystem: pafs.FileSystem, path: str) -> None:
    """Create a folder and its parents, synced. Object stores have no folders, and nothing is
    written there."""
    if is_local(filesystem):
        retry(lambda: _make_local_folder(path), path)
    elif not is_object_store(filesystem):
        retry(lambda: filesystem.create_dir(path, recursive=True), path)


def _make_local_folder(path: str) -> None:
    if not os.path.isdir(path):
        parent = os.path.dirname(path)
        _make_local_folder(parent)
        with suppress(FileExistsError):
            os.mkdir(path)
        sync(parent)


def delete_folder(filesystem: pafs.FileSystem, path: str) -> None:
    """Delete a folder and all in it; none there is no error."""
    with suppress(FileNotFoundError):
        retry(lambda: filesystem.delete_dir(path), path)


def delete_file(filesystem: pafs.FileSystem, path: str) -> None:
    """Delete a file; none there is no error."""
    with suppress(FileNotFoundError):
        retry(lambda: filesystem.delete_file(path), path)


def sync(path: str) -> None:
    """Make a local file's content, or the names in a local folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def open_whole(filesystem: pafs.FileSystem, path: str, durable: bool = True) -> Iterator[Any]:
    """A stream to a file that appears under its name only when all of it is there, and synced if
    `durable`.

    The folder must exist. After an exception inside, nothing is left under the name (on an object
    store it may show up shortly before it is deleted: commit protocols there rest on a marker
    written last). One try: what the block has written is gone after a failure, so only
    `write_whole`, which can call its producer again, waits for the storage.
    """
    target = path
    if is_local(filesystem):
        folder, name = os.path.split(path)
        target = os.path.join(folder, f"{TEMPORARY}{name}-{uuid.uuid4().hex[:12]}")
    stream = filesystem.open_output_stream(target)
    whole = False

    def discard() -> None:
        with suppress(OSError):
            stream.close()
        # A put that failed at its end put nothing: what is deleted then would be the file that was
        # there before.
        if not (whole and is_object_store(filesystem)):
            with suppress(OSError):
                filesystem.delete_file(target)

    with ExitStack() as on_failure:
        on_failure.callback(discard)
        yield stream
        whole = True
        stream.close()
        if is_local(filesystem):
            if durable:
                sync(target)
            os.rename(target, path)
            if durable:
                sync(os.path.dirname(path))
        on_failure.pop_all()


def write_whole(
    filesystem: pafs.FileSystem, path: str, produce: Callable[[Any], T], durable: bool = True
) -> T:
    """Write a file as `open_whole` does with what `produce` writes into a stream; what `produce`
    returned.

    The folder must exist. While the storage fails `produce` is called again, each time with a new
    stream: it must be able to start over, and give the same bytes. Raises StorageFailed.
    """

    def write() -> T:
        with open_whole(filesystem, path, durable) as stream:
            return produce(stream)

    return retry(write, path)


def write_bytes(
    filesystem: pafs.FileSystem, path: str, content: bytes, durable: bool = True
) -> None:
    """Write a small file whole, replacing what is there; makes its folder. Raises StorageFailed."""
    make_folder(filesystem, path.rpartition("/")[0])
    write_whole(filesystem, path, lambda stream: stream.write(content), durable)


def append_line(
    path: str, content: bytes, limit: int | None = None, *, create: bool = True
) -> bool:
    """Append whole lines to a local file, first cutting off a line that a killed writer left torn.

    Returns False, with nothing done, if the file has `limit` bytes already, or is not there and
    need not be created.
    """
    return retry(lambda: _append_line(path, content, limit, create=create), path)


def _append_line(path: str, content: bytes, limit: int | None, *, create: bool) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | (os.O_CREAT if create else 0), 0o666)
    except FileNotFoundError:
        if create:
            raise
        return False
    with open(
        descriptor, "ab+", buffering=0
    ) as stream:  # a buffer would be written again when the file is closed
        fcntl.flock(stream, fcntl.LOCK_EX)
        size = stream.seek(0, os.SEEK_END)
        if (limit is not None and size >= limit) or not os.fstat(descriptor).st_nlink:
            return False  # full, or deleted since it was opened
        if size:
            stream.seek(size - 1)
            if stream.read(1) != b"\n":
                size = _end_of_last_line(stream, size)
                stream.truncate(size)
        try:
            left = memoryview(content)
            while left:
                left = left[stream.write(left) :]
        except OSError:
            with suppress(OSError):  # no half of the lines may stay beside the whole of them
                stream.truncate(size)
            raise
    return True


def require_writable(filesystem: pafs.FileSystem, path: str, place: str) -> None:
    """Raise StoreError unless files can be written below the path. Leaves nothing behind, not even
    the folder."""
    rule = "the storage is a folder that dray can write to"
    try:
        if is_local(filesystem):
            _require_writable_folder(path)
            return
        with patience(PROBE_SECONDS):
            if is_file(filesystem, path):
                raise NotADirectoryError("it is a file")
            probe = f"{path}/{TEMPORARY}probe-{uuid.uuid4().hex[:12]}"
            write_whole(filesystem, probe, lambda stream: stream.write(b"dray"))
            delete_file(filesystem, probe)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(
            shown(place),
            f"cannot be written ({first_safe_line(error)})",
            rule,
            "give another place with --storage, or mend its permissions",
        ) from error


def _require_writable_folder(path: str) -> None:
    """Raises OSError. Only the nearest folder that exists is written to."""
    folder = path
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise NotADirectoryError(f"{folder} is a file" if folder != path else "it is a file")
    probe = os.path.join(folder, f"{TEMPORARY}probe-{uuid.uuid4().hex[:12]}")
    os.mkdir(probe)
    os.rmdir(probe)


def _end_of_last_line(stream: Any, size: int, block: int = 65536) -> int:
    """Offset behind the last newline before `size`; 0 if there is none."""
    end = size
    while end:
        start = max(0, end - block)
        stream.seek(start)
        position = stream.read(end - start).rfind(b"\n")
        if position >= 0:
            return int(start + position + 1)
        end = start
    return 0
