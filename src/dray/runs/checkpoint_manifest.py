"""What a checkpoint's manifest holds, and the proof that its fragments cover every tensor exactly
once.

A tensor that is dealt out in equal parts (rank r holds what begins at r · partition) is written
down as that one number: under ZeRO-3 a list of all fragments would grow with ranks × tensors. A
fragment that is missing, lies over another one or past a tensor's end is refused, by its name.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dray.errors import StoreError
from dray.runs.layout import Fragment, is_rank_file

VERSION = 3
"""1: every file with a list of its fragments. 2: `partitions` and `others` beside the files. 3:
`state_shapes` in the metadata; a manifest without them is written as 2, which it is."""
WHOLE_STATES = ("buffer", "extra")
"""What is no parameter: the model's buffers, and whatever else the engine carries, such as
generators' states."""
PACKED_STATES = ("weight_half", "weight_codes", "weight_scales")
"""What stands for a parameter's weights where they are stored in fewer bytes: the weights in half
precision, or codes and what a code counts (`models/packed.py`). Optimisers keep codes, too, under
other names."""
MODEL_STATES = ("param", *WHOLE_STATES, *PACKED_STATES)
"""All others are what the optimiser and hooks keep for a parameter, each under a name of its
own."""

_NOT_ONE = (ValueError, LookupError, TypeError, OverflowError, AttributeError, RecursionError)
"""What a text raises that is read as a manifest and is none."""

Ints = NDArray[np.int64]
Key = tuple[str, str]
"""(parameter, state)."""


class Shapes:
    """The shape of every tensor's every state: that of the tensor, unless `state_shapes` (tensor →
    state → shape) in the metadata says otherwise."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.by_name: Mapping[str, Sequence[int]] = metadata["shapes"]
        self._others: Mapping[str, Any] = metadata.get("state_shapes") or {}

    def of(self, name: str, state: str) -> Sequence[int]:
        """Raises KeyError for a tensor that has no shape."""
        own: Sequence[int] = self.by_name[name]
        return self._others.get(name, {}).get(state, own) if self._others else own

    def size(self, name: str, state: str) -> int:
        """Number of elements."""
        return make_size(self.of(name, state))


@dataclass(frozen=True, eq=False)
class Fragments:
    """What one rank wrote, as columns: a thousand ranks send theirs to one of them."""

    keys: tuple[Key, ...]
    starts: Ints
    lengths: Ints

    @classmethod
    def make(cls, fragments: Sequence[Fragment]) -> Fragments:
        return cls(
            tuple((fragment.parameter, fragment.state) for fragment in fragments),
            np.array([fragment.start for fragment in fragments], dtype=np.int64),
            np.array([fragment.length for fragment in fragments], dtype=np.int64),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        names = zlib.compress(json.dumps(self.keys, separators=(",", ":")).encode(), 1)
        return _make_fragments, (names, self.starts.tobytes(), self.lengths.tobytes())


def _make_fragments(names: bytes, starts: bytes, lengths: bytes) -> Fragments:
    return Fragments(
        _make_keys(names),
        np.frombuffer(starts, dtype=np.int64),
        np.frombuffer(lengths, dtype=np.int64),
    )


@lru_cache(maxsize=4)
def _make_keys(names: bytes) -> tuple[Key, ...]:
    """Most ranks hold parts of the same tensors: their keys become one object."""
    return tuple(
        (str(parameter), str(state)) for parameter, state in json.loads(zlib.decompress(names))
    )


@dataclass(frozen=True)
class RankFile:
    """One rank's file as it was written. `num_bytes` and `sha256` are those of the whole file."""

    rank: int
    file: str
    num_bytes: int
    sha256: str
    fragments: Fragments | None = None
    """None where it was read from a manifest that says in a shorter way where everything lies."""

    def to_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "file": self.file,
            "bytes": self.num_bytes,
            "sha256": self.sha256,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RankFile:
        if not is_rank_file(value["file"]):
            raise ValueError(f"{value['file']!r} is not a rank file's name")
        fragments = None
        if "fragments" in value:
            fragments = Fragments.make(
                [Fragment(str(p), str(s), int(a), int(n)) for p, s, a, n in value["fragments"]]
            )
        return cls(
            int(value["rank"]), value["file"], int(value["bytes"]), value["sha256"], fragments
        )


class Piece(NamedTuple):
    """Where a fragment lies: in the file of that index, as that fragment."""

    file: int
    fragment: Fragment


@dataclass(frozen=True)
class Partition:
    """A tensor's state of `size` elements, of which file r holds `length` from r · length on."""

    length: int
    size: int

    def pieces(self, key: Key, start: int, stop: int) -> Iterator[Piece]:
        """The pieces that hold elements [start, stop), in order; at least one, whose dtype is the
        tensor's."""
        nearest = min(start, self.size - 1) // self.length
        for file in range(nearest, max(nearest + 1, -(-stop // self.length))):
            first = file * self.length
            yield Piece(file, Fragment(*key, first, min(self.length, self.size - first)))


@dataclass(frozen=True, eq=False)
class Scattered:
    """A tensor's state in pieces of any size, by their first elements."""

    files: Ints
    starts: Ints
    lengths: Ints

    def pieces(self, key: Key, start: int, stop: int) -> Iterator[Piece]:
        """As `Partition.pieces`."""
        first = max(0, int(np.searchsorted(self.starts, start, side="right")) - 1)
        last = max(first + 1, int(np.searchsorted(self.starts, stop, side="left")))
        for at in range(first, last):
            yield Piece(
                int(self.files[at]), Fragment(*key, int(self.starts[at]), int(self.lengths[at]))
            )


Places = dict[Key, Partition | Scattered]


@dataclass(frozen=True)
class CheckpointManifest:
    """All of a checkpoint but its tensors. `metadata["shapes"]` holds the shape of every tensor by
    name, `metadata["state_shapes"]` those of states that are shaped otherwise than their
    parameter."""

    step: int
    attempt: int
    files: tuple[RankFile, ...]
    metadata: dict[str, Any]
    partitions: Sequence[Any] = ()
    """[parameter, length, [state …]] of what is dealt out in equal parts."""
    others: Sequence[Any] = ()
    """[parameter, state, [file …], [start …], [length …]] of everything else."""

    @classmethod
    def make(
        cls,
        step: int,
        attempt: int,
        files: Sequence[RankFile],
        metadata: Mapping[str, Any],
        where: str,
    ) -> CheckpointManifest:
        """The manifest of what the ranks wrote. Raises StoreError unless it covers every tensor
        exactly once."""
        places = make_places(files, Shapes(metadata), where)
        states: dict[tuple[str, int], list[str]] = {}
        others = []
        for (parameter, state), place in places.items():
            if isinstance(place, Partition):
                states.setdefault((parameter, place.length), []).append(state)
            else:
                others.append(
                    [
                        parameter,
                        state,
                        *(column.tolist() for column in (place.files, place.starts, place.lengths)),
                    ]
                )
        partitions = [[parameter, length, found] for (parameter, length), found in states.items()]
        return cls(step, attempt, tuple(files), dict(metadata), partitions, others)

    def places(self, where: str) -> Places:
        """Where every tensor lies. Raises StoreError unless each is covered exactly once, as far as
        that was left open when it was written down."""
        if any(file.fragments is not None for file in self.files):  # version 1
            return make_places(self.files, Shapes(self.metadata), where)
        places: Places = {}
        try:
            shapes = Shapes(self.metadata)
            for parameter, length, states in self.partitions:
                for state in states:
                    size = shapes.size(parameter, state)
                    if not 0 < length <= size or -(-size // length) > len(self.files):
                        raise ValueError(
                            f"{parameter}: {len(self.files)} parts of {length} are not "
                            f"its {size} elements"
                        )
                    places[parameter, state] = Partition(length, size)
            columns = _Columns([(parameter, state) for parameter, state, *_ in self.others])
            for index, (_, _, *given) in enumerate(self.others):
                columns.add(
                    np.full(len(given[0]), index),
                    *(np.array(column, dtype=np.int64) for column in given),
                )
            places |= columns.places(shapes, where, self.files)
            _check_all_there(places, shapes, where)
        except _NOT_ONE as error:
            raise StoreError(where, f"not a checkpoint's manifest ({error!r})") from error
        return places

    @property
    def shapes(self) -> Shapes:
        return Shapes(self.metadata)

    @property
    def metrics(self) -> dict[str, float | None]:
        """`metadata["validation"]`, unless `metadata["validation_step"]` says that it belongs to
        another step."""
        if self.metadata.get("validation_step", self.step) != self.step:
            return {}
        return dict(self.metadata.get("validation") or {})

    def to_bytes(self) -> bytes:
        tree = {
            "version": VERSION if self.metadata.get("state_shapes") else 2,
            "step": self.step,
            "attempt": self.attempt,
            "metadata": self.metadata,
            "files": [file.to_json() for file in self.files],
            "partitions": self.partitions,
            "others": self.others,
        }
        return json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> CheckpointManifest:
        """Raises StoreError."""
        try:
            tree = json.loads(content)
            if tree["version"] > VERSION:
                raise ValueError(f"version {tree['version']} is newer than this dray's {VERSION}")
            files = tuple(RankFile.from_json(value) for value in tree["files"])
            partitions, others = (
                ((), ()) if tree["version"] == 1 else (tree["partitions"], tree["others"])
            )
            return cls(
                int(tree["step"]),
                int(tree["attempt"]),
                files,
                dict(tree["metadata"]),
                partitions,
                others,
            )
        except _NOT_ONE as error:
            raise StoreError(where, f"not a checkpoint's manifest ({error!r})") from error


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint as found in storage. `path` lies in the run's filesystem; `problem` says why it
    is not verified.

    `verified`: the marker is there, the manifest has the hash in it, and every file is there with
    its size. `committed`: the marker is there and no later attempt undid it; without, it may be one
    that is being written. `set_aside`: an attempt found that its files are not what was committed;
    only a person deletes it.
    """

    step: int
    attempt: int
    path: str
    num_bytes: int
    verified: bool
    metrics: dict[str, float | None] = field(default_factory=dict)
    without_better: int = 0
    """Validations in a row by then that were no better than the best, as patience counts them."""
    problem: str = ""
    committed: bool = True
    set_aside: bool = False


def make_places(files: Sequence[RankFile], shapes: Shapes, where: str) -> Places:
    """Where every tensor lies, by (parameter, state), from what the ranks wrote.

    Raises StoreError unless each tensor of `shapes` has its weights (or buffer, or extra) covered
    exactly once, and each other state that it has at all: frozen parameters have none.
    """
    keys: dict[Key, int] = {}
    numbers: dict[int, Ints] = {}  # by the identity of a rank's keys, which most ranks share
    for file in files:
        assert file.fragments is not None
        if id(file.fragments.keys) not in numbers:
            numbers[id(file.fragments.keys)] = np.array(
                [keys.setdefault(key, len(keys)) for key in file.fragments.keys], dtype=np.int64
            )
    columns = _Columns(list(keys))
    for index, file in enumerate(files):
        if file.fragments is not None and len(file.fragments.keys):
            columns.add(
                numbers[id(file.fragments.keys)],
                np.full(len(file.fragments.keys), index),
                file.fragments.starts,
                file.fragments.lengths,
            )
    places = columns.places(shapes, where, files)
    _check_all_there(places, shapes, where)
    return places


class _Columns:
    """The fragments of all files, in columns: a million are checked in a second."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self._keys = keys
        self._columns: list[list[Ints]] = [[], [], [], []]

    def add(self, keys: Ints, files: Ints, starts: Ints, lengths: Ints) -> None:
        """Numbers of keys, indices of files, first elements and lengths."""
        if len({len(keys), len(files), len(starts), len(lengths)}) != 1:
            raise ValueError(f"columns of {len(files)}, {len(starts)} and {len(lengths)} numbers")
        for column, values in zip(self._columns, (keys, files, starts, lengths), strict=True):
            column.append(values)

    def places(self, shapes: Shapes, where: str, files: Sequence[RankFile]) -> Places:
        """Where each key lies. Raises StoreError unless each is covered exactly once."""
        if not self._columns[0]:
            return {}
        keys, indices, starts, lengths = (np.concatenate(column) for column in self._columns)
        for name, _ in self._keys:
            if name not in shapes.by_name:
                raise StoreError(
                    where,
                    f"{name}: no shape is given for it",
                    "metadata['shapes'] names every tensor",
                )
        if np.any((indices < 0) | (indices >= len(files))):
            raise StoreError(where, "a fragment lies in a file that there is none of")
        sizes = np.array([shapes.size(*key) for key in self._keys], dtype=np.int64)
        kept = (lengths > 0) | (sizes[keys] == 0)
        order = np.lexsort((lengths, starts, keys))
        order = order[kept[order]]
        keys, indices, starts, lengths = keys[order], indices[order], starts[order], lengths[order]
        firsts = np.flatnonzero(np.diff(keys, prepend=-1))
        wrong = _find_gap(keys, starts, lengths, firsts, sizes[keys])
        if wrong is not None:
            at, what = wrong
            where_else = f" in {files[indices[at]].file}" if what.endswith("again") else ""
            raise StoreError(
                where,
                f"{'|'.join(self._keys[keys[at]])}: {what}{where_else}",
                "each element is written by exactly one rank",
            )
        found: Places = {}
        for first, last in zip(firsts, [*firsts[1:], len(keys)], strict=True):
            number = int(keys[first])
            group = indices[first:last], starts[first:last], lengths[first:last]
            found[self._keys[number]] = _make_place(*group, int(sizes[number]))
        return found


def _find_gap(
    keys: Ints, starts: Ints, lengths: Ints, firsts: Ints, sizes: Ints
) -> tuple[int, str] | None:
    """The first fragment at fault and what is wrong, if anything: each must start where the one
    before it ended, the first of a key at 0, and the last must end with its tensor.

    The fragments are sorted by key and start; `firsts`: where each key's begin; `sizes`: of each
    one's tensor.
    """
    if not len(keys):
        return None
    ends = starts + lengths
    due = np.concatenate(([0], ends[:-1]))
    due[firsts] = 0
    for at in np.flatnonzero(starts != due)[:1]:
        return int(at), (
            f"elements {due[at]} to {starts[at] - 1} are missing"
            if starts[at] > due[at]
            else f"elements from {starts[at]} on are written again"
        )
    lasts = np.append(firsts[1:], len(keys)) - 1
    for at in lasts[ends[lasts] != sizes[lasts]][:1]:
        return int(at), (
            f"elements {ends[at]} to {sizes[at] - 1} are missing"
            if ends[at] < sizes[at]
            else f"has {ends[at]} elements, its shape only {sizes[at]}"
        )
    return None


def _make_place(files: Ints, starts: Ints, lengths: Ints, size: int) -> Partition | Scattered:
    """The shortest way to say where the parts of a tensor lie, which cover it."""
    length = int(lengths[0])
    even = (
        size > 0
        and np.array_equal(files, np.arange(len(files)))
        and bool(np.all(lengths[:-1] == length))
    )
    return (
        Partition(length, size)
        if even and lengths[-1] <= length
        else Scattered(files, starts, lengths)
    )


def _check_all_there(places: Places, shapes: Shapes, where: str) -> None:
    for name, shape in shapes.by_name.items():
        whole = (state for state in MODEL_STATES if state != "weight_scales")
        if not any((name, state) in places for state in whole) and make_size(shape):
            raise StoreError(
                where, f"{name}: no rank wrote it", "each tensor is written exactly once"
            )


def make_size(shape: Sequence[int]) -> int:
    """Number of elements of a tensor."""
    return math.prod(int(length) for length in shape)


def make_sha256(content: bytes) -> str:
    """SHA-256 as hexadecimal."""
    return hashlib.sha256(content).hexdigest()
