"""A Hugging Face folder from a run's checkpoint: configuration, safetensors and tokeniser, for
`from_pretrained`.

Its tokeniser gives by its defaults the ids that training gave; where transformers reads it
otherwise, that is said.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dray.corpus.tokenizer_folder import dressed
from dray.corpus.tokenizing import PROBES, load_auto_tokenizer, read_tokenizer_files
from dray.errors import SpecError, StoreError, caught
from dray.models.adapters import as_peft, merge
from dray.models.folder import save_pretrained_folder
from dray.models.source import HUB_SCHEME
from dray.release.trained import Chosen, Trained, Weights, load_trained
from dray.runs import Run
from dray.storage.filesystem import is_local


def export(
    storage: str,
    name: str,
    folder: str,
    *,
    step: str | int | None = None,
    weights: Weights = "trained",
    chosen: Chosen = Chosen(),  # noqa: B008 - frozen
    adapters_alone: bool = False,
    say: Callable[[str], None] | None = None,
) -> int:
    """Write the folder and return the step it holds. Raises StoreError if the folder is there and
    not empty.

    Adapters become a part of the weights, which SpecError says of those that cannot; with
    `adapters_alone` they are written without their base, as peft reads them.

    `say` is told of what transformers' own loading of the folder would do otherwise than training
    did.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(
            folder, "exists and is not empty", "nothing is overwritten", "choose another folder"
        )
    run = Run.open(storage, name)
    if is_local(run.filesystem) and target.resolve().is_relative_to(Path(run.path).resolve()):
        raise StoreError(
            folder,
            f"lies in the folder of run {name!r}",
            "what a run keeps is its own",
            "choose another folder",
        )
    trained = load_trained(storage, name, step, weights, chosen, unpacked=True)
    if adapters_alone and not hasattr(trained.model, "dray_adapted"):
        raise SpecError(
            "--adapters",
            f"run {name!r} has none to write alone",
            "they are written as one run has trained them",
            "leave --adapters out",
        )
    contents = as_peft(trained.model) if adapters_alone else None
    if contents is None and hasattr(trained.model, "dray_adapted"):
        merge(trained.model)
    # Complete or absent: the folder gets its name once everything is in it.
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as staging:
            whole = Path(staging) / "model"
            tokenizes = trained.spec.task.tokenizes
            tokenizer = _tokenizer(trained, staging) if tokenizes else None
            if contents is None:
                state = trained.model.state_dict()
                save_pretrained_folder(state, trained.model, tokenizer, whole)
            else:
                _write_adapters(trained, *contents, tokenizer, whole)
            trained.spec.task.save_processor(str(whole))
            compares = say and tokenizes and contents is None
            for line in _differences(trained, whole) if compares else ():
                say(f"{folder}: {line}")  # type: ignore[misc]
            if target.exists():
                target.rmdir()
            shutil.move(whole, target)
    except OSError as error:
        raise StoreError(folder, f"cannot be written ({error.strerror or error})") from error
    return trained.checkpoint.step


def _write_adapters(
    trained: Trained,
    config: dict[str, Any],
    state: dict[str, Any],
    tokenizer: Path | None,
    folder: Path,
) -> None:
    """Adapters in peft's format, with the tokeniser of their base."""
    from safetensors.torch import save_file

    folder.mkdir()
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    config["base_model_name_or_path"] = (trained.spec.model.path or "").removeprefix(HUB_SCHEME)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _tokenizer(trained: Trained, staging: str) -> Path:
    """The run's tokeniser as an export wants it, as a folder."""
    folder = Path(staging) / "tokenizer"
    folder.mkdir()
    for name, content in dressed(
        read_tokenizer_files(trained.tokenizer_folder), trained.dress
    ).items():
        (folder / name).write_bytes(content)
    return folder


def _differences(trained: Trained, folder: Path) -> Sequence[str]:
    """A line if transformers tokenises otherwise than the corpus was: some classes build their own
    splitting."""

    def tokenise() -> list[list[int]]:
        tokenizer = load_auto_tokenizer(str(folder))
        return [list(tokenizer(text, verbose=False).input_ids) for text in PROBES]

    theirs, error = caught(tokenise)
    if error is not None:  # transformers' own and those of every library it calls
        return [f"AutoTokenizer cannot load its tokeniser ({type(error).__name__}: {error})"]
    if theirs == [trained.encode(text) for text in PROBES]:
        return []
    return [
        "AutoTokenizer tokenises otherwise than training did, since it builds its own class for "
        f"{trained.model.config.model_type}; load it with "
        "transformers.PreTrainedTokenizerFast.from_pretrained"
    ]
