"""A model in this process with what it was trained from: all that predicting and writing by it ask.

Where it lies is its kinds' matter: a checkpoint of a run (`trained.py`), or a folder that was
exported (`exported.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch

from dray.corpus.cleaning import normalize
from dray.corpus.manifest import Manifest
from dray.corpus.tokenizer_folder import Dress
from dray.corpus.tokenizing import (
    Decoder,
    TokenizerInfo,
    describe,
    load_decoder,
    load_encoder,
    read_tokenizer_files,
)
from dray.corpus.tools import Tools
from dray.models.config import longest_row
from dray.spec import Spec
from dray.tasks import Task


class Opened(ABC):
    """What both have."""

    spec: Spec
    """Of the run that trained it."""
    manifest: Manifest
    """What a model must know of its corpus."""
    corpus: str
    """The folder of its rows; empty where there is none."""
    model: Any
    """A transformers model in evaluation mode."""

    @property
    @abstractmethod
    def where(self) -> str:
        """What an error is of."""

    @property
    @abstractmethod
    def tokenizer_folder(self) -> str:
        """Where its tokeniser lies."""

    @cached_property
    def tokenizer(self) -> TokenizerInfo:
        """What is known of the tokeniser, by the encoder whose ids gigatoken's equal."""
        manifest, dress = self.manifest, self.dress
        return TokenizerInfo(
            manifest.vocab_size,
            manifest.pad_token_id,
            manifest.eos_token_id,
            "transformers" if manifest.encoder == "transformers" else "tokenizers",
            dress.prefix,
            dress.suffix,
            manifest.middle,
            manifest.mask_token_id,
        )

    @property
    def tools(self) -> Tools:
        """What its task encodes documents with."""
        return Tools(self.tokenizer_folder, self.tokenizer, self.manifest.sequence_tokens)

    @cached_property
    def task(self) -> Task:
        """What was learnt, on the run's own corpus and with its tokeniser."""
        return self.spec.task.on(  # type: ignore[no-any-return]
            self.manifest, self.spec.model.num_labels, Decoder(self.tokenizer_folder)
        )

    @property
    def longest_row(self) -> int | None:
        """Tokens that the model takes at once; None if it counts no positions."""
        return longest_row(self.model.config)

    @cached_property
    def dress(self) -> Dress:
        """What training did to a text, for texts that are given to the model now: a prompt is not
        ended."""
        task, manifest = self.spec.task, self.manifest
        packs = task.packs
        prefix, suffix = manifest.prefix, manifest.suffix
        if prefix is None or suffix is None:  # a corpus made before its manifest said so
            info = describe(read_tokenizer_files(self.tokenizer_folder), [], needs_end=packs)
            prefix, suffix = () if packs else info.prefix, info.suffix
        longest = self.longest_row if packs else None
        return Dress(
            prefix,
            () if packs or (task.generates and task.continues) else suffix,
            manifest.pad_token_id,
            manifest.eos_token_id,
            self.spec.data.cleaning.normalize,
            longest or self.spec.data.sequence_tokens,
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text, as training gave them to the model."""
        encoder = load_encoder(self.tokenizer_folder, self.tokenizer.encoder)
        ids, _ = encoder.encode(pa.array([self.normal(text)], pa.large_string()))
        return [*self.dress.prefix, *ids.tolist(), *self.dress.suffix]

    def normal(self, text: str) -> str:
        """A text in the normal form of those that were trained on."""
        (found,) = normalize(pa.array([text], pa.large_string()), self.dress.normalize).to_pylist()
        return str(found)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids as text, without special tokens."""
        return Decoder(self.tokenizer_folder)(ids)

    def decode_token(self, token: int) -> str:
        """One id as text; a special token by its name."""
        decoder = load_decoder(self.tokenizer_folder)
        return str(decoder.decode([token], skip_special_tokens=False))

    def move_to_device(self) -> torch.device:
        """Put the model on the GPU if there is one with room for it and its activations, and say
        where it is now."""
        device = torch.device("cpu")
        if torch.cuda.is_available() and not getattr(self.model, "dray_on_cpu", False):
            num_bytes = sum(
                tensor.numel() * tensor.element_size() for tensor in self.model.parameters()
            )
            free, _ = torch.cuda.mem_get_info()
            device = torch.device("cuda" if num_bytes * 5 // 4 < free else "cpu")
        self.model.to(device)
        return device
