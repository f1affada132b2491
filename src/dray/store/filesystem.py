"""One way to reach any storage: local disk, S3, GCS and HDFS by pyarrow, every other scheme by fsspec.

Files are written whole: on a local disk through a synced temporary file and a rename, on object stores by one put.
Refuses: an unknown scheme, a place that is a file or cannot be written.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

from dray.errors import StoreError

ARROW_SCHEMES = ("s3", "gs", "gcs", "hdfs", "viewfs")
TEMPORARY = ".tmp-"
SETTLE_SECONDS = 0.5


def is_uri(place: str | os.PathLike[str]) -> bool:
    """Whether the place has a scheme (`s3://…`), rather than being a local path."""
    scheme, separator, _ = os.fspath(place).partition("://")
    return bool(separator) and scheme.replace("+", "").replace("-", "").isalnum()


def absolute(place: str | os.PathLike[str]) -> str:
    """The place as an absolute local path or an unchanged URI: it means the same in every process of the machine."""
    text = os.fspath(place)
    if text.startswith("file://"):
        text = urlsplit(text).path
    return text if is_uri(text) else os.path.abspath(os.path.expanduser(text))


def child(place: str | os.PathLike[str], *names: str) -> str:
    """The place below `place`, as an absolute path or URI; a URI's query (`?endpoint_override=…`) stays at its end."""
    text = absolute(place)
    if not is_uri(text):
        return os.path.join(text, *names)
    parts = urlsplit(text)
    path = "/".join((parts.path.rstrip("/"), *names))
    # Joined by hand: urlunsplit drops the slashes of an empty authority (hdfs:///data).
    return f"{parts.scheme}://{parts.netloc}{path}" + (f"?{parts.query}" if parts.query else "")


def open_filesystem(uri: str | os.PathLike[str]) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path or URI, and the path inside it (absolute, no trailing slash).

    Nothing is read or written there. Raises StoreError for an unknown scheme, or one whose library is missing.
    """
    place = absolute(uri)
    if not is_uri(place):
        return pafs.LocalFileSystem(), place
    scheme = place.partition("://")[0]
    try:
        if scheme in ARROW_SCHEMES:
            filesystem, path = pafs.FileSystem.from_uri(place)
            if not path:
                raise ValueError("it names no bucket")
        else:
            filesystem, path = _open_fsspec(place)
    except (pa.ArrowException, OSError, ValueError, ImportError) as error:
        raise StoreError(shown(place), f"cannot be opened ({first_line(error)})",
                         "storage is a path or a URI (s3://, gs://, hdfs://, or a scheme known to fsspec)",
                         "check the scheme, its query and that its library is installed") from error
    return filesystem, path.rstrip("/") or path


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
    """Whether the files lie on a disk of this machine (or mounted there), with rename, links and fsync."""
    return isinstance(filesystem, pafs.LocalFileSystem)


def exists(filesystem: pafs.FileSystem, path: str) -> bool:
    """Whether there is a file or folder at the path."""
    return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def read_bytes(filesystem: pafs.FileSystem, path: str) -> bytes:
    """The whole file. Raises FileNotFoundError or another OSError."""
    with filesystem.open_input_file(path) as stream:
        return cast(bytes, stream.read())


def list_files(filesystem: pafs.FileSystem, folder: str) -> dict[str, int]:
    """File name → size in bytes of the files directly in a folder; none where there is no folder."""
    found = filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    return {item.base_name: item.size for item in found if item.type == pafs.FileType.File}


def list_folders(filesystem: pafs.FileSystem, folder: str) -> list[str]:
    """Sorted names of the folders directly in a folder; none where there is no folder."""
    found = filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    return sorted(item.base_name for item in found if item.type == pafs.FileType.Directory)


def make_folder(filesystem: pafs.FileSystem, path: str) -> None:
    """Create a folder and its parents, synced. Object stores have no folders, and nothing is written there."""
    if not is_local(filesystem):
        if not isinstance(filesystem, (pafs.S3FileSystem, pafs.GcsFileSystem)):
            filesystem.create_dir(path, recursive=True)
    elif not os.path.isdir(path):
        parent = os.path.dirname(path)
        make_folder(filesystem, parent)
        with suppress(FileExistsError):
            os.mkdir(path)
        sync(parent)


def delete_folder(filesystem: pafs.FileSystem, path: str) -> None:
    """Delete a folder and all in it; none there is no error."""
    with suppress(FileNotFoundError):
        filesystem.delete_dir(path)


def sync(path: str) -> None:
    """Make a local file's content, or the names in a local folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def open_whole(filesystem: pafs.FileSystem, path: str, durable: bool = True) -> Iterator[Any]:
    """A stream to a file that appears under its name only when all of it is there, and synced if `durable`.

    The folder must exist. After an exception inside, nothing is left under the name (on an object store it may show up
    shortly before it is deleted: commit protocols there rest on a marker written last).
    """
    target = path
    if is_local(filesystem):
        folder, name = os.path.split(path)
        target = os.path.join(folder, f"{TEMPORARY}{name}-{uuid.uuid4().hex[:12]}")
    stream = filesystem.open_output_stream(target)
    try:
        yield stream
        stream.close()
        if is_local(filesystem):
            if durable:
                sync(target)
            os.rename(target, path)
            if durable:
                sync(os.path.dirname(path))
    except BaseException:
        with suppress(OSError):
            stream.close()
        with suppress(OSError):
            filesystem.delete_file(target)
        raise


def write_bytes(filesystem: pafs.FileSystem, path: str, content: bytes, durable: bool = True) -> None:
    """Write a small file whole, replacing what is there; makes its folder."""
    make_folder(filesystem, path.rpartition("/")[0])
    with open_whole(filesystem, path, durable) as stream:
        stream.write(content)


def create_exclusive(filesystem: pafs.FileSystem, path: str, content: bytes) -> bool:
    """Create a small file unless it exists; whether this call created it. The content must be unlike any other's.

    On a local disk exactly one of any number of processes succeeds. On other stores, which pyarrow gives no conditional
    put for, the last of the simultaneous writers wins: all look again after a pause.
    """
    make_folder(filesystem, path.rpartition("/")[0])
    if is_local(filesystem):
        return _link_exclusive(path, content)
    if exists(filesystem, path):
        return False
    with open_whole(filesystem, path) as stream:
        stream.write(content)
    time.sleep(SETTLE_SECONDS)
    return read_bytes(filesystem, path) == content


def append_line(path: str, content: bytes) -> None:
    """Append whole lines to a local file, first cutting off a line that a killed writer left torn."""
    with open(path, "ab+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        size = stream.seek(0, os.SEEK_END)
        if size:
            stream.seek(size - 1)
            if stream.read(1) != b"\n":
                stream.truncate(_end_of_last_line(stream, size))
        stream.write(content)
        stream.flush()


def require_writable(filesystem: pafs.FileSystem, path: str, place: str) -> None:
    """Raise StoreError unless files can be written below the path. Leaves nothing behind, not even the folder."""
    rule = "the storage is a folder that dray can write to"
    try:
        if is_local(filesystem):
            _require_writable_folder(path)
            return
        if filesystem.get_file_info(path).type == pafs.FileType.File:
            raise NotADirectoryError("it is a file")
        probe = f"{path}/{TEMPORARY}probe-{uuid.uuid4().hex[:12]}"
        with open_whole(filesystem, probe) as stream:
            stream.write(b"dray")
        filesystem.delete_file(probe)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(shown(place), f"cannot be written ({first_line(error)})", rule,
                         "give another place with --storage, or mend its permissions") from error


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


def _link_exclusive(path: str, content: bytes) -> bool:
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f"{TEMPORARY}{name}-{uuid.uuid4().hex[:12]}")
    with open(temporary, "xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    try:
        os.link(temporary, path)  # unlike a rename, a link never replaces
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)
    sync(folder)
    return True


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


def first_line(error: BaseException) -> str:
    """The beginning of an error's message, fit to stand inside another one."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
