"""A Hugging Face folder: configuration, safetensors and tokeniser, for `from_pretrained`; or
adapters alone, for peft.

Its tokeniser gives by its defaults the ids that training gave; where transformers reads it
otherwise, that is said.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dray.corpus.tokenizing import PROBES, load_auto_tokenizer
from dray.errors import SpecError, caught
from dray.models.adapters import as_peft
from dray.models.folder import save_pretrained_folder
from dray.models.source import HUB_SCHEME
from dray.release.export.forms import Check, Form, Options, Written
from dray.release.export.loading import adapters_code, folder_code
from dray.release.trained import Trained


def _check(trained: Trained, options: Options) -> None:
    if options.adapters_alone and trained.adapters is None:
        raise SpecError(
            "--adapters",
            f"run {trained.run.name!r} has none to write alone",
            "they are written as one run has trained them",
            "leave --adapters out",
        )


def _write(trained: Trained, folder: Path, options: Options) -> Written:
    if options.adapters_alone:
        config, state = as_peft(trained.model)
        _write_adapters(trained, config, state, folder)
        return Written((), "peft", adapters_code(trained))
    save_pretrained_folder(trained.model.state_dict(), trained.model, None, folder / "model")
    for path in (folder / "model").iterdir():
        path.rename(folder / path.name)
    (folder / "model").rmdir()
    differing = tuple(differences(trained, folder)) if trained.spec.task.tokenizes else ()
    remarks = (*differing, *trained.spec.task.remarks)
    checks = (Check("AutoTokenizer's ids against training's", details={"same": not differing}),)
    return Written(
        checks if trained.spec.task.tokenizes else (),
        "transformers",
        folder_code(trained),
        remarks,
    )


FORM = Form(_check, _write, 1.0)


def _write_adapters(
    trained: Trained, config: dict[str, Any], state: dict[str, Any], folder: Path
) -> None:
    """Adapters in peft's format."""
    from safetensors.torch import save_file

    config["base_model_name_or_path"] = (trained.spec.model.path or "").removeprefix(HUB_SCHEME)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def differences(trained: Trained, folder: Path) -> Sequence[str]:
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
