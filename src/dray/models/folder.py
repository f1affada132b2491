"""Hugging Face folders: their tensors as weights to start from, and models written as such.

Reading opens headers, and a tensor's values when they are asked for. Writing makes safetensors
shards, and a folder appears whole or not at all.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dray.errors import SpecError, StoreError
from dray.models.config import weight_files
from dray.models.weights import Stored, shapes_of

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class FolderWeights:
    """The tensors of a Hugging Face folder."""

    folder: Path
    key: str = "model.path"

    @property
    def name(self) -> str:
        return str(self.folder)

    def config(self) -> Mapping[str, Any]:
        """config.json as it is written; empty where none can be read, which whoever needs it has
        refused before."""
        try:
            tree = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return tree if isinstance(tree, dict) else {}

    def open(self, model: Any, opened: ExitStack, *, headers_only: bool = False) -> list[Stored]:
        """The tensors under the names that transformers' own loading gives them; `headers_only`:
        none of a folder whose tensors it must merge or split. Raises SpecError."""
        return _open_stored(model, self.folder, opened, convert=not headers_only)


def save_pretrained_folder(
    state: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    model: Any,
    tokenizer_folder: str | Path | None,
    target: str | Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write a folder that `AutoModel….from_pretrained` loads, and return its weight files.

    `state` gives full tensors by name: pairs, consumed one shard at a time, with tied tensors once;
    or a mapping. Of `model` only the configuration is read, and may be given instead. The folder
    appears whole or not at all. Raises StoreError if `target` holds something already.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(
            str(target), "exists already", "an export never overwrites", "name a new folder"
        )
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        if tokenizer_folder is not None:
            shutil.copytree(tokenizer_folder, partial, dirs_exist_ok=True)
        names = _write_shards(
            _once(state) if isinstance(state, Mapping) else state, partial, max_shard_bytes
        )
        _write_config(getattr(model, "config", model), partial)
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise StoreError(str(target), f"cannot be written ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [target / name for name in names]


def _open_stored(
    model: Any, folder: Path, opened: ExitStack, *, convert: bool = True
) -> list[Stored]:
    from safetensors import SafetensorError, safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [
        transform for transform in transforms if not isinstance(transform, WeightConverter)
    ]
    known = dict.fromkeys(shapes_of(model), True)
    stored: list[Stored] = []
    for file in weight_files(folder):
        try:
            handle = opened.enter_context(safe_open(file, "pt"))
        except (SafetensorError, OSError) as error:
            raise SpecError(
                "model.path", f"{file} cannot be read ({error})", "a safetensors file is wanted"
            ) from error
        for key in sorted(handle.keys()):
            name, converter = rename_source_key(
                key, renamings, converters, model.base_model_prefix, known
            )
            if converter is not None and key not in known:
                return _converted(model, folder) if convert else []
            shape = tuple(handle.get_slice(key).get_shape())
            target = key if key in known else name
            stored.append(Stored(target, key, shape, partial(handle.get_tensor, key)))
    return stored


def _converted(model: Any, folder: Path) -> list[Stored]:
    """Folders whose tensors must be merged or split (mixtures' experts): transformers does it,
    whole and in memory."""
    other, report = type(model).from_pretrained(
        folder,
        config=model.config,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    state = {
        name: tensor
        for name, tensor in other.state_dict().items()
        if name not in set(report["missing_keys"])
    }
    return [
        Stored(name, name, tuple(tensor.shape), partial(torch.clone, tensor))
        for name, tensor in state.items()
    ]


def _once(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A model's state without the second names of tied tensors, which safetensors refuses and
    loading ties anew."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if place not in seen or not tensor.numel():
            seen.add(place)
            yield name, tensor


def _write_shards(
    state: Iterable[tuple[str, Tensor]], folder: Path, max_shard_bytes: int
) -> list[str]:
    """Fill one shard after the other; they are named once their number is known."""
    from safetensors.torch import save_file

    shards: list[dict[str, int]] = []
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        path = folder / f"{len(shards)}.shard"
        path.touch()
        mode = (
            path.stat().st_mode
        )  # as others' files have it: safetensors writes one that its user alone can read
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(mode)
        shards.append(
            {name: tensor.numel() * tensor.element_size() for name, tensor in shard.items()}
        )
        shard.clear()

    held_bytes = 0
    for name, tensor in state:
        num_bytes = tensor.numel() * tensor.element_size()
        if shard and held_bytes + num_bytes > max_shard_bytes:
            flush()
            held_bytes = 0
        shard[name] = tensor.detach().cpu().contiguous()
        held_bytes += num_bytes
    if shard or not shards:
        flush()
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [
            f"model-{index:05d}-of-{len(shards):05d}.safetensors"
            for index in range(1, len(shards) + 1)
        ]
        total = sum(sum(sizes.values()) for sizes in shards)
        weight_map = {
            name: file for file, sizes in zip(names, shards, strict=True) for name in sizes
        }
        index_text = json.dumps(
            {"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True
        )
        (folder / "model.safetensors.index.json").write_text(index_text + "\n", encoding="utf-8")
    for place, name in enumerate(names):
        (folder / f"{place}.shard").rename(folder / name)
    return names


def _write_config(config: Any, folder: Path) -> None:
    """The configuration as an export wants it: with the cache for generation that training goes
    without."""
    config = copy.deepcopy(config)
    if hasattr(config, "use_cache"):
        config.use_cache = True
    config.save_pretrained(folder)
