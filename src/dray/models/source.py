"""The folder of weights that a run starts from: found once, by the driver, and pinned.

A local folder is known by a digest of what it holds, a model on the hub by its commit. Ranks read
exactly that, and only when the run has no checkpoint yet. Refuses a folder that is gone or holds
something else. Imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dray.errors import SpecError, one_line, translated
from dray.storage.digests import digest_files
from dray.storage.packages import in_package

HUB_SCHEME = "hf://"
FETCHED = ("*.json", "*.safetensors", "*.txt")
"""No pickles: only configurations, tokenisers and safetensors."""
READS_WEIGHTS = (
    "a run reads weights where it began: all until its first checkpoint, then the untrained"
)


@dataclass(frozen=True)
class Pretrained:
    """Where the initial weights of a run lie."""

    path: str
    """As the spec names it."""
    place: str
    """An absolute folder, or `hf://owner/name@commit`."""
    digest: str = ""
    """Of the folder's configuration and weights, or the commit; empty: not pinned yet."""

    def folder(self) -> Path:
        """The folder on this machine; what lies on the hub is fetched into its cache. Raises
        SpecError."""
        return find_folder(self.place)

    def pinned(self) -> Pretrained:
        """The same with its digest, for which a local folder is read whole. Raises SpecError."""
        return self if self.digest else replace(self, digest=_digest_folder(self.folder()))

    def check(self) -> None:
        """Raise SpecError unless the folder is there and holds what it held when it was pinned."""
        if self.place.startswith(HUB_SCHEME):
            return
        if not os.path.isdir(self.place):
            raise SpecError(
                "model.path",
                f"{self.place} is gone",
                READS_WEIGHTS,
                "put it back, or begin another run",
            )
        if self.digest and _digest_folder(Path(self.place)) != self.digest:
            raise SpecError(
                "model.path",
                f"{self.place} holds another model than when the run began",
                READS_WEIGHTS,
                "put the first one back, or begin another run: --run NEW_NAME",
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def find_pretrained(path: str) -> Pretrained:
    """What `model.path` names now. Raises SpecError if there is no such folder, or the hub does not
    give it."""
    folder = find_folder(path)
    if not path.startswith(HUB_SCHEME):
        return Pretrained(path, str(folder))
    name = path.removeprefix(HUB_SCHEME).partition("@")[0]
    return Pretrained(
        path, f"{HUB_SCHEME}{name}@{folder.name}", folder.name
    )  # a snapshot is named by its commit


def find_folder(path: str) -> Path:
    """The local folder of `model.path`, absolute; `python:PACKAGE/PATH` lies in an installed
    package, `hf://owner/name[@revision]` is fetched from the hub into its cache. Raises
    UserError."""
    if not path.startswith(HUB_SCHEME):
        folder = Path(in_package(path)).expanduser().absolute()
        if not folder.is_dir():
            raise SpecError(
                "model.path",
                f"{path}: no such folder",
                "a Hugging Face folder is wanted",
                f"`dray export` writes one; a model on the hub reads {HUB_SCHEME}owner/name",
            )
        return folder
    from huggingface_hub import snapshot_download

    name, _, revision = path.removeprefix(HUB_SCHEME).partition("@")
    with translated(
        lambda error: SpecError(
            "model.path", f"{path} cannot be fetched ({type(error).__name__}: {one_line(error)})"
        )
    ):
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=list(FETCHED))
        )


def check_weights(folder: Path) -> None:
    """Raise SpecError for a safetensors file in the folder that is cut off, or is none. Reads
    headers alone."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "np"):
                pass
        except (SafetensorError, OSError) as error:
            raise SpecError(
                "model.path",
                f"{path} of {path.stat().st_size:,} bytes is no whole safetensors file ({error})",
                "weights must be whole",
                "copy or download it again",
            ) from error


def _digest_folder(folder: Path) -> str:
    """SHA-256 over the names and digests of a folder's configuration and weights. Raises
    SpecError."""
    names = sorted(
        name
        for name in os.listdir(folder)
        if name == "config.json" or name.endswith((".safetensors", ".safetensors.index.json"))
    )
    try:
        found = digest_files([str(folder / name) for name in names])
    except OSError as error:
        raise SpecError(
            "model.path",
            f"{folder} cannot be read ({error})",
            "weights must be readable and hold still",
        ) from error
    pairs = [(name, found[str(folder / name)]) for name in names]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
