"""What became of the raw data, for people: files read and left out, documents kept and dropped,
bytes that were lost.

The same numbers judge whether too much of the data is unreadable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dray.corpus.labels import named, similar_names
from dray.corpus.languages import OF_LANGUAGE
from dray.corpus.manifest import LeftOut, Manifest, SourceFile
from dray.corpus.redacting import told_counts
from dray.plan import format_bytes

MAX_FILES = 5
"""Files that are named for one matter; all are counted."""
MAX_REASONS = 4
"""Why documents were left out that are told in one line."""


@dataclass(frozen=True)
class BadShares:
    """Which share of the data could not be read, and which file is to blame most."""

    documents: float
    num_bytes: float
    worst: SourceFile

    @property
    def share(self) -> float:
        """The larger of the two: a lost shard is few records, a broken column few bytes."""
        return max(self.documents, self.num_bytes)


def weigh_bad(files: Sequence[SourceFile]) -> BadShares:
    """The shares of what could not be read.

    A damaged file counts whole, and at least as much as the average file: nobody knows how much of
    it is missing.
    """
    average = sum(file.num_bytes for file in files) / len(files)
    weights = [
        max(file.num_bytes, file.num_bad_bytes, average) if file.is_damaged else file.num_bytes
        for file in files
    ]
    lost = [weight * _bad_share(file) for file, weight in zip(files, weights, strict=True)]
    num_bad = sum(file.num_bad for file in files)
    documents = num_bad / max(1, sum(file.num_records for file in files))
    num_bytes = sum(lost) / max(1.0, sum(weights))
    by_bytes = max(range(len(files)), key=lambda index: (lost[index], files[index].num_bad))
    by_number = max(range(len(files)), key=lambda index: files[index].num_bad)
    return BadShares(documents, num_bytes, files[by_number if documents > num_bytes else by_bytes])


def _bad_share(file: SourceFile) -> float:
    return 1.0 if file.is_damaged else min(1.0, file.num_bad_bytes / max(1, file.num_content_bytes))


def describe(manifest: Manifest, files: Sequence[SourceFile]) -> list[str]:
    """The account of a corpus in some lines."""
    validation = manifest.validation
    kept = manifest.train.num_documents + (validation.num_documents if validation else 0)
    forms = Counter(file.form for file in files if file.form)
    told = ", ".join(f"{count:,} {form}" for form, count in sorted(forms.items()))
    lines = [
        f"read         {_number(len(files), 'file')}{f' ({told})' if told else ''}, "
        f"{format_bytes(manifest.num_source_bytes)}"
    ]
    lines += [f"left out     {_describe_left_out(item)}" for item in manifest.left_out]
    lines += _name_some(
        "empty", [file.path for file in files if not file.num_bytes and not file.is_damaged]
    )
    lines += _name_some("as found", [f"{file.path}: {file.note}" for file in files if file.note])
    lines += _name_some("unreadable", [_describe_bad(file) for file in _worst_first(files)])
    held = f", {validation.num_documents:,} of them for validation" if validation else ""
    reasons = _describe_dropped(manifest.dropped)
    several = len(reasons) > MAX_REASONS
    told = f"; dropped: {', '.join(reasons)}" if reasons and not several else ""
    lines.append(f"documents    {kept:,} kept{held}{told}")
    lines += [f"dropped      {reason}" for reason in reasons if several]
    if manifest.languages:
        lines.append(f"languages    {named(manifest.languages)}, before other rules")
    if manifest.removed:
        told = ", ".join(f"{count:,} {reason}" for reason, count in manifest.removed.items())
        lines.append(f"taken out    of documents that were kept: {told}")
    lines += _describe_evaluation(manifest)
    if manifest.redacted:
        held = _number(manifest.num_redacted, "document")
        lines.append(f"redacted     {told_counts(manifest.redacted)} in {held}")
    lines += _describe_labels(manifest)
    if manifest.vocab_size:
        lines.append(
            f"tokens       {manifest.train.num_tokens:,} in {manifest.train.num_rows:,} rows of "
            f"{manifest.sequence_tokens}{_describe_truncated(manifest)}"
        )
    else:
        lines.append(f"rows         {manifest.train.num_rows:,}, without tokens")
    lines += _describe_votes(manifest)
    lines += [f"fitted       {one['said']}" for one in manifest.fitted if one.get("said")]
    lines += _describe_unchanged(manifest)
    return [line.replace("\n", "\\n") for line in lines]  # as a file's name may have them


def _describe_evaluation(manifest: Manifest) -> list[str]:
    """What training documents were compared with."""
    if not manifest.evaluation:
        return []
    short = manifest.evaluation["short_texts"]
    told = f", {short:,} of them too short to be found in a longer document" if short else ""
    texts = _number(manifest.evaluation["texts"], "text")
    return [f"evaluation   {texts} to share nothing with{told}"]


def _describe_votes(manifest: Manifest) -> list[str]:
    """How often each rule votes, and those that never do."""
    counts = {rule: count for rule, count in manifest.votes.items() if count}
    lines = [f"rules        vote for training rows: {named(counts)}"] if counts else []
    silent = [rule for rule, count in manifest.votes.items() if not count]
    return lines + [f"rules        {rule} votes for no training row" for rule in silent]


def _describe_unchanged(manifest: Manifest) -> list[str]:
    """What augmentation of texts cannot do."""
    found = {
        "are of documents that became several, and keep their words": manifest.num_unchanged,
        "keep their words: no translation, or one that is too long": manifest.num_untranslated,
    }
    return [
        f"augmented    {_number(count, 'training row')} {what}"
        for what, count in found.items()
        if count
    ]


def _describe_truncated(manifest: Manifest) -> str:
    """What rows have no room for."""
    packing = manifest.packing
    counts = {
        "training": (packing.num_truncated_documents, packing.num_truncated_tokens),
        "validation": (
            packing.num_truncated_validation_documents,
            packing.num_truncated_validation_tokens,
        ),
    }
    return "".join(
        f"; {_number(documents, f'{split} document')} lost {_number(tokens, 'token')} that rows "
        "have no place for"
        for split, (documents, tokens) in counts.items()
        if documents
    )


def to_json(manifest: Manifest, files: Sequence[SourceFile]) -> dict[str, Any]:
    """The account of a corpus as plain values."""
    validation = manifest.validation
    return {
        "num_files": len(files),
        "num_source_bytes": manifest.num_source_bytes,
        "left_out": [item.model_dump(mode="json") for item in manifest.left_out],
        "num_documents": manifest.train.num_documents
        + (validation.num_documents if validation else 0),
        "num_tokens": manifest.train.num_tokens,
        "num_truncated_documents": manifest.packing.num_truncated_documents,
        "num_truncated_tokens": manifest.packing.num_truncated_tokens,
        "num_truncated_validation_documents": manifest.packing.num_truncated_validation_documents,
        "num_truncated_validation_tokens": manifest.packing.num_truncated_validation_tokens,
        "num_unchanged": manifest.num_unchanged,
        "num_untranslated": manifest.num_untranslated,
        "votes": manifest.votes,
        "dropped": manifest.dropped,
        "removed": manifest.removed,
        "languages": manifest.languages,
        "evaluation": manifest.evaluation,
        "redacted": manifest.redacted,
        "num_redacted_documents": manifest.num_redacted,
        "num_bad": manifest.num_bad,
        "bad_share": manifest.bad_share,
        "num_contradicting": manifest.num_contradicting,
        "documents_by_label": manifest.train.documents_by_label,
        "unreadable": [
            {
                "path": file.path,
                "problem": file.problem,
                "num_bad": file.num_bad,
                "num_bad_bytes": file.num_bad_bytes,
                "is_damaged": file.is_damaged,
            }
            for file in _worst_first(files)
        ],
    }


def _worst_first(files: Sequence[SourceFile]) -> list[SourceFile]:
    return sorted(
        (file for file in files if file.num_bad), key=lambda file: (-file.num_bad_bytes, file.path)
    )


def _name_some(matter: str, names: Sequence[str]) -> list[str]:
    lines = [f"{matter:<12} {name}" for name in names[:MAX_FILES]]
    return (
        [*lines, f"{matter:<12} {len(names) - MAX_FILES:,} files more"]
        if len(names) > MAX_FILES
        else lines
    )


def _number(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _describe_left_out(item: LeftOut) -> str:
    more = ", …" if item.num_files > len(item.examples) else ""
    names = ", ".join("/".join(path.split("/")[-3:]) for path in item.examples)
    return f"{item.num_files:,} ({item.reason}), {format_bytes(item.num_bytes)}: {names}{more}"


def _describe_bad(file: SourceFile) -> str:
    whole = file.num_bad + file.num_documents
    records = "from there on" if file.is_damaged else f"{file.num_bad:,} of {whole:,} records"
    least = "at least " if file.is_damaged else ""
    return (
        f"{file.path}: {records}, {least}{format_bytes(file.num_bad_bytes)} ({file.problem} at "
        f"{file.problem_offset:,})"
    )


def _describe_labels(manifest: Manifest) -> list[str]:
    """The classes with their training documents, and what is odd about them; nothing for tasks
    without labels."""
    if not manifest.labels:
        return []
    counts = manifest.train.documents_by_label
    lines = [
        f"labels       {len(manifest.labels):,} classes{f': {named(counts)}' if counts else ''}"
    ]
    empty = {label: count for label, count in counts.items() if not count}
    if empty:
        lines.append(f"labels       never trained, for want of documents: {named(empty)}")
    lines += [
        f"labels       as good as alike: {', '.join(map(repr, group))}"
        for group in similar_names(manifest.labels)[:MAX_FILES]
    ]
    if manifest.num_contradicting:
        lines.append(
            f"labels       {_number(manifest.num_contradicting, 'document')} with a text that an "
            "earlier one has under another label"
        )
    return lines


def _describe_dropped(dropped: Mapping[str, int]) -> list[str]:
    """Why documents were left out, the most frequent reason first; those of other languages are
    told together."""
    other = {
        reason.removeprefix(OF_LANGUAGE): count
        for reason, count in dropped.items()
        if reason.startswith(OF_LANGUAGE)
    }
    told = {reason: n for reason, n in dropped.items() if not reason.startswith(OF_LANGUAGE)}
    if other:
        told[f"of other languages: {named(dict(_most_first(other)))}"] = sum(other.values())
    return [f"{count:,} {reason}" for reason, count in _most_first(told)]


def _most_first(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
