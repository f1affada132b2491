"""Digests of local files: right, remembered only while that is safe, and refused for files that
change."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from dray.storage import digests
from dray.storage.digests import FileChanges, digest_files, recall_digests


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, content: bytes, age_seconds: float = 3600) -> str:
    """A file whose times are old: `os.utime` cannot set the inode's, so tests that remember set
    SETTLED_SECONDS."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (os.stat(path).st_atime, os.stat(path).st_mtime - age_seconds))
    return str(path)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    read: list[str] = []
    real = digests._digest
    monkeypatch.setattr(digests, "_digest", lambda path: read.append(path) or real(path))
    return read


def test_digests_are_those_of_the_content(tmp_path: Path) -> None:
    contents = [b"", b"x", os.urandom(3 * digests.HASHED_BYTES + 5)]
    paths = [
        write(tmp_path / "in" / str(number), content) for number, content in enumerate(contents)
    ]
    assert digest_files(paths) == {
        path: hashlib.sha256(content).hexdigest()
        for path, content in zip(paths, contents, strict=True)
    }
    with pytest.raises(FileNotFoundError):
        digest_files([*paths, str(tmp_path / "none")])


def test_a_file_is_read_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1.0)
    read = count_reads(monkeypatch)
    path = write(tmp_path / "in/a", b"first")
    first = digest_files([path])
    assert digest_files([path]) == first
    assert recall_digests([path]) == first
    assert read == [path]
    # The same size and time of modification again: the inode's own time tells.
    times = os.stat(path)
    Path(path).write_bytes(b"other")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert recall_digests([path]) == {}
    assert recall_digests([path], max_bytes=4) == {}
    assert digest_files([path]) != first
    assert read == [path, path]


def test_a_fresh_file_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = count_reads(monkeypatch)
    path = write(tmp_path / "in/a", b"x", age_seconds=0)
    digest_files([path])
    assert digest_files([path]) == recall_digests([path], max_bytes=1)
    assert len(read) == 3


def test_a_cache_that_is_broken_or_cannot_be_written_is_no_failure(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1.0)
    path = write(tmp_path / "in/a", b"x")
    expected = digest_files([path])
    for file in (cache / "dray/digests").iterdir():
        file.write_text("{")
    assert digest_files([path]) == expected
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert digest_files([path]) == expected


def test_a_file_that_is_written_meanwhile_has_no_digest(tmp_path: Path) -> None:
    path = tmp_path / "growing"
    path.write_bytes(b"x" * (64 << 20))  # enough for the writer to have its turn meanwhile
    begun, ended = threading.Event(), threading.Event()

    def grow() -> None:
        with path.open("ab", buffering=0) as stream:
            while not ended.is_set():
                stream.write(b"y")
                begun.set()

    writer = threading.Thread(target=grow)
    writer.start()
    begun.wait()
    try:
        with pytest.raises(FileChanges, match="growing changes while it is read"):
            digest_files([str(path)])
    finally:
        ended.set()
        writer.join()
