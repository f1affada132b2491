"""What a checkpoint's manifest holds, and the proof that its fragments cover every tensor exactly once.

A fragment that is missing, lies over another one or past a tensor's end is refused, by its name.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dray.errors import StoreError
from dray.store.layout import Fragment, is_rank_file

VERSION = 1
OPTIMIZER_STATES = ("exp_avg", "exp_avg_sq")
FLOAT_STATES = ("param", *OPTIMIZER_STATES)
WHOLE_STATES = ("buffer", "extra")
"""States of any dtype: the model's buffers, and whatever else the engine carries, such as generators' states."""


@dataclass(frozen=True)
class RankFile:
    """One rank's file as it was written. `num_bytes` and `sha256` are those of the whole file."""

    rank: int
    file: str
    num_bytes: int
    sha256: str
    fragments: tuple[Fragment, ...]

    def to_json(self) -> dict[str, Any]:
        return {"rank": self.rank, "file": self.file, "bytes": self.num_bytes, "sha256": self.sha256,
                "fragments": [list(fragment) for fragment in self.fragments]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RankFile:
        if not is_rank_file(value["file"]):
            raise ValueError(f"{value['file']!r} is not a rank file's name")
        fragments = tuple(Fragment(str(p), str(s), int(a), int(n)) for p, s, a, n in value["fragments"])
        return cls(int(value["rank"]), value["file"], int(value["bytes"]), value["sha256"], fragments)


@dataclass(frozen=True)
class CheckpointManifest:
    """All of a checkpoint but its tensors. `metadata["shapes"]` holds the shape of every tensor by name."""

    step: int
    attempt: int
    files: tuple[RankFile, ...]
    metadata: dict[str, Any]

    @property
    def shapes(self) -> dict[str, list[int]]:
        return dict(self.metadata["shapes"])

    @property
    def metrics(self) -> dict[str, float]:
        """`metadata["validation"]`, unless `metadata["validation_step"]` says that it belongs to another step."""
        if self.metadata.get("validation_step", self.step) != self.step:
            return {}
        return dict(self.metadata.get("validation") or {})

    def to_bytes(self) -> bytes:
        tree = {"version": VERSION, "step": self.step, "attempt": self.attempt, "metadata": self.metadata,
                "files": [file.to_json() for file in self.files]}
        return json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> CheckpointManifest:
        """Raises StoreError."""
        try:
            tree = json.loads(content)
            if tree["version"] > VERSION:
                raise ValueError(f"version {tree['version']} is newer than this dray's {VERSION}")
            files = tuple(RankFile.from_json(value) for value in tree["files"])
            return cls(int(tree["step"]), int(tree["attempt"]), files, dict(tree["metadata"]))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(where, f"not a checkpoint's manifest ({error!r})") from error


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint as found in storage. `path` lies in the run's filesystem; `problem` says why it is not verified.

    `verified`: the marker is there, the manifest has the hash in it, and every file is there with its size.
    `committed`: the marker is there and no later attempt undid it; without, it may be one that is being written.
    `set_aside`: an attempt found that its files are not what was committed; only a person deletes it.
    """

    step: int
    attempt: int
    path: str
    num_bytes: int
    verified: bool
    metrics: dict[str, float] = field(default_factory=dict)
    problem: str = ""
    committed: bool = True
    set_aside: bool = False


@dataclass(frozen=True)
class Piece:
    """Where a fragment lies: in the file of that index, as that fragment."""

    file: int
    fragment: Fragment


def make_pieces(files: Sequence[RankFile], shapes: Mapping[str, Sequence[int]], where: str
                ) -> dict[tuple[str, str], list[Piece]]:
    """(parameter, state) → its pieces from the first element to the last.

    Raises StoreError unless each tensor of `shapes` has its weights (or buffer, or extra) covered exactly once, and
    each optimiser state is covered exactly once or, for frozen parameters, absent.
    """
    pieces: dict[tuple[str, str], list[Piece]] = {}
    for index, file in enumerate(files):
        for fragment in file.fragments:
            if fragment.length or not make_size(shapes.get(fragment.parameter, (1,))):
                pieces.setdefault((fragment.parameter, fragment.state), []).append(Piece(index, fragment))
    for (name, state), found in pieces.items():
        if name not in shapes:
            raise StoreError(where, f"{name}: no shape is given for it", "metadata['shapes'] names every tensor")
        found.sort(key=lambda piece: (piece.fragment.start, piece.fragment.length))
        _check_covered(found, make_size(shapes[name]), f"{name}|{state}", where, files)
    for name in shapes:
        if not any((name, state) in pieces for state in ("param", *WHOLE_STATES)) and make_size(shapes[name]):
            raise StoreError(where, f"{name}: no rank wrote it", "each tensor is written exactly once")
    return pieces


def _check_covered(pieces: Sequence[Piece], num_elements: int, label: str, where: str,
                   files: Sequence[RankFile]) -> None:
    rule = "each element is written by exactly one rank"
    end = 0
    for piece in pieces:
        start, length = piece.fragment.start, piece.fragment.length
        file = files[piece.file].file
        if start > end:
            raise StoreError(where, f"{label}: elements {end} to {start - 1} are missing", rule)
        if start < end:
            raise StoreError(where, f"{label}: elements from {start} on are written again in {file}", rule)
        end = start + length
    if end != num_elements:
        what = f"elements {end} to {num_elements - 1} are missing" if end < num_elements else (
            f"has {end} elements, its shape only {num_elements}")
        raise StoreError(where, f"{label}: {what}", rule)


def make_size(shape: Sequence[int]) -> int:
    """Number of elements of a tensor."""
    return math.prod(int(length) for length in shape)


def make_sha256(content: bytes) -> str:
    """SHA-256 as hexadecimal."""
    return hashlib.sha256(content).hexdigest()
