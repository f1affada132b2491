"""Hugging Face folders: weights read into a model one tensor at a time, and written as safetensors
shards.

Reading keeps at most one tensor in memory besides the model, also under ZeRO-3. It refuses folders
that lack a part of the backbone or hold it in other shapes; a new head is initialised, and what was
left over is reported.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dray.errors import SpecError, StoreError
from dray.models.config import weight_files
from dray.models.initialize import Gathering, draws_here, initialize_weights, restore_rotary_buffers

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class LoadReport:
    """What became of a folder's weights: names in the model, names in the folder."""

    folder: str
    num_taken: int
    not_taken: tuple[str, ...]
    initialized: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{self.num_taken} tensors taken from {self.folder}"]
        if self.not_taken:
            parts.append(f"left there: {', '.join(self.not_taken)}")
        if self.initialized:
            parts.append(f"initialised anew: {', '.join(self.initialized)}")
        return "; ".join(parts)


@dataclass(frozen=True)
class _Stored:
    """One tensor in a folder: its name there, its full shape, and how to read it."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def load_folder(model: Any, folder: Path, seed: int, gathering: Gathering) -> LoadReport:
    """Copy a folder's weights into a constructed model. Raises SpecError before anything was
    copied.

    Parameters that the folder does not have (a new head) get their initial weights of `seed`; so
    does a head whose classes are the model's in another order.
    """
    with ExitStack() as opened:
        found, not_taken, missing = _chosen(model, folder, _open_stored(model, folder, opened))
        if missing:
            initialize_weights(model, seed, gathering)
        else:
            restore_rotary_buffers(model)
        with torch.no_grad():
            for name, stored in found.items():
                _copy(model, name, stored, gathering)
    model.tie_weights()
    return LoadReport(str(folder), len(found), tuple(sorted(not_taken)), missing)


def check_folder(model: Any, folder: Path) -> None:
    """Raise SpecError for a folder whose weights are not those of the model, which may lie on the
    meta device. Reads headers alone; where transformers must merge tensors it takes them as they
    are."""
    with ExitStack() as opened:
        stored = _open_stored(model, folder, opened, convert=False)
        if stored:
            _chosen(model, folder, stored)


def _chosen(
    model: Any, folder: Path, stored: list[tuple[str, _Stored]]
) -> tuple[dict[str, _Stored], list[str], tuple[str, ...]]:
    """(the tensors to take by their names in the model, the names of those to leave, the names that
    need initial weights). Raises SpecError."""
    targets = _targets(model)
    found, not_taken = _matched(model, targets, stored)
    if _classes_moved(folder, model.config):
        heads = [name for name in found if not name.startswith(f"{model.base_model_prefix}.")]
        not_taken += [found.pop(name).name for name in heads]
    tied = _tied_groups(model, targets)
    for source in {members[0] for members in tied.values()} - set(found):
        for member in tied[source]:  # stored under the name that is tied to, not the one that ties
            if member in found:
                found[source] = found.pop(member)
    taken = {member for name in found for member in tied.get(name, (name,))}
    missing = tuple(name for name in targets if name not in taken)
    _check_backbone(model, folder, missing, len(targets))
    return found, not_taken, missing


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


def _targets(model: Any) -> dict[str, tuple[int, ...]]:
    """Full shapes of everything that a folder stores: parameters under all their names, and
    persistent buffers."""
    shapes = {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if leaf not in model.get_submodule(owner)._non_persistent_buffers_set:
            shapes[name] = tuple(buffer.shape)
    return shapes


def _tied_groups(model: Any, targets: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """For each tied parameter the names that share its values once the model is tied."""
    pairs = [
        (target, source)
        for target, source in model.all_tied_weights_keys.items()
        if target in targets
    ]
    groups: dict[str, tuple[str, ...]] = {}
    for source in dict.fromkeys(source for _, source in pairs):
        members = tuple(dict.fromkeys((source, *(t for t, s in pairs if s == source))))
        groups |= dict.fromkeys(members, members)
    return groups


def _open_stored(
    model: Any, folder: Path, opened: ExitStack, *, convert: bool = True
) -> list[tuple[str, _Stored]]:
    """The folder's tensors under the names that transformers' own loading would give them. Without
    `convert` none of a folder whose tensors must be merged or split."""
    from safetensors import SafetensorError, safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [
        transform for transform in transforms if not isinstance(transform, WeightConverter)
    ]
    known = dict.fromkeys(_targets(model), True)
    stored: list[tuple[str, _Stored]] = []
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
            stored.append(
                (
                    key if key in known else name,
                    _Stored(key, shape, partial(handle.get_tensor, key)),
                )
            )
    return stored


def _converted(model: Any, folder: Path) -> list[tuple[str, _Stored]]:
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
        (name, _Stored(name, tuple(t.shape), partial(torch.clone, t))) for name, t in state.items()
    ]


def _matched(
    model: Any, targets: Mapping[str, tuple[int, ...]], stored: list[tuple[str, _Stored]]
) -> tuple[dict[str, _Stored], list[str]]:
    """The tensors to take, by their names in the model, and the names of those to leave. Raises
    SpecError."""
    found: dict[str, _Stored] = {}
    not_taken: list[str] = []
    for name, tensor in stored:
        if name not in targets:
            not_taken.append(tensor.name)
        elif targets[name] == tensor.shape:
            found[name] = tensor
        elif _in_backbone(model, name):
            raise SpecError(
                "model.path",
                f"{tensor.name} has shape {list(tensor.shape)}, not {list(targets[name])}",
                "weights and config.json must agree",
            )
        else:
            not_taken.append(tensor.name)
    return found, not_taken


def _classes_moved(folder: Path, config: Any) -> bool:
    """Whether the folder's classes have the names of the model's, but in another order."""
    try:
        named = (
            json.loads((folder / "config.json").read_text(encoding="utf-8")).get("id2label") or {}
        )
        theirs = [str(named[key]).casefold() for key in sorted(named, key=int)]
    except (OSError, ValueError, AttributeError):
        return False  # a configuration that is none has been refused before
    ours = [str(config.id2label[index]).casefold() for index in sorted(config.id2label)]
    return theirs != ours and sorted(theirs) == sorted(ours)


def _in_backbone(model: Any, name: str) -> bool:
    # Poolers are part of a head in all but name: language models are saved without.
    return name.startswith(f"{model.base_model_prefix}.") and "pooler" not in name


def _check_backbone(model: Any, folder: Path, missing: tuple[str, ...], num_targets: int) -> None:
    lacking = [name for name in missing if _in_backbone(model, name)]
    if lacking:
        raise SpecError(
            "model.path",
            f"{folder} lacks {len(lacking)} of {num_targets} tensors, such as {lacking[0]}",
            "a folder must hold the whole backbone of its config.json",
        )


def _copy(model: Any, name: str, stored: _Stored, gathering: Gathering) -> None:
    owner_name, _, leaf = name.rpartition(".")
    target = getattr(model.get_submodule(owner_name), leaf)
    with gathering([target]) if isinstance(target, torch.nn.Parameter) else ExitStack():
        if draws_here(target):
            target.data.copy_(stored.read())


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
