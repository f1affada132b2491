"""What is served: a run of a storage at a step, or an exported folder, as a model that answers.

A model answers to what its task says (`Task.serves`, whether it writes and predicts), never by its
name; a folder that does not say what was learnt, and that transformers loads as a causal language
model, writes. Nothing is unpickled:
weights are verified safetensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dray.corpus.tokenizing import Decoder, describe, read_tokenizer_files
from dray.corpus.tools import Tools
from dray.errors import SpecError, StoreError
from dray.models.config import longest_row
from dray.release.export.manifest import MANIFEST, is_export, verify_folder
from dray.release.exported import SPEC, load_folder, open_exported
from dray.release.opened import Opened
from dray.release.predict import Predictor
from dray.release.trained import open_trained
from dray.serve.pinning import check_pinned
from dray.serve.served import Served


@dataclass
class Loaded:
    """A model in this process."""

    served: Served
    routes: tuple[str, ...]
    """What it answers to: completions, chat, embeddings, classify, extract, predict."""
    predictor: Predictor | None
    writer: Writer | None
    told: dict[str, Any] = field(default_factory=dict)
    """What `/v1/models` says of it, besides."""


class Writer:
    """A causal language model with its tokeniser."""

    def __init__(
        self,
        model: Any,
        tools: Tools,
        folder: str,
        *,
        ends: tuple[int, ...],
        normal: Callable[[str], str] = str,
    ) -> None:
        self.model, self.tools, self.normal = model, tools, normal
        self.decode = Decoder(folder)
        self._ends = ends
        self.longest = longest_row(model.config)

    @property
    def vocab_size(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer: those that the model's own settings name, the tokeniser's end,
        and what ends a turn by the chat template."""
        own = [self.model.config, getattr(self.model, "generation_config", None)]
        found = {*self._ends}
        for settings in own:
            ids = getattr(settings, "eos_token_id", None)
            found |= {ids} if isinstance(ids, int) else {*(ids or ())}
        return frozenset(found | self._turn_ends())

    @cached_property
    def unknown(self) -> int | None:
        """The token that stands for what the vocabulary lacks."""
        return self.tools.unknown

    @property
    def converses(self) -> bool:
        return self.tools.chat_template is not None

    def _turn_ends(self) -> set[int]:
        from dray.tasks.parts.chat import Conversation, NoConversation, render

        if not self.converses:
            return set()
        asked = {"role": "user", "content": "a"}
        answered = {"role": "assistant", "content": "b"}
        try:
            before = render(Conversation((asked,)), self.tools, asks=True)
            after = render(Conversation((asked, answered)), self.tools)
        except NoConversation:
            return set()
        rest = after.removeprefix(before).lstrip().removeprefix("b").lstrip()
        marks = [mark for mark in self.tools.special if mark and rest.startswith(mark)]
        if not (after.startswith(before) and marks):
            return set()
        ((ids, _),) = self.tools.encode_words([max(marks, key=len)])
        return {*ids} if len(ids) == 1 else set()


def load_served(served: Served) -> Loaded:
    """Read it. Raises UserError for what is not there, is damaged, or answers nothing."""
    check_pinned(served)
    if served.folder is not None and is_export(served.folder):
        report = verify_folder(served.folder)
        if not report.ok:
            raise StoreError(
                served.folder,
                report.problems[0],
                "an export is served as it was written",
                "`dray export` makes another one",
            )
    elif served.folder is not None and os.path.lexists(os.path.join(served.folder, SPEC)):
        raise StoreError(
            served.folder,
            f"was exported by dray, and its {MANIFEST} is gone",
            "an export is served once every file is what that lists",
            "`dray export` makes another one",
        )
    return _load_folder(served) if served.folder is not None else _load_run(served)


def _load_run(served: Served) -> Loaded:
    trained = open_trained(str(served.storage), str(served.run), served.step, served.weights)
    return _load_opened(served, trained, trained.checkpoint.step)


def _load_opened(served: Served, opened: Opened, step: int | None) -> Loaded:
    """A model that says what was learnt. Raises SpecError where that answers nothing."""
    task, config = opened.task, opened.model.config
    writes = task.generates and not getattr(config, "is_encoder_decoder", False)
    writer = _opened_writer(opened) if writes else None
    predictor = Predictor(opened) if task.predicts else None
    if writer is None and predictor is None:
        rule = "models that write or predict can be served"
        raise SpecError(
            opened.where, f"its task is {task.name}", rule, "`dray evaluate` measures it"
        )
    routes = (
        *(["completions"] if writer else []),
        *(["chat"] if writer and writer.converses else []),
        *(task.serves if predictor else ()),
        *(["predict"] if predictor else []),
    )
    told = {"run": served.run, "step": step, "task": task.name}
    return Loaded(served, routes, predictor, writer, told)


def _opened_writer(opened: Opened) -> Writer:
    end = opened.manifest.eos_token_id
    opened.move_to_device()
    ends = () if end is None else (end,)
    return Writer(
        opened.model, opened.tools, opened.tokenizer_folder, ends=ends, normal=opened.normal
    )


def _load_folder(served: Served) -> Loaded:
    """An exported folder, or any of transformers' with a causal language model. Raises SpecError
    for another one, StoreError for none."""
    folder = str(served.folder)
    try:
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        names = [str(name) for name in config.get("architectures") or []]
    except (OSError, ValueError, AttributeError) as error:
        raise StoreError(
            folder,
            "holds no model",
            "an exported folder has a config.json, safetensors and a tokeniser",
            "`dray export` makes one",
        ) from error
    if (exported := open_exported(folder)) is not None:
        return _load_opened(served, exported, None)
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        raise SpecError(
            folder,
            f"is a {', '.join(names) or 'model without a head'}",
            "a folder that does not say what was learnt is served if its model writes",
            "serve the run, or a folder that `dray export` has written",
        )
    model = load_folder(folder, "AutoModelForCausalLM")
    info = describe(read_tokenizer_files(folder), [], needs_end=True)
    tools = Tools(folder, info, longest_row(model.config) or 0)
    ends = () if info.eos_token_id is None else (info.eos_token_id,)
    writer = Writer(model, tools, folder, ends=ends)
    routes = ("completions", *(["chat"] if writer.converses else []))
    return Loaded(served, routes, None, writer, {"run": None, "step": None})
