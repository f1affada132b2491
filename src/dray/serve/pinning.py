"""What is served, nailed down: its step as a number, and the digest of its weights.

A version is these weights and no others. Whoever loads it later looks again, and refuses others.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from dray.errors import StoreError
from dray.release.export.manifest import is_export, verify_folder
from dray.release.trained import open_trained
from dray.runs.layout import MANIFEST_FILE
from dray.serve.served import Served
from dray.storage.digests import digest_files
from dray.storage.filesystem import absolute, read_bytes


def pin(served: Served) -> Served:
    """With the step that it means now, and its weights' digest: of a run's manifest, which has the
    SHA-256 of every file of the checkpoint; of a folder's own files. Raises StoreError."""
    if served.folder is not None:
        return served.model_copy(update={"digest": _folder_digest(Path(served.folder))})
    trained = open_trained(str(served.storage), str(served.run), served.step, served.weights)
    info = trained.checkpoint
    manifest = read_bytes(trained.run.filesystem, f"{info.path}/{MANIFEST_FILE}")
    digest = hashlib.sha256(manifest).hexdigest()
    storage = absolute(str(served.storage))
    return served.model_copy(update={"step": info.step, "digest": digest, "storage": storage})


def check_sound(served: Served) -> None:
    """Raises StoreError for an exported folder that is not what its manifest lists; one without a
    manifest is as it is, and a run's checkpoint is looked at as it is read."""
    folder = served.folder
    if folder is not None and is_export(folder) and not (report := verify_folder(folder)).ok:
        raise StoreError(
            folder,
            f"is damaged: {report.problems[0]}",
            "every file is what the manifest lists before it is served",
            f"`dray verify {folder}` tells all of it; export it again",
        )


def check_pinned(served: Served) -> None:
    """Raises StoreError where what lies there is not what was pinned."""
    if served.digest is not None and pin(served).digest != served.digest:
        raise StoreError(
            served.folder or f"{served.run}@{served.step}",
            "has other weights than those that were promoted",
            "a version is these weights and no others",
            "promote it anew",
        )


def _folder_digest(folder: Path) -> str:
    paths = sorted(
        path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")
    )
    digests = digest_files([str(path) for path in paths])
    lines = [f"{digests[str(path)]}  {path.name}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
