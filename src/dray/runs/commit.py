"""The commit of a checkpoint: every rank's file, then the manifest, then the marker, each synced
before the next.

A rank writes its own file and nothing else; one of them commits. Nothing here waits for other
ranks, so a save may run in a thread beside training. Refuses a tensor of the wrong form, fragments
that do not cover, a stale attempt or driver.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dray.errors import StoreError
from dray.runs.checkpoint_manifest import (
    CheckpointInfo,
    CheckpointManifest,
    Fragments,
    RankFile,
    make_sha256,
)
from dray.runs.drivers import check_driver
from dray.runs.layout import (
    ATTEMPTS,
    CHECKPOINTS,
    MANIFEST_FILE,
    MARKER_FILE,
    Fragment,
    RunFolder,
    make_attempt_file,
    make_checkpoint_folder,
    make_rank_file,
    parse_attempt_file,
    parse_fragment_key,
)
from dray.runs.row_log import load_json
from dray.storage.exclusive import create_exclusive
from dray.storage.filesystem import exists, list_files, make_folder, write_bytes, write_whole

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 8 * 1024 * 1024
STATE_NAME = r"[a-z][a-z0-9]*(_[a-z0-9]+)*"
DTYPES = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""torch's names of the dtypes → safetensors' names."""


class CheckpointWriter:
    """Writes one checkpoint of a run. Each rank makes its own; attempt and step make the folder."""

    def __init__(self, run: RunFolder, step: int, attempt: int) -> None:
        self.filesystem, self.run_path, self.step, self.attempt = (
            run.filesystem,
            run.path,
            step,
            attempt,
        )
        self.path = f"{run.path}/{CHECKPOINTS}/{make_checkpoint_folder(step, attempt)}"

    def write_rank(
        self, rank: int, num_ranks: int, tensors: Mapping[str, torch.Tensor]
    ) -> RankFile:
        """Write one rank's fragments as a safetensors file; when this returns it is whole, and
        synced on a local disk.

        `tensors`: fragment key (`make_fragment_key(parameter, state, start)`) → 1-D tensor on any
        device, fp32 for param, of any dtype for every other state. Tensors are copied to the host
        one at a time. If the storage fails for a moment the file is written
        again from the start: the tensors must not change before this returns. Raises StoreError for
        a wrong tensor or a checkpoint already committed, StorageFailed.
        """
        if sys.byteorder != "little":
            raise StoreError(
                self.path, "this machine is big-endian", "safetensors files are little-endian"
            )
        name = make_rank_file(rank, num_ranks)
        ordered = dict(sorted(tensors.items()))
        fragments = tuple(_make_fragment(key, tensor) for key, tensor in ordered.items())
        if exists(self.filesystem, f"{self.path}/{MARKER_FILE}"):
            raise StoreError(
                self.path, "is committed already", "a committed checkpoint is never written again"
            )
        make_folder(self.filesystem, self.path)

        def produce(stream: Any) -> tuple[int, str]:
            digest, num_bytes = hashlib.sha256(), 0
            for chunk in _file_chunks(
                ordered, {"format": "pt", "step": str(self.step), "rank": str(rank)}
            ):
                digest.update(chunk)
                stream.write(chunk)
                num_bytes += len(chunk)
            return num_bytes, digest.hexdigest()

        num_bytes, sha256 = write_whole(self.filesystem, f"{self.path}/{name}", produce)
        return RankFile(rank, name, num_bytes, sha256, Fragments.make(fragments))

    def commit(self, rank_files: Sequence[RankFile], metadata: Mapping[str, Any]) -> CheckpointInfo:
        """Make the checkpoint exist: manifest first, the marker last. Called once, with the files
        of all ranks.

        `metadata` needs `shapes` (name → shape of every parameter, buffer and extra). Known
        besides: `state_shapes` (name → state → shape, where it is not the parameter's),
        `tied` (alias → name), `validation` (metric → value), `num_ranks`, `zero_stage`,
        `fingerprint`, `tokens`, `loss_scale` …. Raises StoreError if a fragment is missing or
        written twice, a file is not there, a later attempt has begun, another driver has taken the
        run over, or the checkpoint is committed already: a marker is never replaced.
        """
        files = tuple(sorted(rank_files, key=lambda file: file.rank))
        if "shapes" not in metadata:
            raise StoreError(
                self.path, "metadata has no shapes", "metadata['shapes'] names every tensor"
            )
        manifest = CheckpointManifest.make(self.step, self.attempt, files, metadata, self.path)
        content = manifest.to_bytes()
        self._check_files(files)
        write_bytes(self.filesystem, f"{self.path}/{MANIFEST_FILE}", content)
        marker = {
            "manifest_sha256": make_sha256(content),
            "committed": datetime.now(UTC).isoformat(),
            "nonce": uuid.uuid4().hex,
        }
        committed = json.dumps(marker).encode()
        # Last of all. Who takes over after this look finds the checkpoint, or starts before it and
        # so undoes it.
        self._check_current()
        if not create_exclusive(self.filesystem, f"{self.path}/{MARKER_FILE}", committed):
            raise StoreError(
                self.path, "is committed already", "a committed checkpoint is never written again"
            )
        num_bytes = len(content) + len(committed) + sum(file.num_bytes for file in files)
        return CheckpointInfo(self.step, self.attempt, self.path, num_bytes, True, manifest.metrics)

    def _check_files(self, files: Sequence[RankFile]) -> None:
        expected = [make_rank_file(rank, len(files)) for rank in range(len(files))]
        if [file.file for file in files] != expected:
            raise StoreError(
                self.path,
                f"{len(files)} rank files that are not {expected[0]} …",
                "every rank's file is committed, once",
            )
        found = list_files(self.filesystem, self.path)
        for file in files:
            if found.get(file.file) != file.num_bytes:
                raise StoreError(
                    f"{self.path}/{file.file}",
                    f"{found.get(file.file, 'no')} bytes in storage",
                    f"{file.num_bytes} bytes were written",
                )

    def _check_current(self) -> None:
        """A later attempt or driver has taken the run over: what this one does now must not count.

        An attempt that a stale driver began after its successor's is none, whatever its number.
        """
        names = list_files(self.filesystem, f"{self.run_path}/{ATTEMPTS}")
        numbers = {parse_attempt_file(name) or 0 for name in names}
        drivers = {number: self._driver_of(number) for number in numbers if number >= self.attempt}
        mine = drivers.get(self.attempt, 0)
        driver, newest = max(
            ((driver, number) for number, driver in drivers.items()), default=(mine, self.attempt)
        )
        if (driver, newest) > (mine, self.attempt):
            raise StoreError(
                self.path,
                f"attempt {self.attempt} is over: attempt {newest} has begun",
                "only the newest attempt commits",
            )
        check_driver(self.filesystem, self.run_path, mine, self.path)

    def _driver_of(self, attempt: int) -> int:
        record = load_json(
            self.filesystem, f"{self.run_path}/{ATTEMPTS}/{make_attempt_file(attempt)}"
        )
        return int(record.get("driver") or 0)


def _make_fragment(key: str, tensor: torch.Tensor) -> Fragment:
    parameter, state, start = parse_fragment_key(key)
    dtype = str(tensor.dtype).removeprefix("torch.")
    if not re.fullmatch(STATE_NAME, state):
        raise StoreError(
            f"tensor {key!r}", f"{state!r} is no state's name", "lower-case words joined by _"
        )
    if tensor.dim() != 1 or (state == "param" and dtype != "float32") or dtype not in DTYPES:
        raise StoreError(
            f"tensor {key!r}",
            f"is {dtype} with shape {list(tensor.shape)}",
            "weights are 1-D fp32 pieces, all other states 1-D of a common dtype",
        )
    return Fragment(parameter, state, start, tensor.numel())


def _file_chunks(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces: length of the header, header, the tensors' bytes without
    gaps."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[key] = {"dtype": dtype, "shape": [tensor.numel()], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        content = tensor_bytes(tensor)
        for offset in range(0, len(content), CHUNK_BYTES):
            yield content[offset : offset + CHUNK_BYTES]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in order, without a copy where it lies contiguous in host memory."""
    import torch

    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
