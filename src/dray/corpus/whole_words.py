"""A vocabulary of whole words or names: the most frequent ones of all training documents, each a
token, for tasks that read no pieces of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from dray.corpus.chunks import part_documents
from dray.corpus.cleaning import hash_texts, held_out
from dray.corpus.documents import cleaned
from dray.corpus.parts import Part, Preparation
from dray.tasks.rows import FIRST_WORD, SEPARATOR

PAD, UNKNOWN = "<|pad|>", "<|unknown|>"


def count_words(job: Preparation, parts: list[Part]) -> Counter[str]:
    """How often each word is there in the training documents, those held out aside."""
    found: Counter[str] = Counter()
    for part in parts:
        if job.sources[part.source].split != "train":
            continue
        for texts in _texts(job, part):
            words = pc.split_pattern(job.task.words(texts), SEPARATOR).flatten()
            for pair in pc.value_counts(words).to_pylist():
                found[pair["values"]] += pair["counts"]
    return found


def _texts(job: Preparation, part: Part) -> Iterator[pa.Array]:
    for batch in part_documents(job, part, lambda *found: None):
        texts = cleaned(job, job.sources[part.source], batch.texts, None).texts
        if job.share and len(texts):
            texts = texts.filter(pa.array(~held_out(hash_texts(texts)[1], job.share)))
        yield texts


def make_words_tokenizer(counts: Counter[str], vocab_size: int) -> str:
    """A tokeniser of the most frequent words as tokenizer.json: of a text it makes a token for each
    word between SEPARATORs. The first ids are of padding and of unknown words; the same counts give
    the same bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = [PAD, UNKNOWN]
    words = sorted(counts.keys() - {*special, ""}, key=lambda word: (-counts[word], word))
    names = [*special, *words[: vocab_size - FIRST_WORD]]
    tokenizer = Tokenizer(
        models.WordLevel({name: index for index, name in enumerate(names)}, unk_token=UNKNOWN)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(SEPARATOR, behavior="removed")
    tokenizer.add_special_tokens(special)
    return str(tokenizer.to_str(pretty=True))
