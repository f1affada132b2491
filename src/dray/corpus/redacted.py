"""Documents of a corpus without personal data: which parts of one are texts of somebody, and what
becomes of it.

Texts, lists of words, records and answers are looked through; names (ids), labels, numbers and
bytes never are. Each document by itself, so that a corpus is the same however it is cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from dray.corpus.cleaning import Cleaned
from dray.corpus.examples import CHARS, Examples
from dray.corpus.redacting import CALLED, Counts, Redactor
from dray.tasks.rows import SEPARATOR

_CUT = 100
"""Characters before the end of a beginning that are not shown."""
_LISTS = ("words", "names")
"""Kinds of several texts."""


def redact_documents(
    documents: Cleaned, redactor: Redactor, kinds: Sequence[str], *, answers: bool
) -> Cleaned:
    """Cleaned documents without personal data, or without those that hold some; `kinds` as of
    `redact_texts`. Where targets are `answers` they are looked through, too."""
    texts, found = redact_texts(documents.texts, redactor, kinds)
    targets = documents.labels
    if answers and targets is not None:
        targets, more = redact_texts(targets, redactor, ["answer"])
        found = [own + other for own, other in zip(found, more, strict=True)]
    documents = replace(documents, examples=_shown(documents.examples, redactor))
    held = np.array([bool(counts) for counts in found], bool)
    if not held.any():
        return documents
    if redactor.drops:
        masked = replace(documents, texts=texts)  # what is shown of them
        return masked.without(
            [
                f"with {CALLED[next(kind for kind in CALLED if counts[kind])][1]}"
                if counts
                else None
                for counts in found
            ]
        )
    return replace(
        documents,
        texts=texts,
        labels=targets,
        redacted=sum(found, Counter()),
        num_redacted=int(held.sum()),
    )


def redact_texts(
    texts: pa.Array, redactor: Redactor, kinds: Sequence[str]
) -> tuple[pa.Array, list[Counts]]:
    """Texts of documents (large_string) with masks, and what was found in each. `kinds`: of the
    fields that a text is joined of."""
    changed: list[str | None] = []
    found: list[Counts] = []
    for text in texts.to_pylist():
        own, counts = (None, Counter[str]()) if text is None else _redact(text, redactor, kinds)
        changed.append(own)
        found.append(counts)
    return (pa.array(changed, texts.type) if any(found) else texts), found


def _shown(examples: Examples, redactor: Redactor) -> Examples:
    """What is shown of documents that were left out, without personal data."""
    return {
        fate: [(key, _redact_beginning(text, redactor)) for key, text in pairs]
        for fate, pairs in examples.items()
    }


def _redact_beginning(text: str, redactor: Redactor) -> str:
    """The beginning of a text: what is cut in two by its end is not recognised, so that the last
    characters go."""
    own, _ = redactor.redact(text)
    return own[:-_CUT] if len(text) == CHARS else own


def _redact(text: str, redactor: Redactor, kinds: Sequence[str]) -> tuple[str, Counts]:
    if len(kinds) == 1 and kinds[0] not in _LISTS:
        return _by_kind(redactor, kinds[0])(text)
    parts = text.split(SEPARATOR)
    several = [place for place, kind in enumerate(kinds) if kind in _LISTS]
    if len(several) > 1:  # nothing says where one ends
        found = [redactor.redact(part) for part in parts]
        whole = sum((counts for _, counts in found), Counter[str]())
        return SEPARATOR.join(own for own, _ in found), whole
    changed: list[str] = []
    counts: Counts = Counter()
    for place, kind in enumerate(kinds):
        size = 1 + (len(parts) - len(kinds) if place in several else 0)
        own, parts = parts[:size], parts[size:]
        if kind == "words":
            words, more = redactor.redact_words(own)
            changed += words
        else:
            one, more = _by_kind(redactor, kind)(SEPARATOR.join(own))
            changed.append(one)
        counts.update(more)
    return SEPARATOR.join(changed), counts


def _by_kind(redactor: Redactor, kind: str) -> Callable[[str], tuple[str, Counts]]:
    """How a field of a kind is looked through."""
    if kind in ("text", "answer"):
        return redactor.redact
    if kind == "record":
        return redactor.redact_json
    return lambda text: (text, Counter())
