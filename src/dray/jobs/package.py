"""What a job is given of this machine's files: those that its command names, and nothing else.

Paths stay what they are. The package holds the folder from which all of them can be reached, and
the job begins in what is the working directory here, so that `../data/a.txt` is found there, too,
and the run has the same fingerprint as at home.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath

from dray.errors import SpecError
from dray.plan import format_bytes
from dray.storage.filesystem import is_uri

LEFT_OUT = frozenset({"__pycache__", "node_modules", "lost+found"})
"""Folders that are never packed; neither are names that begin with a dot (.git, .venv, .env)."""


@dataclass(frozen=True)
class Package:
    """Files of this machine, by their place under the folder that holds them all."""

    root: Path
    here: PurePath
    """The working directory, relative to the root."""
    files: tuple[tuple[PurePath, int], ...]
    """Relative place and bytes of each, in order."""
    num_left_out: int = 0
    """Hidden files and caches within folders that were named."""

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size in self.files)


def make_package(
    names: Iterable[str], max_bytes: int, working_directory: Path | None = None
) -> Package:
    """The package of these files and folders, relative to the working directory.

    Raises SpecError for what is not there, is hidden, or leads elsewhere by a symbolic link, and
    for more than `max_bytes` altogether.
    """
    here = Path(os.path.abspath(working_directory or Path.cwd()))
    found: dict[Path, int] = {}
    num_left_out = 0
    for name in names:
        place = Path(os.path.normpath(here / name))
        _check_way(place, name, here)
        files, left_out = _list(place)
        found.update(files)
        num_left_out += left_out
    total = sum(found.values())
    if total > max_bytes:
        largest, size = max(found.items(), key=lambda item: item[1])
        raise SpecError(
            os.path.relpath(largest, here),
            f"the package would have {len(found):,} files and {format_bytes(total)}, of which this "
            f"one has {format_bytes(size)}",
            f"a package has {format_bytes(max_bytes)} at most: it lies in the memory of the head",
            "put large files where the whole cluster sees them and name them by a URI or an "
            "absolute path, or give --max-package",
        )
    root = Path(os.path.commonpath([here, *found])) if found else here
    return Package(
        root,
        here.relative_to(root),
        tuple((place.relative_to(root), size) for place, size in sorted(found.items())),
        num_left_out,
    )


def _check_way(place: Path, name: str, here: Path) -> None:
    """Raise SpecError for a place that is not there, is hidden, or is reached by a link out of the
    folder that its name begins in: a spec, and the folders beside it, may come from anybody."""
    if not place.exists():
        raise SpecError(name, "is not there", "what a command names goes with it")
    parts = PurePath(os.path.relpath(place, here)).parts
    if any(part.startswith(".") and part != ".." for part in parts):
        raise SpecError(
            name,
            "is hidden",
            "nothing hidden goes to a cluster: keys and settings lie in such files",
            "copy it to a name without the dot",
        )
    base = here.joinpath(*(part for part in parts if part == "..")).resolve()
    if not place.resolve().is_relative_to(base):
        raise SpecError(
            name,
            f"leads by a symbolic link to {place.resolve()}",
            f"what goes to a cluster lies below {base}, where its name begins",
            "name that place itself, or put a copy in its place",
        )


def _list(place: Path) -> tuple[dict[Path, int], int]:
    """The files of a place with their sizes, and how many were left out."""
    if not place.is_dir():
        return {place: place.stat().st_size}, 0
    found: dict[Path, int] = {}
    home, left_out = place.resolve(), 0
    for folder, folders, files in os.walk(place):
        left_out += sum(map(_is_left_out, files))
        folders[:] = sorted(sub for sub in folders if not _is_left_out(sub))
        for sub in (*folders, *files):
            entry = Path(folder, sub)
            if not _is_left_out(sub) and entry.is_symlink():
                _check_link(entry, home)
        found |= {
            Path(folder, file): Path(folder, file).stat().st_size
            for file in files
            if not _is_left_out(file)
        }
    return found, left_out


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or name in LEFT_OUT


def _check_link(entry: Path, home: Path) -> None:
    if not entry.resolve().is_relative_to(home) or not entry.exists():
        raise SpecError(
            str(entry),
            "is a symbolic link that leads out of its folder",
            "a job is given what its command names, and nothing that lies elsewhere",
            "name the file that it leads to, or put a copy in its place",
        )


@contextmanager
def staged(package: Package) -> Iterator[Path]:
    """A folder with the files of the package and nothing else, for the time of the block."""
    with tempfile.TemporaryDirectory(prefix="dray-package-") as folder:
        for place, _ in package.files:
            target = Path(folder, place)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(package.root / place, target)
        Path(folder, package.here).mkdir(parents=True, exist_ok=True)
        Path(folder, package.here, ".here").touch()  # a folder without a file is not sent
        yield Path(folder)


def local_names(paths: Sequence[str]) -> list[str]:
    """Those of a spec's paths that lie on this machine: not URIs, nor `python:` packages, nor
    absolute paths, which are the cluster's own."""
    return [
        path
        for path in paths
        if not is_uri(path) and not path.startswith("python:") and not os.path.isabs(path)
    ]
