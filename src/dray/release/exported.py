"""A model read back from a Hugging Face folder that `dray export` wrote: it predicts and writes as
its run does.

What transformers does not keep lies beside it: the spec, and what a model must know of its corpus.
A folder may come from anybody: nothing in it is unpickled, and no code in it is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dray.corpus.manifest import EXPORTED_MANIFEST, Manifest, Split
from dray.errors import SpecError, StoreError, translated
from dray.release.opened import Opened
from dray.spec import BadYaml, Spec, dump_task, make_spec, read_yaml

SPEC, CORPUS = "dray-spec.yaml", EXPORTED_MANIFEST


@dataclass(frozen=True)
class Exported(Opened):
    """One of them."""

    folder: str
    spec: Spec
    manifest: Manifest
    corpus: str = ""

    @property
    def where(self) -> str:
        return self.folder

    @property
    def tokenizer_folder(self) -> str:
        return self.folder

    @cached_property
    def model(self) -> Any:
        """Read when it is first asked for. Raises StoreError."""
        model = load_folder(self.folder, self.spec.task.head.auto_class)
        return _with_added(model, self.spec, self.folder) if self.spec.task.adds else model


def write_origin(spec: Spec, manifest: Manifest, folder: Path) -> None:
    """What `open_exported` reads of an export, beside what transformers does: what was learnt, and
    how a record is read. Neither rows, nor where anything lay."""
    tree = spec.model_dump(mode="json")
    data = {key: tree["data"][key] for key in ("sequence_tokens", "cleaning")}
    data["train"] = [_without_places(source) for source in tree["data"]["train"]]
    labels = spec.model.num_labels
    kept = {key: tree[key] for key in ("name", "duration")} | {
        "task": dump_task(spec.task.reading({name: name for name in spec.task.files})),
        "data": data,
        "model": {"path": ".", **({} if labels is None else {"num_labels": labels})},
        **({"tokenizer": {"path": "."}} if spec.task.tokenizes else {}),
    }
    train = Split(sources=(), documents_by_label=manifest.train.documents_by_label)
    bare = manifest.model_copy(update={"train": train, "validation": None})
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    (folder / SPEC).write_text(text, encoding="utf-8")
    (folder / CORPUS).write_text(bare.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _without_places(source: Mapping[str, Any]) -> dict[str, Any]:
    """A source with the names of its files alone."""

    def bare(path: Any) -> Any:
        paths = [one.rstrip("/").rpartition("/")[2] or "data" for one in as_list(path)]
        return paths[0] if isinstance(path, str) else paths

    def as_list(path: Any) -> list[str]:
        return [path] if isinstance(path, str) else list(path)

    found = {**source, "path": bare(source["path"])}
    gathered = found.get("gather")
    if gathered and gathered.get("names"):
        names = {**gathered["names"], "path": bare(gathered["names"]["path"])}
        found["gather"] = {**gathered, "names": names}
    return found


def open_exported(folder: str) -> Exported | None:
    """The model of a folder; none where it does not say what was learnt. Its weights are not read
    yet. Raises StoreError for one that says it wrongly."""
    place = Path(folder)
    if not (place / SPEC).is_file():
        return None
    try:
        tree = read_yaml((place / SPEC).read_text(encoding="utf-8"))
        spec = make_spec(tree, str(place / SPEC), kept=True)
        content = json.loads((place / CORPUS).read_text(encoding="utf-8"))
        manifest = Manifest.model_validate(content)
    except (OSError, ValueError, BadYaml, SpecError, RecursionError) as error:
        raise StoreError(
            folder,
            f"does not say what was learnt ({str(error).splitlines()[0][:200]})",
            f"{SPEC} and {CORPUS} do in an exported folder",
            "`dray export` makes another one",
        ) from error
    return Exported(folder, spec, manifest)


def _with_added(model: Any, spec: Spec, folder: str) -> Any:
    """A folder's model with what its task has added to it, which transformers passes by. Raises
    StoreError."""
    import torch

    from dray.models.build import fit_to_train
    from dray.models.folder import FolderWeights
    from dray.models.freezing import is_base

    fit_to_train(model, spec)
    added = {name: p for name, p in model.named_parameters() if not is_base(p)}
    with ExitStack() as opened, torch.no_grad():
        stored = {one.target: one for one in FolderWeights(Path(folder)).open(model, opened)}
        for name, parameter in added.items():
            if name not in stored or stored[name].shape != tuple(parameter.shape):
                raise StoreError(
                    folder, f"lacks {name}, or has another shape of it", "an export holds it whole"
                )
            parameter.copy_(stored[name].read())
    return model.eval()


def load_folder(folder: str, auto_class: str) -> Any:
    """A folder's model by a class of transformers': in fp32 on CPUs, as it is stored on a GPU.
    Raises StoreError."""
    import torch
    import transformers

    def refused(error: Exception) -> StoreError:
        return StoreError(folder, f"cannot be loaded ({str(error).splitlines()[0][:200]})")

    with translated(refused):
        model = getattr(transformers, auto_class).from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype="auto" if torch.cuda.is_available() else torch.float32,
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
