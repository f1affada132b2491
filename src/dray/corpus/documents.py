"""Documents of a source as all that is kept or learnt of them sees them: normalised, judged by the
spec's rules, without personal data.

Each document is judged by itself, so that a corpus is the same however it is cut.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pyarrow as pa

from dray.corpus.cleaning import TOO_SHORT, Cleaned, clean, hash_texts, normalize
from dray.corpus.contamination import CONTAMINATED, contaminated
from dray.corpus.examples import KEPT, examples_of, merged
from dray.corpus.filters import judge
from dray.corpus.languages import refused_by
from dray.corpus.parts import CorpusSource, Preparation
from dray.corpus.records import Wanted
from dray.corpus.redacted import redact_documents, redact_texts
from dray.corpus.redacting import make_redactor
from dray.spec import Cleaning, Filters, Source, Spec


def cleaned(
    job: Preparation, own: CorpusSource, texts: pa.Array, targets: pa.Array | None
) -> Cleaned:
    """The documents (large_string) that are kept, and what became of the others; `targets` go
    along. Sets that training documents may share no text with concern no validation source."""
    rules = job.cleaning
    found = clean(texts, targets, rules, answers=job.answers and targets is not None)
    found = _judged(found, rules)
    if rules.decontaminate is not None and own.split == "train":
        shared = contaminated(job, found.texts)
        found = found.without([CONTAMINATED if one else None for one in shared.tolist()])
    if job.redactor is not None:
        kinds = [kind for _, _, kind in job.wanted(own.source).texts]
        found = redact_documents(found, job.redactor, kinds, answers=job.answers)
    return found


def with_examples(job: Preparation, own: CorpusSource, found: Cleaned) -> Cleaned:
    """The same with some of those that were kept, too; with none of any where a document is no
    plain text: the beginning of a list or a record cannot be redacted as it is whole."""
    if any(kind != "text" for _, _, kind in job.wanted(own.source).texts):
        return replace(found, examples={})
    kept = examples_of(KEPT, found.texts, hash_texts(found.texts)[1])
    return replace(found, examples=merged([found.examples, kept]))


def edited(
    spec: Spec, source: Source, texts: pa.Array, targets: pa.Array | None = None
) -> tuple[pa.Array, pa.Array | None]:
    """Documents as a corpus of the spec holds them where it keeps them, none left out: normalised,
    without the lines that its rules take out and without personal data; targets likewise where
    they are texts. Raises SpecError where the key of its pseudonyms is not there."""
    cleaning = spec.data.cleaning
    answers = any(field.kind == "answer" for field in spec.task.fields.values())
    texts = normalize(texts, cleaning.normalize)
    if cleaning.filters.c4 is not None:
        lines: Counter[str] = Counter()
        kept = [
            judge(text, Filters(c4=cleaning.filters.c4), lines)[0] for text in texts.to_pylist()
        ]
        texts = pa.array(kept, pa.large_string())
    redactor = make_redactor(spec.data.redaction)
    if redactor is None or redactor.drops:
        return texts, targets
    kinds = [kind for _, _, kind in Wanted.of(source, spec.task.fields, source.format).texts]
    texts, _ = redact_texts(texts, redactor, kinds)
    if targets is not None and answers:
        targets, _ = redact_texts(targets.cast(pa.large_string()), redactor, ["answer"])
    return texts, targets


def _judged(found: Cleaned, rules: Cleaning) -> Cleaned:
    """By language and by the published rules."""
    if rules.languages is not None and len(found.texts):
        told = [refused_by(text, rules.languages) for text in found.texts.to_pylist()]
        languages = Counter(code for code, refused in told if not refused)
        found = replace(found.without([refused for _, refused in told]), languages=languages)
    if rules.filters == Filters() or not len(found.texts):
        return found
    removed: Counter[str] = Counter()
    kept: list[str] = []
    reasons: list[str | None] = []
    for given in found.texts.to_pylist():
        lines: Counter[str] = Counter()
        text, broken = judge(given, rules.filters, lines)
        if broken is None and len(text) < rules.min_chars:  # once lines were taken out
            broken = TOO_SHORT
        reasons.append(broken)
        if broken is None:
            kept.append(text)
            removed += lines
    left = found.without(reasons)
    return replace(left, texts=pa.array(kept, pa.large_string()), removed=removed)
