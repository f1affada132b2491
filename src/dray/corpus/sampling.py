"""The sample of documents that a tokeniser is trained on, and checked with, or that a task fits its
transforms to: spread evenly over the training files.

The sample depends on the inputs alone. Documents held out for validation are never in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dray.corpus.chunks import read_batches
from dray.corpus.cleaning import hash_texts, held_out
from dray.corpus.documents import cleaned
from dray.corpus.parts import CorpusSource, Part, Preparation
from dray.corpus.reading import Span
from dray.corpus.tokenizer_folder import CHAT_TEMPLATE, find_chat_template
from dray.corpus.tokenizing import (
    CHECK_BYTES,
    copy_tokenizer,
    describe,
    read_tokenizer_files,
    save_trained,
    train_byte_bpe,
)
from dray.corpus.whole_words import count_words, make_words_tokenizer
from dray.errors import CorpusError
from dray.spec import Tokenizer
from dray.storage.filesystem import child, share_filesystem, write_bytes
from dray.tasks.rows import SEPARATOR

MIN_SPANS = 64


def make_tokenizer(job: Preparation, item: tuple[Tokenizer, tuple[Part, ...]]) -> dict[str, Any]:
    """Write the corpus's tokeniser folder; what is known of the tokeniser, as plain values. Raises
    CorpusError."""
    settings, parts = item
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    filesystem, path = share_filesystem(job.folder)
    size = settings.sample_bytes if settings.train else CHECK_BYTES
    words = settings.train == "words"
    texts = [] if words else list(sample_texts(job, parts, size))
    if words:
        counts = count_words(job, list(parts))
        save_trained(
            filesystem, f"{path}/tokenizer", make_words_tokenizer(counts, settings.vocab_size)
        )
    elif settings.path is not None:
        copy_tokenizer(settings.path, filesystem, f"{path}/tokenizer")
    else:
        trained = train_byte_bpe(
            [text.encode() for text in texts],
            settings.vocab_size,
            masks=job.task.masks,
            marks=job.task.marks,
        )
        save_trained(filesystem, f"{path}/tokenizer", trained, job.task.marks)
    if (template := job.task.chat_template) is not None:
        content = template.encode()
        write_bytes(filesystem, f"{path}/tokenizer/{CHAT_TEMPLATE}", content, durable=False)
    files = read_tokenizer_files(child(job.folder, "tokenizer"))
    if job.task.converses and find_chat_template(files) is None:
        raise CorpusError(
            "tokenizer.path",
            "the tokeniser has no chat template",
            f"{job.task.name} makes texts of conversations by one",
            "name one that dray has: task.template",
        )
    # Every n-th document, so that the check sees the whole spread of the sample.
    spread = texts[:: max(1, sum(map(len, texts)) // CHECK_BYTES)]
    return asdict(describe(files, spread, needs_end=job.packs))


def sample_texts(job: Preparation, parts: Sequence[Part], size: int) -> Iterator[str]:
    """About `size` bytes of cleaned training documents."""
    spans = [
        (span, job.sources[part.source])
        for part in parts
        for span in part.spans
        if job.sources[part.source].split == "train"
    ]
    chosen = _spread(spans, size)
    left = float(size)
    for index, (span, own) in enumerate(chosen):
        share = left / (len(chosen) - index)
        for text in _take(job, span, own, share):
            left -= len(text.encode())
            yield text


def _spread(
    spans: Sequence[tuple[Span, CorpusSource]], size: int
) -> list[tuple[Span, CorpusSource]]:
    """Evenly spaced spans with enough text between them."""
    average = sum(_estimated_bytes(span) for span, _ in spans) / max(1, len(spans))
    count = min(len(spans), max(MIN_SPANS, int(1.25 * size / max(1.0, average)) + 1))
    return [spans[index * len(spans) // count] for index in range(count)]


def _estimated_bytes(span: Span) -> int:
    """Rough size of a span; of a cut file all spans but the last know theirs, which is enough for
    an average."""
    if span.file.form == "parquet" or span.is_whole:
        return span.file.estimated_bytes
    return (span.stop or span.file.num_bytes) - span.start


def _take(job: Preparation, span: Span, own: CorpusSource, size: float) -> Iterator[str]:
    """Whole documents from the beginning of a span."""
    for batch in read_batches(
        [span], own.source, job.max_record_bytes, lambda *found: None, job.task.fields
    ):
        answers = batch.labels if job.answers else None
        found = cleaned(job, own, batch.texts, answers)
        texts, answers = found.texts, found.labels
        # What stands between several texts is no text.
        if job.task.tokenizes and not job.wanted(own.source).is_plain:
            texts = pc.replace_substring(texts, SEPARATOR, " ")
        if job.share:
            mine = pa.array(~held_out(hash_texts(found.texts)[1], job.share))
            texts = texts.filter(mine)
            answers = None if answers is None else answers.filter(mine)
        for text in job.task.tokenizer_texts(texts, answers):
            if size <= 0:
                return
            value = text.as_py()
            size -= len(value.encode())
            yield value
