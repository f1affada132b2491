"""What must hold between the stages of a preparation, and the manifest that sums them up.

Refuses sources of which nothing is left, too many unreadable records, and label columns that are
none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dray.corpus.account import weigh_bad
from dray.corpus.duplicates import DROP_REASONS
from dray.corpus.examples import Examples, merged
from dray.corpus.labels import choose_labels, named
from dray.corpus.manifest import (
    VERSION,
    LeftOut,
    Manifest,
    Packing,
    Shard,
    SourceFile,
    SourceRows,
    Split,
)
from dray.corpus.near import REASONS as NEAR_REASONS
from dray.corpus.parts import SPLITS, Part, Preparation
from dray.corpus.planning import Deal
from dray.corpus.reading import FileCounts
from dray.errors import CorpusError

Record = dict[str, Any]


@dataclass
class Work:
    """The records of the stages, as they come in."""

    parts: Sequence[Part]
    scatters: Sequence[Record] = ()
    """Of the records of documents that are gathered."""
    reads: Sequence[Record] = ()
    duplicates: Sequence[Record] = ()
    near: Sequence[Record] = ()
    """Of near-duplicates, where they were looked for."""
    packed: Sequence[Record] = ()
    deals: Sequence[Deal] = ()
    shards: Sequence[Shard] = ()
    """Deal after deal."""
    num_untranslated: int = 0
    compressors: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each input file by name."""
    left_out: tuple[LeftOut, ...] = ()
    evaluation: Sequence[Record] = ()
    """Of the evaluation sets, where training documents were compared with some."""

    def examples(self) -> Examples:
        """Some documents of each fate, of all parts."""
        return merged(record.get("examples", {}) for record in (*self.reads, *self.near))

    def count(self, name: str) -> dict[str, int]:
        """What was counted by reason, kind or language of all that was read."""
        return dict(sorted(sum((Counter(read[name]) for read in self.reads), Counter()).items()))

    def source_files(self) -> list[SourceFile]:
        """Files over all parts that read them, in reading order."""
        merged: dict[str, FileCounts] = {}
        for read in (*self.scatters, *self.reads):
            for name, entry in read["files"].items():
                counts = FileCounts(**entry)
                if name in merged:
                    merged[name].merge(counts)
                else:
                    merged[name] = counts
        return [
            SourceFile(path=name, num_bytes=self.sizes.get(name, 0), **vars(counts))
            for name, counts in merged.items()
        ]

    def total(self, name: str) -> int:
        """A count over all that was read."""
        return sum(read.get(name, 0) for read in (*self.scatters, *self.reads))


def check_reads(job: Preparation, work: Work, max_bad_share: float) -> None:
    """Raises CorpusError for too many unreadable records, and for a source without documents."""
    check_bad_share(work.source_files(), max_bad_share)
    for index, source in enumerate(job.sources):
        mine = [
            read for part, read in zip(work.parts, work.reads, strict=True) if part.source == index
        ]
        if any(read["chunks"] for read in mine):
            continue
        dropped = sum((Counter(read["dropped"]) for read in mine), Counter[str]())
        if not dropped:
            raise CorpusError(
                f"{source.where}.path",
                f"{source.source.paths[0]} holds no documents",
                "a source has at least one",
                "check the path and the format",
            )
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        raise CorpusError(
            f"{source.where}.path",
            f"no document of {source.source.paths[0]} is left",
            f"dropped: {reasons}",
            "see which rule left them out: data.cleaning, the source's own keys, or the task's",
        )


def check_bad_share(files: Sequence[SourceFile], max_bad_share: float) -> None:
    """Raises CorpusError that names the worst file if more than the allowed share of the data is
    unreadable."""
    bad = weigh_bad(files)
    if bad.share <= max_bad_share:
        return
    worst, num_bad = bad.worst, sum(file.num_bad for file in files)
    first = f"{worst.problem} at offset {worst.problem_offset}"
    what = (
        f"from offset {worst.problem_offset} on: {worst.problem}"
        if worst.is_damaged
        else f"{worst.num_bad} of its {worst.num_records} records are unreadable (first: {first})"
    )
    if bad.documents > max_bad_share and not worst.is_damaged:
        share = f"{num_bad} of all {sum(file.num_records for file in files)} records are bad"
    else:
        others = sum(file.num_bad > 0 for file in files) > 1
        share = (
            f"{bad.num_bytes:.2%} of all bytes are lost with it{' and others' if others else ''}"
        )
    mend = "convert it to UTF-8 (iconv)" if worst.problem == "invalid UTF-8" else "mend the file"
    raise CorpusError(
        worst.path,
        what,
        f"{share}, more than data.max_bad_share = {max_bad_share}",
        f"{mend}, check the source's format, leave the file out with `exclude`, or raise "
        "data.max_bad_share",
    )


def make_labels(job: Preparation, work: Work) -> tuple[str, ...]:
    """Names of the classes in the order of their ids; none for tasks without labels. Raises
    CorpusError."""
    if not job.task.has_classes:
        return ()
    train, validation = (_labels_read(split, job, work) for split in SPLITS)
    return choose_labels(train, validation, num_labels=job.num_labels, known=job.known_labels)


def _labels_read(split: str, job: Preparation, work: Work) -> Counter[str]:
    """Documents of each label in the sources of a split, before any is dropped as a duplicate."""
    found: Counter[str] = Counter()
    for part, read in zip(work.parts, work.reads, strict=True):
        if job.sources[part.source].split == split:
            found.update(read["labels"])
    return found


def check_width(job: Preparation) -> None:
    """Raises CorpusError for rows that what stands around a document fills."""
    around = len(job.info.prefix) + len(job.info.suffix)
    if job.sequence_tokens <= around:
        raise CorpusError(
            f"data.sequence_tokens = {job.sequence_tokens}",
            f"the tokeniser puts {around} tokens around a text",
            "a row has room for text",
            f"give {around + 1} or more",
        )


def check_packed(job: Preparation, work: Work) -> None:
    """Raises CorpusError for a source or a split that deduplication or holding out left empty."""
    for index, source in enumerate(job.sources):
        mine = [
            record
            for chunk, record in zip(job.chunks, work.packed, strict=True)
            if chunk.source == index
        ]
        if not any(source.split in record for record in mine):
            dropped = Counter[str]()
            for part, read in zip(work.parts, work.reads, strict=True):
                if part.source == index:
                    dropped.update(read["dropped"])
            told = ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common(5))
            raise CorpusError(
                f"{source.where}.path",
                f"no document of {source.source.paths[0]} is left{told and f' ({told})'}",
                "all are duplicates, held out for validation, or nothing that the task learns from",
                "check the sources, data.validation and the task's settings",
            )
    if job.share and not any("validation" in record for record in work.packed):
        num_documents = sum(record["train"]["num_documents"] for record in work.packed)
        way_out = (
            f"raise it above {1 / num_documents:.2g}"
            if num_documents > 1
            else "give more documents"
        )
        if any(
            counts["form"] == "text" for read in work.reads for counts in read["files"].values()
        ):
            way_out = (
                "a file of text is one document: `format: lines` of the source makes each line one"
            )
        raise CorpusError(
            "data.validation.share",
            f"{job.share} of {num_documents} documents holds out none of them",
            "validation needs at least one document",
            way_out,
        )
    if job.task.has_classes and not job.known_labels:
        _check_classes(job, work)


def _check_classes(job: Preparation, work: Work) -> None:
    """Raises CorpusError for a class of whose training documents none is left."""
    train = _documents_by_label("train", job, work.packed)
    lost = {
        label: count
        for label, count in _labels_read("train", job, work).items()
        if not train[label]
    }
    if lost:
        raise CorpusError(
            "data.train",
            f"no training document is left of the label {named(lost)}",
            "a class is learnt from its documents; these are held out for validation, or another "
            "label has their texts too",
            "give it more documents, or leave its documents out",
        )


def _documents_by_label(split: str, job: Preparation, packed: Sequence[Record]) -> dict[str, int]:
    """Documents of each class in a split, classes without any included."""
    counts = [0] * len(job.labels)
    for record in packed:
        counts = [
            a + b
            for a, b in zip(
                counts,
                record.get(split, {}).get("by_label", counts[:0]) or [0] * len(counts),
                strict=True,
            )
        ]
    return dict(zip(job.labels, counts, strict=True))


def make_manifest(key: str, job: Preparation, work: Work) -> Manifest:
    """The manifest of a finished corpus."""
    reads = (*work.scatters, *work.reads)
    dropped = sum((Counter(read["dropped"]) for read in reads), Counter[str]())
    for record in work.duplicates:
        dropped.update({reason: record[reason] for reason in DROP_REASONS if record[reason]})
    for record in work.near:
        dropped.update({reason: record[reason] for reason in NEAR_REASONS if record[reason]})
    train, validation = (_make_split(split, job, work) for split in SPLITS)
    packed = [record["train"] for record in work.packed if "train" in record]
    held = [record["validation"] for record in work.packed if "validation" in record]
    counts = {
        name: sum(record[name] for record in packed)
        for name in ("num_cut_documents", "num_truncated_documents", "num_truncated_tokens")
    } | {
        f"num_truncated_validation_{what}": sum(record[f"num_truncated_{what}"] for record in held)
        for what in ("documents", "tokens")
    }
    files = work.source_files()
    slots = train.num_rows * job.sequence_tokens
    utilization = round(train.num_tokens / slots, 6) if job.task.tokenizes else 1.0
    return Manifest(
        version=VERSION,
        key=key,
        sequence_tokens=job.sequence_tokens,
        group_rows=job.group_rows,
        vocab_size=job.info.vocab_size,
        pad_token_id=job.info.pad_token_id,
        eos_token_id=job.info.eos_token_id,
        encoder=job.info.encoder,
        prefix=job.info.prefix,
        suffix=job.info.suffix,
        middle=job.info.middle,
        mask_token_id=job.info.mask_token_id,
        labels=job.labels,
        train=train,
        validation=validation if validation.num_rows else None,
        num_source_files=len(files),
        num_source_bytes=sum(file.num_bytes for file in files),
        num_contradicting=sum(record["contradicting"] for record in (*work.duplicates, *work.near)),
        dropped=dict(sorted(dropped.items())),
        num_records=work.total("num_records"),
        num_bad=work.total("num_bad"),
        packing=Packing(utilization=utilization, **counts),
        shuffle_seed=job.shuffle_seed,
        bad_share=round(weigh_bad(files).share, 9),
        left_out=work.left_out,
        num_unchanged=sum(record.get("num_without_text", 0) for record in packed),
        num_untranslated=work.num_untranslated,
        votes={
            rule: sum(record["votes"][place] for record in packed)
            for place, rule in enumerate(job.task.rules)
        },
        fitted=tuple(job.task.fitted),
        redacted=work.count("redacted"),
        num_redacted=work.total("num_redacted"),
        removed=work.count("removed"),
        languages=work.count("languages"),
        evaluation=work.evaluation[0] if work.evaluation else {},
        validation_compressors=work.compressors,
    )


def _make_split(split: str, job: Preparation, work: Work) -> Split:
    rows: list[SourceRows] = []
    apart = job.parts_labels(split)
    for index, source in enumerate(job.sources):
        mine = [
            record[split]
            for chunk, record in zip(job.chunks, work.packed, strict=True)
            if chunk.source == index and split in record
        ]
        for label in range(len(job.labels)) if apart else (None,):
            own = mine if label is None else [record["labels"][label] for record in mine]
            counts = {
                name: sum(record[name] for record in own)
                for name in ("num_rows", "num_documents", "num_tokens", "num_text_bytes")
            }
            if not counts["num_rows"]:
                continue
            name = source.name if label is None else f"{source.name}/{job.labels[label]}"
            weight = source.source.weight if split == "train" else None
            shards = _shards_of(work, (split, index, label))
            rows.append(SourceRows(name=name, weight=weight, shards=shards, **counts))
    by_label = _documents_by_label(split, job, work.packed)
    return Split(
        sources=_balanced(rows, job) if apart else tuple(rows), documents_by_label=by_label
    )


def _shards_of(work: Work, place: tuple[str, int, int | None]) -> tuple[Shard, ...]:
    """The shards of a split, a source and, where those lie apart, a class."""
    places = (
        (deal.split, deal.source, deal.label) for deal in work.deals for _ in range(deal.num_shards)
    )
    return tuple(shard for own, shard in zip(places, work.shards, strict=True) if own == place)


def _balanced(rows: Sequence[SourceRows], job: Preparation) -> tuple[SourceRows, ...]:
    """Rows by source and class with the weights that even classes out: of all sources together, or
    of each by itself where sources have weights of their own."""
    pools: dict[float | str, list[SourceRows]] = {}
    for own in rows:
        source, _, _ = own.name.partition("/")
        pools.setdefault("" if own.weight is None else source, []).append(own)
    found = {}
    for pool in pools.values():
        sizes: Counter[str] = Counter()
        for own in pool:
            sizes[own.name.partition("/")[2]] += own.num_rows
        shares = {label: size ** (1 - job.balance) for label, size in sizes.items()}
        for own in pool:
            label = own.name.partition("/")[2]
            share = shares[label] / sum(shares.values()) * own.num_rows / sizes[label]
            found[own.name] = own.model_copy(update={"weight": (own.weight or 1.0) * share})
    return tuple(found[own.name] for own in rows)
