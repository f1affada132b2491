"""A Hugging Face folder from a run's checkpoint: configuration, safetensors and tokeniser, for
`from_pretrained`.

Its tokeniser gives by its defaults the ids that training gave; where transformers reads it
otherwise, that is said.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from dray.corpus.tokenizer_folder import dressed
from dray.corpus.tokenizing import PROBES, load_auto_tokenizer, read_tokenizer_files
from dray.errors import StoreError, caught
from dray.models.folder import save_pretrained_folder
from dray.release.trained import Trained, Weights, load_trained
from dray.runs import Run
from dray.storage.filesystem import is_local


def export(
    storage: str,
    name: str,
    folder: str,
    *,
    step: str | int | None = None,
    weights: Weights = "trained",
    say: Callable[[str], None] | None = None,
) -> int:
    """Write the folder and return the step it holds. Raises StoreError if the folder is there and
    not empty.

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
    trained = load_trained(storage, name, step, weights)
    # Complete or absent: the folder gets its name once everything is in it.
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as staging:
            whole = Path(staging) / "model"
            save_pretrained_folder(
                trained.model.state_dict(),
                trained.model,
                _tokenizer(trained, staging) if trained.spec.task.tokenizes else None,
                whole,
            )
            trained.spec.task.save_processor(str(whole))
            compares = say and trained.spec.task.tokenizes
            for line in _differences(trained, whole) if compares else ():
                say(f"{folder}: {line}")  # type: ignore[misc]
            if target.exists():
                target.rmdir()
            shutil.move(whole, target)
    except OSError as error:
        raise StoreError(folder, f"cannot be written ({error.strerror or error})") from error
    return trained.checkpoint.step


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
