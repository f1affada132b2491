"""A Hugging Face folder from a run's checkpoint: configuration, safetensors and tokeniser, for `from_pretrained`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from dray.errors import StoreError
from dray.models import save_pretrained_folder
from dray.store import open_filesystem
from dray.trained import Trained, load_trained


def export(storage: str, name: str, folder: str, *, step: str | int | None = None) -> int:
    """Write the folder and return the step it holds. Raises StoreError if the folder is there and not empty."""
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(folder, "exists and is not empty", "nothing is overwritten", "choose another folder")
    trained = load_trained(storage, name, step)
    # Complete or absent: the folder gets its name once everything is in it.
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as staging, \
                _local_tokenizer_folder(trained) as tokenizer:
            whole = Path(staging) / "model"
            save_pretrained_folder(trained.model.state_dict(), trained.model, tokenizer, whole)
            if target.exists():
                target.rmdir()
            shutil.move(whole, target)
    except OSError as error:
        raise StoreError(folder, f"cannot be written ({error.strerror or error})") from error
    return trained.checkpoint.step


@contextmanager
def local_tokenizer(trained: Trained) -> Iterator[Any]:
    """The run's tokeniser, loaded."""
    from transformers import AutoTokenizer

    with _local_tokenizer_folder(trained) as folder:
        yield AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


@contextmanager
def _local_tokenizer_folder(trained: Trained) -> Iterator[Path]:
    filesystem, path = open_filesystem(trained.tokenizer_folder)
    if isinstance(filesystem, pafs.LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="dray-tokenizer-") as folder:
        pafs.copy_files(path, folder, source_filesystem=filesystem)
        yield Path(folder)
