"""Finding checkpoints, proving them sound, and reading ranges of any tensor from any number of rank
files.

Only headers and byte ranges are read, on local disks and object stores alike; nothing is ever
unpickled. Refuses what has no marker, a manifest of another hash, or a file of another size;
`verify_files` checks every byte. A storage that is out of reach is an error, never damage.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
from pyarrow import fs as pafs

from dray.errors import StoreError
from dray.runs.checkpoint_manifest import (
    MODEL_STATES,
    PACKED_STATES,
    CheckpointInfo,
    CheckpointManifest,
    Piece,
    RankFile,
    make_sha256,
)
from dray.runs.commit import CHUNK_BYTES, DTYPES, tensor_bytes
from dray.runs.layout import (
    CHECKPOINTS,
    DELETING_FILE,
    MANIFEST_FILE,
    MARKER_FILE,
    REJECTED_FILE,
    RunFolder,
    make_fragment_key,
    parse_checkpoint_folder,
)
from dray.runs.pins import hold
from dray.storage.filesystem import RangeReader, is_local, list_files, list_folders, read_bytes
from dray.storage.retrying import make_damage

if TYPE_CHECKING:
    import torch

HEADER_BYTES = 256 * 1024
READ_BLOCK_BYTES = 4 * 1024 * 1024
KEPT_BLOCKS = 12
MAX_HEADER_BYTES = 100_000_000
_TORCH_DTYPES = {theirs: ours for ours, theirs in DTYPES.items()}
_DTYPE_BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


def find_checkpoints(run: RunFolder) -> list[CheckpointInfo]:
    """Every checkpoint folder of a run, sound or not, by step and attempt."""
    folder = f"{run.path}/{CHECKPOINTS}"
    names = [name for name in list_folders(run.filesystem, folder) if parse_checkpoint_folder(name)]
    found = [inspect_checkpoint(run.filesystem, f"{folder}/{name}") for name in names]
    return sorted(found, key=lambda info: (info.step, info.attempt))


def inspect_checkpoint(filesystem: pafs.FileSystem, path: str) -> CheckpointInfo:
    """A checkpoint as it lies there; `verified` rests on marker, manifest and sizes, not on the
    files' bytes.

    Raises StorageFailed if the storage is out of reach: what cannot be looked at is not unsound.
    """
    parsed = parse_checkpoint_folder(path.rpartition("/")[2])
    if parsed is None:
        raise StoreError(path, "not a checkpoint's folder")
    sizes = list_files(filesystem, path)
    info = CheckpointInfo(
        *parsed, path, sum(sizes.values()), verified=False, committed=MARKER_FILE in sizes
    )
    try:
        if REJECTED_FILE in sizes:
            reason = read_bytes(filesystem, f"{path}/{REJECTED_FILE}").decode(errors="replace")
            return replace(info, problem=f"set aside: {reason}", set_aside=True)
        if DELETING_FILE in sizes:
            return replace(info, committed=False, problem="it is being deleted")
        manifest = load_manifest(filesystem, path, sizes)
    except (StoreError, OSError) as error:
        return replace(info, problem=make_damage(error))
    without_better = int(manifest.metadata.get("validations_without_better") or 0)
    return replace(info, verified=True, metrics=manifest.metrics, without_better=without_better)


def load_manifest(
    filesystem: pafs.FileSystem, path: str, sizes: Mapping[str, int] | None = None
) -> CheckpointManifest:
    """The manifest of a committed checkpoint. Raises StoreError unless marker, hash and all sizes
    are right."""
    sizes = list_files(filesystem, path) if sizes is None else sizes
    rule = "a checkpoint is used only if every file is there as it was committed"
    if MARKER_FILE not in sizes:
        raise StoreError(path, f"no marker {MARKER_FILE}: it was never committed", rule)
    try:
        marker = json.loads(read_bytes(filesystem, f"{path}/{MARKER_FILE}"))
        expected = str(marker["manifest_sha256"])
        content = read_bytes(filesystem, f"{path}/{MANIFEST_FILE}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(path, f"the marker {MARKER_FILE} is unreadable", rule) from error
    except FileNotFoundError as error:
        raise StoreError(path, f"{MANIFEST_FILE} is missing", rule) from error
    if make_sha256(content) != expected:
        raise StoreError(path, f"{MANIFEST_FILE} is not the one that was committed", rule)
    manifest = CheckpointManifest.from_bytes(content, f"{path}/{MANIFEST_FILE}")
    for file in manifest.files:
        if file.file not in sizes:
            raise StoreError(path, f"{file.file} is missing", rule)
        if sizes[file.file] != file.num_bytes:
            raise StoreError(
                path, f"{file.file} has {sizes[file.file]} bytes instead of {file.num_bytes}", rule
            )
    return manifest


@dataclass(frozen=True)
class _Tensor:
    """One tensor of a rank file: safetensors dtype, number of elements, offset of its first byte in
    the file."""

    dtype: str
    length: int
    offset: int


class _Blocks:
    """Reads of remote files, in whole blocks, the last few of which are kept: most tensors are far
    smaller than what a request costs, and a rank asks for neighbours one after the other. Large
    ranges go past the blocks."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._lock = Lock()

    def read_at(self, stream: Any, file: int, num_bytes: int, offset: int) -> bytes:
        if num_bytes >= READ_BLOCK_BYTES:
            return cast(bytes, stream.read_at(num_bytes, offset))
        first, last = offset // READ_BLOCK_BYTES, (offset + num_bytes - 1) // READ_BLOCK_BYTES
        content = b"".join(self._block(stream, file, number) for number in range(first, last + 1))
        return content[offset - first * READ_BLOCK_BYTES :][:num_bytes]

    def _block(self, stream: Any, file: int, number: int) -> bytes:
        with self._lock:
            if (file, number) not in self._blocks:
                self._blocks[file, number] = stream.read_at(
                    READ_BLOCK_BYTES, number * READ_BLOCK_BYTES
                )
                while len(self._blocks) > KEPT_BLOCKS:
                    self._blocks.popitem(last=False)
            self._blocks.move_to_end((file, number))
            return self._blocks[file, number]


class CheckpointReader:
    """Reads any range of any tensor of a committed checkpoint; only the bytes asked for leave the
    storage.

    Opening it checks marker, manifest, sizes and coverage. The files' bytes are checked by
    `verify_files`, to be split over the reading ranks: rank r of R calls `verify_files(range(r,
    reader.num_files, R))`, and all agree. Safe to use from several threads. Raises StoreError.
    """

    def __init__(self, run: RunFolder, info: CheckpointInfo) -> None:
        self.filesystem, self.path, self.info = run.filesystem, info.path, info
        self.manifest = load_manifest(self.filesystem, self.path)
        self._shapes = self.manifest.shapes
        self._places = self.manifest.places(self.path)
        self._kept: dict[str, list[str]] = {}
        for name, state in sorted(self._places):
            if state not in MODEL_STATES:
                self._kept.setdefault(name, []).append(state)
        self._tied: dict[str, str] = dict(self.metadata.get("tied") or {})
        self._open: dict[int, tuple[RangeReader, dict[str, _Tensor]]] = {}
        self._lock = Lock()
        self._blocks = None if is_local(self.filesystem) else _Blocks()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        with self._lock:
            while self._open:
                self._open.popitem()[1][0].close()

    @property
    def metadata(self) -> dict[str, Any]:
        """What was given to `commit`, with `shapes`."""
        return self.manifest.metadata

    @property
    def manifest_sha256(self) -> str:
        """As the marker has it. The manifest has the checksums of all files, so this stands for
        every byte."""
        return make_sha256(read_bytes(self.filesystem, f"{self.path}/{MANIFEST_FILE}"))

    @property
    def num_files(self) -> int:
        return len(self.manifest.files)

    def check_files(self, way_out: str = "") -> None:
        """Raise StoreError unless every byte is as the manifest says."""
        if problems := self.verify_files(range(self.num_files)):
            raise StoreError(
                self.path, "; ".join(problems), "a damaged checkpoint is never loaded", way_out
            )

    def names(self, state: str = "param") -> list[str]:
        """Sorted names of the tensors that have this state."""
        return sorted(name for name, found in self._places if found == state)

    def has(self, name: str, state: str) -> bool:
        """Whether a tensor has this state: frozen parameters have weights alone."""
        return (self._tied.get(name, name), state) in self._places

    def kept(self, name: str) -> list[str]:
        """Sorted names of what the optimiser and hooks keep for a parameter."""
        name = self._tied.get(name, name)
        return self._kept.get(name, [])

    def shape(self, name: str, state: str = "param") -> tuple[int, ...]:
        """Shape of a tensor's state; tied names have the shape of what they share."""
        return tuple(self._shapes.of(self._resolved(name), state))

    def read(
        self, name: str, state: str = "param", start: int = 0, count: int | None = None
    ) -> torch.Tensor:
        """Elements `start` to `start + count` of a flattened tensor, 1-D on the CPU; by default all
        of them."""
        import torch

        name = self._resolved(name)
        place = self._places.get((name, state))
        if place is None:
            raise StoreError(self.path, f"{name}: no {state} was saved")
        num_elements = self._shapes.size(name, state)
        count = num_elements - start if count is None else count
        if start < 0 or count < 0 or start + count > num_elements:
            raise StoreError(
                self.path,
                f"{name}|{state}: elements {start} to {start + count} of {num_elements}",
                "the range lies inside the tensor",
            )
        pieces = place.pieces((name, state), start, start + count)
        first = next(pieces)
        out = torch.empty(count, dtype=getattr(torch, _TORCH_DTYPES[self._find(first)[1].dtype]))
        for piece in (first, *pieces):
            begin = max(start, piece.fragment.start)
            end = min(start + count, piece.fragment.start + piece.fragment.length)
            if begin < end:
                self._read_into(
                    out[begin - start : end - start], piece, begin - piece.fragment.start
                )
        return out

    def verify_files(self, indices: Iterable[int]) -> list[str]:
        """What is wrong with the rank files of these indices: hashes them whole. An empty list is
        good news."""
        problems = (self._verify(self.manifest.files[index]) for index in indices)
        return [problem for problem in problems if problem]

    def _verify(self, file: RankFile) -> str:
        digest, offset = hashlib.sha256(), 0
        stream = RangeReader(self.filesystem, f"{self.path}/{file.file}")
        try:
            while chunk := stream.read_at(CHUNK_BYTES, offset):
                digest.update(chunk)
                offset += len(chunk)
        except (StoreError, OSError) as error:
            return f"{file.file} cannot be read: {make_damage(error)}"
        finally:
            stream.close()
        return (
            ""
            if digest.hexdigest() == file.sha256
            else (f"{file.file} has changed: its checksum is another")
        )

    def _resolved(self, name: str) -> str:
        name = self._tied.get(name, name)
        if name not in self._shapes.by_name:
            raise StoreError(self.path, f"{name}: no such tensor in this checkpoint")
        return name

    def _find(self, piece: Piece) -> tuple[RangeReader, _Tensor]:
        """The open file that holds a piece, and where it lies in there."""
        with self._lock:
            if piece.file not in self._open:
                self._open[piece.file] = self._open_file(self.manifest.files[piece.file])
            stream, tensors = self._open[piece.file]
        fragment = piece.fragment
        key = make_fragment_key(fragment.parameter, fragment.state, fragment.start)
        tensor = tensors.get(key)
        if tensor is None or tensor.length != fragment.length:
            where = f"{self.path}/{self.manifest.files[piece.file].file}"
            raise StoreError(where, f"{key}: not as the manifest has it")
        return stream, tensor

    def _open_file(self, file: RankFile) -> tuple[RangeReader, dict[str, _Tensor]]:
        where = f"{self.path}/{file.file}"
        with ExitStack() as on_failure:
            stream = on_failure.enter_context(closing(RangeReader(self.filesystem, where)))
            header = read_header(stream, file.num_bytes, where)
            on_failure.pop_all()
        return stream, header

    def _read_into(self, out: torch.Tensor, piece: Piece, first: int) -> None:
        stream, tensor = self._find(piece)
        view = tensor_bytes(out)
        if tensor.dtype != DTYPES[str(out.dtype).removeprefix("torch.")]:
            where, (name, state, start, _) = self.manifest.files[piece.file].file, piece.fragment
            raise StoreError(
                f"{self.path}/{where}",
                f"{make_fragment_key(name, state, start)} is {tensor.dtype}",
                "all parts of a state have one dtype",
            )
        offset = tensor.offset + first * out.element_size()
        for at in range(0, len(view), CHUNK_BYTES):
            wanted = min(CHUNK_BYTES, len(view) - at)
            if self._blocks is None:
                content = stream.read_at(wanted, offset + at)
            else:
                content = self._blocks.read_at(stream, piece.file, wanted, offset + at)
            if len(content) != wanted:
                raise StoreError(
                    f"{self.path}/{self.manifest.files[piece.file].file}", "ends too early"
                )
            view[at : at + wanted] = content


def read_header(stream: Any, num_bytes: int, where: str) -> dict[str, _Tensor]:
    """The tensors of a safetensors file of `num_bytes` bytes. Raises StoreError if the header does
    not fit the file."""
    start = cast(bytes, stream.read_at(min(HEADER_BYTES, num_bytes), 0))
    length = int.from_bytes(start[:8], "little")
    try:
        if len(start) < 8 or length > min(MAX_HEADER_BYTES, num_bytes - 8):
            raise ValueError(f"a header of {length} bytes in a file of {num_bytes}")
        text = start[8 : 8 + length]
        if len(text) < length:
            text += stream.read_at(length - len(text), 8 + len(text))
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors: dict[str, _Tensor] = {}
        for key, value in header.items():
            begin, end = map(operator.index, value["data_offsets"])
            count = math.prod(map(operator.index, value["shape"]))
            if (
                not 0 <= begin <= end <= num_bytes - 8 - length
                or end - begin != count * _DTYPE_BYTES[value["dtype"]]
            ):
                raise ValueError(f"{key} does not fit")
            tensors[key] = _Tensor(value["dtype"], count, 8 + length + begin)
        return tensors
    except (
        *(ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError),
        pa.ArrowException,
    ) as error:
        raise StoreError(where, f"not a safetensors file ({error})") from error


@dataclass(frozen=True)
class CheckpointReport:
    """The outcome of checking every byte. The hashes cover the tensors as wholes, so they do not
    depend on the number of ranks or the ZeRO stage; they are empty where the tensors cannot be
    read."""

    step: int
    attempt: int
    path: str
    ok: bool
    files: list[dict[str, Any]]
    problems: list[str] = field(default_factory=list)
    weights_sha256: str = ""
    optimizer_sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verify_checkpoint(run: RunFolder, info: CheckpointInfo) -> CheckpointReport:
    """Check marker, manifest, coverage and every byte of every file, and hash the tensors. Finds
    damage instead of raising; raises StorageFailed if the storage is out of reach. Retention spares
    the checkpoint meanwhile."""
    try:
        with hold(run.filesystem, info.path), CheckpointReader(run, info) as reader:
            files = []
            for index, file in enumerate(reader.manifest.files):
                problems = reader.verify_files([index])
                files.append(
                    {
                        "file": file.file,
                        "bytes": file.num_bytes,
                        "sha256": file.sha256,
                        "ok": not problems,
                        "problem": "; ".join(problems),
                    }
                )
            problems = [str(file["problem"]) for file in files if not file["ok"]]
            hashes = ("", "") if problems else (hash_weights(reader), hash_optimizer(reader))
    except (StoreError, OSError) as error:
        return CheckpointReport(info.step, info.attempt, info.path, False, [], [make_damage(error)])
    return CheckpointReport(
        info.step, info.attempt, info.path, not problems, files, problems, *hashes
    )


def hash_weights(reader: CheckpointReader) -> str:
    """SHA-256 over (name, shape, fp32 little-endian bytes) of all weights in the order of their
    names; of packed ones over what stands for them."""
    digest = hashlib.sha256()
    weights = ("param", *PACKED_STATES)
    for name in sorted({name for state in weights for name in reader.names(state)}):
        for state in weights:
            if reader.has(name, state):
                digest.update(name.encode() + (b"" if state == "param" else state.encode()))
                _update(digest, reader, name, state)
    return digest.hexdigest()


def hash_optimizer(reader: CheckpointReader) -> str:
    """SHA-256 over (name, state, shape, bytes) of all that the optimiser and hooks keep, in the
    order of the names."""
    digest = hashlib.sha256()
    for name in reader.names("param"):
        for state in reader.kept(name):
            digest.update(name.encode() + state.encode())
            _update(digest, reader, name, state)
    return digest.hexdigest()


def _update(digest: Any, reader: CheckpointReader, name: str, state: str) -> None:
    shape = reader.shape(name, state)
    digest.update(str(list(shape)).encode())
    num_elements, step = math.prod(shape), CHUNK_BYTES // 4
    for start in range(0, num_elements, step):
        digest.update(
            tensor_bytes(reader.read(name, state, start, min(step, num_elements - start)))
        )
