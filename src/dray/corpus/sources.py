"""From the sources of a spec to a list of input files: globs, folders, URIs, the standard library's own sources.

The order of the files is that of the spec's paths, then by name: it decides which of equal documents is kept. Refuses
paths that do not exist, patterns that match nothing and files whose form cannot be told.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import cast
from urllib.parse import urlsplit

from pyarrow import fs as pafs

from dray.errors import CorpusError
from dray.spec import Source
from dray.store.filesystem import absolute, is_uri, open_filesystem, shown
from dray.store.retrying import retry

STDLIB = "python:stdlib"
TEXT_SUFFIXES = (
    "txt text md rst tex html htm xml py pyi c h cc cpp cxx hpp rs go java js jsx ts tsx rb php pl sh sql r jl scala "
    "kt swift cs lua hs ml el clj f90 m cu proto yaml yml toml ini cfg"
)
FORMS = {
    "jsonl": "jsonl", "ndjson": "jsonl", "json": "jsonl", "csv": "csv", "tsv": "tsv", "parquet": "parquet",
    **dict.fromkeys(TEXT_SUFFIXES.split(), "text"),
}
"""Suffix → form of the file."""
COMPRESSIONS = {"gz": "gzip", "gzip": "gzip", "zst": "zstd", "zstd": "zstd"}
EXPANSION = {"": 1, "gzip": 4, "zstd": 4}
"""Rough size of the content against the size of the file; it only balances the parts."""
SKIPPED_NAMES = {"__pycache__", "_SUCCESS", "_metadata", "_common_metadata"}


@dataclass(frozen=True)
class InputFile:
    """One file to read: `path` inside the filesystem of `place`."""

    place: str
    path: str
    num_bytes: int
    stamp: str
    """Changes when the file does: its time of modification in nanoseconds, or its ETag."""
    form: str
    compression: str
    digest: str = ""
    """What its content is known by (`contents.py`), wherever it lies and whenever it was written; empty: not asked."""

    @property
    def sha256(self) -> str:
        """The digest, if it is the SHA-256 of the file as it lies on storage; else empty."""
        return self.digest if len(self.digest) == 64 else ""

    @property
    def is_local(self) -> bool:
        return not is_uri(self.place)

    @property
    def name(self) -> str:
        """The path for messages and records, without credentials."""
        scheme = urlsplit(self.place).scheme if is_uri(self.place) else ""
        return f"{scheme}://{self.path}" if scheme else self.path

    @property
    def estimated_bytes(self) -> int:
        """Rough size of its content."""
        return self.num_bytes * EXPANSION[self.compression]

    def open(self) -> pafs.FileSystem:
        return cached_filesystem(self.place)


@lru_cache(maxsize=64)
def cached_filesystem(place: str) -> pafs.FileSystem:
    """The filesystem of a place, opened once a process."""
    return open_filesystem(place)[0]


def find_files(source: Source, where: str) -> list[InputFile]:
    """The files of a source in reading order; a file that several paths name is read once. Raises CorpusError.

    `where` is the dotted path of the source in the spec, for messages.
    """
    found: dict[tuple[str, str], InputFile] = {}
    for path in source.paths:
        files = _find_stdlib() if path == STDLIB else _find(path, source, where)
        matched = False
        for file in files:
            matched = True
            found.setdefault((file.place if is_uri(file.place) else "", file.path), file)
        if not matched:
            raise CorpusError(f"{where}.path", f"no matching file in {shown(path)}", _rule(source), "check the path")
    return list(found.values())


def _rule(source: Source) -> str:
    if source.format == "auto":
        return "suffixes tell the form (jsonl, csv, tsv, parquet, txt, py, …, then .gz or .zst), or `format` does"
    return "hidden files and those that `exclude` names are left out"


def _find(path: str, source: Source, where: str) -> Iterator[InputFile]:
    base, pattern = _split_glob(path)
    filesystem, root = open_filesystem(base)
    info = filesystem.get_file_info(root)
    if info.type == pafs.FileType.NotFound:
        raise CorpusError(f"{where}.path", f"{shown(absolute(path))} does not exist",
                          "a path, glob or URI of the corpus", "relative paths start at the working directory")
    if info.type == pafs.FileType.File:
        form, compression = _form(root, source)
        if not form:
            raise CorpusError(f"{where}.path", f"cannot tell the form of {shown(path)}", _rule(source),
                              f"set {where}.format")
        yield _input_file(filesystem, base, info, form, compression)
        return
    matches = re.compile(translate_glob(pattern)).fullmatch if pattern else None
    excluded = [re.compile(translate_glob(glob)) for glob in source.exclude]
    selector = pafs.FileSelector(root, recursive=pattern is None or "/" in pattern or "**" in pattern)
    for item in sorted(filesystem.get_file_info(selector), key=lambda item: str(item.path)):
        relative = item.path[len(root):].lstrip("/")
        if item.type != pafs.FileType.File or (matches and not matches(relative)) or _hidden(relative):
            continue
        if any(glob.fullmatch(name) for glob in excluded for name in (relative, item.base_name, item.path)):
            continue
        form, compression = _form(item.path, source)
        if form:
            yield _input_file(filesystem, base, item, form, compression)


def _find_stdlib() -> Iterator[InputFile]:
    """The standard library's *.py files, without site-packages: real text on every machine."""
    root = sysconfig.get_paths()["stdlib"]
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - {"site-packages", "dist-packages", "__pycache__"})
        for name in sorted(name for name in names if name.endswith(".py")):
            path = os.path.join(folder, name)
            status = os.stat(path)
            yield InputFile(root, path, status.st_size, str(status.st_mtime_ns), "text", "")


def _input_file(filesystem: pafs.FileSystem, base: str, info: pafs.FileInfo, form: str, compression: str) -> InputFile:
    stamp = str(info.mtime_ns) if info.mtime_ns is not None else _etag(filesystem, info.path)
    return InputFile(base, cast(str, info.path), int(info.size or 0), stamp, form, compression)


def _etag(filesystem: pafs.FileSystem, path: str) -> str:
    """What an fsspec filesystem knows of a file's version."""
    handler = getattr(filesystem, "handler", None)
    if not isinstance(handler, pafs.FSSpecHandler):
        return ""
    details = handler.fs.info(path)
    known = (details.get(key) for key in ("ETag", "etag", "LastModified", "mtime", "created"))
    return str(next((value for value in known if value), ""))


def current_stamp(file: InputFile) -> tuple[int, str]:
    """Size and stamp of the file as it is now. Raises FileNotFoundError."""
    filesystem = file.open()
    info = retry(lambda: filesystem.get_file_info(file.path), file.name)
    if info.type == pafs.FileType.NotFound:
        raise FileNotFoundError(file.path)
    now = _input_file(filesystem, file.place, info, file.form, file.compression)
    return now.num_bytes, now.stamp


def _form(path: str, source: Source) -> tuple[str, str]:
    """Form and compression of a file by its suffixes; an empty form is unknown."""
    parts = path.rpartition("/")[2].lower().split(".")
    compression = COMPRESSIONS.get(parts[-1], "") if len(parts) > 1 else ""
    if compression:
        parts.pop()
    form = source.format if source.format != "auto" else FORMS.get(parts[-1], "") if len(parts) > 1 else ""
    return form, compression


def suffix_form(path: str) -> str:
    """The form that the suffixes of a path, glob or URI tell; empty if they tell none."""
    return _form(path.partition("?")[0] if is_uri(path) else path, Source(path=path))[0]


def _hidden(relative: str) -> bool:
    return any(part.startswith(".") or part in SKIPPED_NAMES for part in relative.split("/"))


def _split_glob(path: str) -> tuple[str, str | None]:
    """A place without magic, and the pattern below it. In a URI `?` begins the query; elsewhere it is a wildcard."""
    place = absolute(path)
    if not is_uri(place):
        return (place, None) if os.path.lexists(place) else _cut(place, "*?[")
    parts = urlsplit(place)
    base, pattern = _cut(parts.path, "*[")
    # Not urlunsplit: it drops the slashes of `hdfs:///path`.
    return f"{parts.scheme}://{parts.netloc}{base}" + (f"?{parts.query}" if parts.query else ""), pattern


def _cut(path: str, magic: str) -> tuple[str, str | None]:
    names = path.split("/")
    for index, name in enumerate(names):
        if any(character in name for character in magic):
            return "/".join(names[:index]) or "/", "/".join(names[index:])
    return path, None


def translate_glob(pattern: str) -> str:
    """A glob as a regular expression: `*` and `?` stay within a name, `**` crosses folders, `[…]` is a set."""
    out, index = "", 0
    while index < len(pattern):
        if pattern.startswith("**/", index):
            out, index = out + "(?:.*/)?", index + 3
        elif pattern.startswith("**", index):
            out, index = out + ".*", index + 2
        elif pattern[index] in "*?":
            out, index = out + ("[^/]*" if pattern[index] == "*" else "[^/]"), index + 1
        elif pattern[index] == "[" and "]" in pattern[index + 2:]:
            end = pattern.index("]", index + 2)
            body = pattern[index + 1:end].replace("\\", "\\\\")
            out, index = out + "[" + ("^" + body[1:] if body[0] == "!" else body) + "]", end + 1
        else:
            out, index = out + re.escape(pattern[index]), index + 1
    return out
