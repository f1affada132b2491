"""Texts of training rows in the words that come back from another language: two models that answer
texts, asked once of every row, so that training needs neither.

A shard is translated by a task of Ray Data's like every other piece of a preparation. Refuses
models that are gone, are not those that were pinned, or write no answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from dray.corpus.encoded import GIVEN_TEXT, PARAPHRASE, as_bytes
from dray.corpus.manifest import Shard, load_run_manifest
from dray.corpus.packing import Varying
from dray.corpus.parts import Preparation, save_record
from dray.corpus.shards import rewrite_shard
from dray.corpus.telling import weights_bytes
from dray.corpus.tokenizing import (
    TokenizerInfo,
    describe,
    load_decoder,
    load_encoder,
    read_tokenizer_files,
)
from dray.corpus.tools import tokenizer_of
from dray.errors import SpecError, caught, first_line
from dray.models.source import find_pretrained
from dray.origin import Origin, RunWeights, find_run_weights, open_weights
from dray.processes.imports import whole
from dray.runs import Run
from dray.spec import BackTranslation, Spec, Translator
from dray.storage.filesystem import share_filesystem
from dray.tasks.rows import SEPARATOR

TEXTS_AT_ONCE = 16


@dataclass(frozen=True)
class Translators:
    """The two models, pinned."""

    there: Origin
    back: Origin
    max_tokens: int

    @property
    def memory_bytes(self) -> int:
        """About what both take in fp32, by what their weights take on storage."""
        return weights_bytes(self.there) + weights_bytes(self.back)

    @property
    def digest(self) -> str:
        """What they are known by, wherever they lie: it belongs to the corpus' key."""
        told = json.dumps([self.there.digest, self.back.digest, self.max_tokens])
        return hashlib.sha256(told.encode()).hexdigest()


def find_translators(spec: Spec, storage: str) -> Translators | None:
    """Those of the spec; None: it asks for none. Raises UserError where one is gone, or is of a run
    that answers no texts."""
    settings = _settings_of(spec)
    if settings is None:
        return None
    there, back = (origin.pinned() for origin in find_origins(spec, storage))
    return Translators(there, back, settings.max_tokens)


def find_origins(spec: Spec, storage: str) -> list[Origin]:
    """Where both models lie, there and back; none, where the spec asks for none. Nothing of them is
    read. Raises UserError likewise."""
    settings = _settings_of(spec)
    if settings is None:
        return []
    return [
        _find(f"augmentation.back_translation.{side}", getattr(settings, side), storage)
        for side in ("there", "back")
    ]


def _settings_of(spec: Spec) -> BackTranslation | None:
    return None if spec.augmentation is None else spec.augmentation.back_translation


def _find(where: str, translator: Translator, storage: str) -> Origin:
    if translator.path is not None:
        return find_pretrained(translator.path)
    name = str(translator.run)
    task = Run.open(storage, name).spec().task if Run.find(storage, name) else None
    if task is not None and not (task.generates and not task.continues):
        raise SpecError(
            f"{where}.run = {name}",
            f"its task is {task.name}, whose models do not answer texts",
            "a translator does",
            "name a run of the task seq2seq",
        )
    return find_run_weights(storage, name, "newest", f"{where}.run")


def translate_shard(job: Preparation, item: tuple[int, Shard]) -> dict[str, Any]:
    """Write a shard of training rows anew, with their texts in other words. Returns its record."""
    index, shard = item
    translators: Translators = job.translators
    models = [open_translator(origin) for origin in (translators.there, translators.back)]

    num_empty = 0

    def tell(rows: pa.Table) -> dict[str, Any]:
        lists = rows.column(GIVEN_TEXT.name).combine_chunks()
        texts = [bytes(one.values.to_numpy().tobytes()).decode() for one in lists]
        for model in models:
            texts = translate(model, texts, translators.max_tokens)
        nonlocal num_empty
        num_empty += sum(not text for text in texts)
        found = as_bytes(pa.array(texts, pa.large_string()))
        return {PARAPHRASE.name: Varying.of(found, PARAPHRASE.dtype)}

    place = share_filesystem(job.folder)
    written = rewrite_shard(*place, shard, job.group_rows, job.columns, tell)
    record = {"shard": written.model_dump(), "num_untranslated": num_empty}
    return save_record(job, "translated", index, record)


def translate(model: LoadedTranslator, texts: Sequence[str], max_tokens: int) -> list[str]:
    """What a model answers to each text, to each part of a pair by itself. An empty text, and one
    of which a part is too long or gets no answer, gives an empty one."""
    parts = [part for text in texts for part in (text.split(SEPARATOR) if text else ())]
    answers = iter(model.answer(parts, max_tokens))
    found = []
    for text in texts:
        own = [next(answers) for _ in (text.split(SEPARATOR) if text else ())]
        found.append(SEPARATOR.join(own) if all(part.strip() for part in own) else "")
    return found


@dataclass(frozen=True)
class LoadedTranslator:
    """A model in this process that answers texts."""

    model: Any
    folder: str
    """Of its tokeniser."""
    info: TokenizerInfo
    alone: bool
    """Whether it is a decoder alone, which is asked by a text with what stands between two."""
    most: int | None
    """Tokens that it takes at once."""

    def answer(self, texts: Sequence[str], max_tokens: int) -> list[str]:
        """Its likeliest answers; empty for a text that it has no room for."""
        encoded = load_encoder(self.folder, self.info.encoder).encode(
            pa.array(texts, pa.large_string())
        )
        prompts = []
        for ids in np.split(encoded[0], np.cumsum(encoded[1])[:-1]):
            end = self.info.middle if self.alone else self.info.suffix
            prompts.append([*self.info.prefix, *ids.tolist(), *end])
        found = [""] * len(texts)
        fits = [place for place, ids in enumerate(prompts) if len(ids) <= (self.most or len(ids))]
        fits.sort(key=lambda place: len(prompts[place]))
        for start in range(0, len(fits), TEXTS_AT_ONCE):
            places = fits[start : start + TEXTS_AT_ONCE]
            some = self._write([prompts[place] for place in places], max_tokens)
            for place, text in zip(places, some, strict=True):
                found[place] = text
        return found

    def _write(self, prompts: Sequence[list[int]], max_tokens: int) -> list[str]:
        import torch

        from dray.tasks.parts.writing import pad_before, pad_behind, write

        rows = [torch.tensor(ids, dtype=torch.int64) for ids in prompts]
        pad = self.info.pad_token_id
        if self.alone:
            ids, mask = pad_before(rows, pad or 0)
        else:
            padded = pad_behind(rows, -1)
            mask = (padded >= 0).long()
            ids = padded.masked_fill(mask == 0, pad or 0)
        written = write(self.model, ids, mask, most_tokens=max_tokens, pad_token_id=pad)
        decoder = load_decoder(self.folder)
        return [str(decoder.decode(row, skip_special_tokens=True)) for row in written.tolist()]


@lru_cache(maxsize=2)
def open_translator(origin: Origin) -> LoadedTranslator:
    """A translator in this process, which asks it about many shards. Raises UserError."""
    from dray.models.config import longest_row
    from dray.processes.heap import prepare_process

    prepare_process(1)
    origin.check()
    if isinstance(origin, RunWeights):
        return _of_run(origin, longest_row)
    folder = str(origin.folder())
    model, error = caught(
        lambda: whole("transformers").AutoModelForSeq2SeqLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    )
    if model is None:
        raise SpecError(
            "augmentation.back_translation",
            f"{folder} is no translator ({first_line(error) if error else 'nothing'})",
            "it is an encoder-decoder of transformers with its tokeniser",
        )
    files = read_tokenizer_files(folder)
    info = describe(files, [], needs_end=False)
    return LoadedTranslator(model.eval(), folder, info, False, longest_row(model.config))


def _of_run(origin: RunWeights, longest_row: Any) -> LoadedTranslator:
    from dray.models.build import build_model, sizes_by

    run = Run.open(origin.storage, origin.run)
    spec, manifest = run.spec(), load_run_manifest(run)
    task = spec.task.on(manifest, spec.model.num_labels)
    # Whatever that run began with, its model is that of its own checkpoint.
    begun = spec.model_copy(update={"model": spec.model.model_copy(update={"run": run.name})})
    model = build_model(
        begun,
        **sizes_by(manifest, task.num_labels),
        config=origin.config(),
        weights=open_weights(origin),
        adapted=False,
    ).eval()
    info = tokenizer_of(manifest)
    alone = not model.config.is_encoder_decoder
    rows = [size for size in (longest_row(model.config), manifest.sequence_tokens) if size]
    return LoadedTranslator(model, origin.tokenizer_folder, info, alone, min(rows))
