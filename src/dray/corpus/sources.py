"""From the sources of a spec to a list of input files: globs, folders, URIs, the standard library's
own sources.

The order of the files is that of the spec's paths, then by name: it decides which of equal
documents is kept. Refuses paths that do not exist, patterns that match nothing and files whose form
cannot be told.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

from pyarrow import fs as pafs

from dray.corpus.idx import path_of_labels
from dray.corpus.listing import HIDDEN, Entry, Leavings, drop_second_links, is_hidden, list_entries
from dray.corpus.manifest import LeftOut
from dray.errors import CorpusError
from dray.spec import Source
from dray.storage.filesystem import absolute, is_uri, open_filesystem, share_filesystem, shown
from dray.storage.retrying import retry

STDLIB = "python:stdlib"
TEXT_SUFFIXES = (
    "txt text md rst tex html htm xml py pyi c h cc cpp cxx hpp rs go java js jsx ts tsx rb php "
    "pl sh sql r jl scala kt swift cs lua hs ml el clj f90 m cu proto yaml yml toml ini cfg"
)
FORMS = {
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "jsonl",
    "csv": "csv",
    "tsv": "tsv",
    "parquet": "parquet",
    "warc": "warc",
    **dict.fromkeys(("conll", "conllu", "bio", "iob", "iob2", "iobes"), "conll"),
    **dict.fromkeys(TEXT_SUFFIXES.split(), "text"),
}
"""Suffix → form of the file."""
COMPRESSIONS = {
    "gz": "gzip",
    "gzip": "gzip",
    "zst": "zstd",
    "zstd": "zstd",
    "bz2": "bzip2",
    "xz": "xz",
    "zip": "zip",
}
EXPANSION = {"": 1, "gzip": 4, "zstd": 4, "bzip2": 5, "xz": 5, "zip": 4}
"""Rough size of the content against the size of the file; it only balances the parts."""
DOCUMENTATION = re.compile(
    r"(readme|licen[cs]e|copying|copyright|notice|changelog|changes|citation|authors|contribut(ing|ors)|"
    r"code_of_conduct|security|source|dataset_card|requirements)s?([._-].*)?$"
)
METADATA = re.compile(r"(dataset_infos?|dataset_dict|state|croissant|datapackage)\.json")
"""Names, in lower case, of files that tell about data and are none."""


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
    """What its content is known by (`contents.py`), wherever it lies and whenever it was written;
    empty: not asked."""

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

    @property
    def folder_and_name(self) -> tuple[str, str]:
        """The folder that it lies in and its own name without suffix, where these tell something
        of its content; else empty."""
        if self.form not in ("files", "html"):
            return "", ""
        folder, _, name = self.path.rpartition("/")
        return folder.rpartition("/")[2], name.rpartition(".")[0] or name

    def open(self) -> pafs.FileSystem:
        return share_filesystem(self.place)[0]


@dataclass(frozen=True)
class Listing:
    """The files of a source in reading order, and what lies beside them unread."""

    files: tuple[InputFile, ...]
    left_out: tuple[LeftOut, ...]


def find_files(source: Source, where: str) -> list[InputFile]:
    """The files of a source in reading order; a file that several paths name is read once. Raises
    CorpusError.

    `where` is the dotted path of the source in the spec, for messages.
    """
    return list(list_source(source, where).files)


def list_source(source: Source, where: str) -> Listing:
    """As `find_files`, with a count of the files that are left out."""
    found: dict[tuple[str, str], InputFile] = {}
    leavings = Leavings()
    for path in source.paths:
        beside = Leavings()
        files = list(_find_stdlib()) if path == STDLIB else _find(path, source, where, beside)
        if not files:
            raise CorpusError(
                f"{where}.path",
                f"no matching file in {shown(path)}{_told(beside)}",
                _rule(source),
                "check the path",
            )
        for file in [*files, *(_beside(files) if source.format == "idx" else ())]:
            found.setdefault((file.place if is_uri(file.place) else "", file.path), file)
        leavings.merge(beside.to_records())
    return Listing(tuple(found.values()), leavings.to_records())


def _beside(files: Sequence[InputFile]) -> Iterator[InputFile]:
    """The labels of files of images, which are inputs as they are, whether they are named or
    not."""
    for file in files:
        filesystem, path = file.open(), path_of_labels(file.path)
        info = filesystem.get_file_info(path)
        if path != file.path and info.type == pafs.FileType.File:
            yield _input_file(filesystem, file.place, info, file.form, file.compression)


def _told(leavings: Leavings) -> str:
    """What was left out, for a message; nothing if nothing was."""
    told = [
        f"{item.num_files} {item.reason} "
        f"({', '.join(path.rpartition('/')[2] or path for path in item.examples)}"
        f"{', …' if item.num_files > len(item.examples) else ''})"
        for item in leavings.to_records()
    ]
    return f" (left out: {'; '.join(told)})" if told else ""


def _rule(source: Source) -> str:
    if source.format == "auto":
        return (
            "suffixes tell the form (jsonl, csv, tsv, parquet, warc, txt, …, then .gz, .zst, …), "
            "or `format` does"
        )
    return "hidden files and those that `exclude` names are left out"


def _find(path: str, source: Source, where: str, leavings: Leavings) -> list[InputFile]:
    """The files that one path names. Raises CorpusError if there is nothing, or the one file has no
    form."""
    base, pattern = _split_glob(path)
    filesystem, root = open_filesystem(base)
    info = filesystem.get_file_info(root)
    if info.type == pafs.FileType.NotFound:
        raise CorpusError(
            f"{where}.path",
            f"{shown(absolute(path))} does not exist",
            "a path, glob or URI of the corpus",
            "relative paths start at the working directory",
        )
    if info.type == pafs.FileType.Unknown:
        raise CorpusError(
            f"{where}.path",
            f"{shown(path)} is a pipe, socket or device",
            "inputs are read more than once",
            "write it to a file",
        )
    if info.type == pafs.FileType.File:
        form, compression = _form(root, source)
        if not form:
            raise CorpusError(
                f"{where}.path",
                f"cannot tell the form of {shown(path)}",
                _rule(source),
                f"set {where}.format",
            )
        return [_input_file(filesystem, base, info, form, compression)]
    try:
        recursive = pattern is None or "/" in pattern or "**" in pattern
        entries = list_entries(
            filesystem, root, recursive, leavings, lambda item: _stamp(filesystem, item)
        )
    except OSError as error:
        raise CorpusError(
            f"{where}.path",
            f"{shown(path)} cannot be listed ({error})",
            "inputs must be readable",
            "mend the permissions, or name the files apart",
        ) from error
    chosen = _choose(entries, root, pattern, source, leavings)
    return _leave_companions(base, drop_second_links(chosen, leavings), source, leavings)


def _choose(
    entries: Sequence[Entry], root: str, pattern: str | None, source: Source, leavings: Leavings
) -> list[Entry]:
    """The entries that the pattern matches, without hidden, excluded and formless ones."""
    matches = re.compile(translate_glob(pattern)).fullmatch if pattern else None
    excluded = [re.compile(translate_glob(glob)) for glob in source.exclude]
    chosen: list[Entry] = []
    for entry in entries:
        relative = entry.path[len(root) :].lstrip("/")
        names = (relative, relative.rpartition("/")[2], entry.path)
        if matches and not matches(relative):
            continue
        if is_hidden(relative):
            leavings.add(HIDDEN, entry.path, entry.num_bytes)
        elif any(glob.fullmatch(name) for glob in excluded for name in names):
            leavings.add("named by `exclude`", entry.path, entry.num_bytes)
        elif not _form(entry.path, source)[0]:
            leavings.add("of a form that their names do not tell", entry.path, entry.num_bytes)
        else:
            chosen.append(entry)
    return chosen


def _leave_companions(
    base: str, entries: Sequence[Entry], source: Source, leavings: Leavings
) -> list[InputFile]:
    """The entries as input files, without what only accompanies data: a README beside shards is no
    document.

    Text beside data is left out as a whole where the data weighs more: such a folder is a data set,
    not a text corpus.
    """
    files = [
        InputFile(base, entry.path, entry.num_bytes, entry.stamp, *_form(entry.path, source))
        for entry in entries
    ]
    if source.format != "auto":
        return files
    data = [
        file for file in files if file.form != "text" and not METADATA.fullmatch(_base_name(file))
    ]
    if not data:
        return files
    text_bytes = sum(
        file.estimated_bytes
        for file in files
        if file.form == "text" and not _is_documentation(file)
    )
    outweighs = sum(file.estimated_bytes for file in data) > text_bytes
    kept: list[InputFile] = []
    for file in files:
        if _is_documentation(file) or METADATA.fullmatch(_base_name(file)):
            leavings.add("documentation beside data", file.path, file.num_bytes)
        elif file.form == "text" and outweighs:
            leavings.add("text beside data (a path of its own reads it)", file.path, file.num_bytes)
        else:
            kept.append(file)
    return kept


def _base_name(file: InputFile) -> str:
    return file.path.rpartition("/")[2].lower()


def _is_documentation(file: InputFile) -> bool:
    return file.form == "text" and DOCUMENTATION.match(_base_name(file)) is not None


def _find_stdlib() -> Iterator[InputFile]:
    """The standard library's *.py files, without site-packages: real text on every machine."""
    root = sysconfig.get_paths()["stdlib"]
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - {"site-packages", "dist-packages", "__pycache__"})
        for name in sorted(name for name in names if name.endswith(".py")):
            path = os.path.join(folder, name)
            status = os.stat(path)
            yield InputFile(root, path, status.st_size, str(status.st_mtime_ns), "text", "")


def _input_file(
    filesystem: pafs.FileSystem, base: str, info: pafs.FileInfo, form: str, compression: str
) -> InputFile:
    return InputFile(
        base, cast(str, info.path), int(info.size or 0), _stamp(filesystem, info), form, compression
    )


def _stamp(filesystem: pafs.FileSystem, info: pafs.FileInfo) -> str:
    return str(info.mtime_ns) if info.mtime_ns is not None else _etag(filesystem, info.path)


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
    form = (
        source.format
        if source.format != "auto"
        else FORMS.get(parts[-1], "")
        if len(parts) > 1
        else ""
    )
    return form, compression


def suffix_form(path: str) -> str:
    """The form that the suffixes of a path, glob or URI tell; empty if they tell none."""
    return _form(path.partition("?")[0] if is_uri(path) else path, Source(path=path))[0]


def _split_glob(path: str) -> tuple[str, str | None]:
    """A place without magic, and the pattern below it. In a URI `?` begins the query; elsewhere it
    is a wildcard.

    A name with magic that is there, as written, is that file or folder.
    """
    place = absolute(path)
    if not is_uri(place):
        return _cut(place, "*?[", os.path.lexists)
    parts = urlsplit(place)
    # Not urlunsplit: it drops the slashes of `hdfs:///path`.
    query = f"?{parts.query}" if parts.query else ""

    def is_there(inner: str) -> bool:
        filesystem, root = open_filesystem(f"{parts.scheme}://{parts.netloc}{inner}{query}")
        return bool(filesystem.get_file_info(root).type != pafs.FileType.NotFound)

    base, pattern = _cut(parts.path, "*[", is_there)
    return f"{parts.scheme}://{parts.netloc}{base}{query}", pattern


def _cut(path: str, magic: str, is_there: Callable[[str], bool]) -> tuple[str, str | None]:
    names = path.split("/")
    for index, name in enumerate(names):
        if any(character in name for character in magic) and not is_there(
            "/".join(names[: index + 1])
        ):
            return "/".join(names[:index]) or "/", "/".join(names[index:])
    return path, None


def translate_glob(pattern: str) -> str:
    """A glob as a regular expression: `*` and `?` stay within a name, `**` crosses folders, `[…]`
    is a set."""
    out, index = "", 0
    while index < len(pattern):
        if pattern.startswith("**/", index):
            out, index = out + "(?:.*/)?", index + 3
        elif pattern.startswith("**", index):
            out, index = out + ".*", index + 2
        elif pattern[index] in "*?":
            out, index = out + ("[^/]*" if pattern[index] == "*" else "[^/]"), index + 1
        elif pattern[index] == "[" and "]" in pattern[index + 2 :]:
            end = pattern.index("]", index + 2)
            body, negated = pattern[index + 1 : end], pattern[index + 1] in "!^"
            letters = "".join(
                c if c == "-" else re.escape(c) for c in (body[1:] if negated else body)
            )
            out, index = out + "[" + ("^" if negated else "") + letters + "]", end + 1
        else:
            out, index = out + re.escape(pattern[index]), index + 1
    return out
