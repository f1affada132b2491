"""What must hold between the stages of a preparation, and the manifest that sums them up.

Refuses sources of which nothing is left, too many unreadable records, and label columns that are none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dray.corpus.manifest import VERSION, Manifest, Packing, Shard, SourceFile, SourceRows, Split
from dray.corpus.parts import DROP_REASONS, SPLITS, Job, Part, ShardPlan
from dray.errors import CorpusError

MAX_LABELS = 10_000

Record = dict[str, Any]


@dataclass
class Work:
    """The records of the stages, as they come in."""

    parts: Sequence[Part]
    reads: Sequence[Record] = ()
    duplicates: Sequence[Record] = ()
    packed: Sequence[Record] = ()
    plans: Sequence[ShardPlan] = ()
    shards: Sequence[Shard] = ()
    compressors: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each input file by name."""

    def source_files(self) -> list[SourceFile]:
        """Files over all parts that read them, in reading order."""
        merged: dict[str, Record] = {}
        for read in self.reads:
            for name, entry in read["files"].items():
                whole = merged.setdefault(name, {"num_documents": 0, "num_bad": 0, "sha256": ""})
                whole["num_documents"] += entry["num_documents"]
                whole["num_bad"] += entry["num_bad"]
                whole["sha256"] = whole["sha256"] or entry["sha256"]
        return [SourceFile(path=name, num_bytes=self.sizes.get(name, 0), **entry) for name, entry in merged.items()]

    def total(self, name: str) -> int:
        """A count over all reads."""
        return sum(read[name] for read in self.reads)


def check_reads(job: Job, work: Work, max_bad_share: float) -> None:
    """Raises CorpusError for too many unreadable records, and for a source without documents."""
    files = work.source_files()
    worst = max(files, key=lambda file: file.num_bad)
    entries = (read["files"].get(worst.path, {}) for read in work.reads)
    first = next((entry["first_bad"] for entry in entries if "first_bad" in entry), None)
    example = f" (first: {first['reason']} at offset {first['offset']})" if first else ""
    check_bad_share(files, work.total("num_bad"), work.total("num_records"), max_bad_share, example)
    for index, source in enumerate(job.sources):
        mine = [read for part, read in zip(work.parts, work.reads, strict=True) if part.source == index]
        if any(read["chunks"] for read in mine):
            continue
        dropped = sum((Counter(read["dropped"]) for read in mine), Counter[str]())
        if not dropped:
            raise CorpusError(f"{source.where}.path", f"{source.source.paths[0]} holds no documents",
                              "a source has at least one", "check the path and the format")
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        raise CorpusError(f"{source.where}.path", f"no document of {source.source.paths[0]} is left",
                          f"dropped: {reasons}", "loosen data.cleaning")


def check_bad_share(files: Iterable[SourceFile], num_bad: int, num_records: int, max_bad_share: float,
                    example: str = "") -> None:
    """Raises CorpusError that names the worst file if more than the allowed share of the records is unreadable."""
    if num_bad <= max_bad_share * num_records:
        return
    worst = max(files, key=lambda file: file.num_bad)
    raise CorpusError(
        worst.path, f"{worst.num_bad} of its {worst.num_bad + worst.num_documents} records are unreadable{example}",
        f"{num_bad} of all {num_records} records are bad, more than data.max_bad_share = {max_bad_share}",
        "mend the file, check the source's format, or raise data.max_bad_share")


def make_labels(job: Job, work: Work) -> tuple[str, ...]:
    """Names of the classes in the order of their ids: by number if all are integers, else by name."""
    labels = {label for read in work.reads for label in read["labels"]}
    if job.packs_rows:
        return ()
    if len(labels) > MAX_LABELS:
        raise CorpusError("data.train.label", f"{len(labels)} different labels", f"at most {MAX_LABELS}",
                          "is it a column of text?")
    if len(labels) < 2:
        raise CorpusError("data.train.label", f"only the label {next(iter(labels), '')!r}",
                          "a classification has two classes or more", "check the column and the files")
    if all(label.removeprefix("-").isdecimal() and label.isascii() for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def check_packed(job: Job, packed: Sequence[Record]) -> None:
    """Raises CorpusError for a source or a split that deduplication or holding out left empty."""
    for index, source in enumerate(job.sources):
        mine = [record for chunk, record in zip(job.chunks, packed, strict=True) if chunk.source == index]
        if not any(source.split in record for record in mine):
            raise CorpusError(f"{source.where}.path", f"no document of {source.source.paths[0]} is left",
                              "all are duplicates, or held out for validation", "check the sources and data.validation")
    if job.share and not any("validation" in record for record in packed):
        num_documents = sum(record["train"]["num_documents"] for record in packed)
        raise CorpusError("data.validation.share", f"{job.share} of {num_documents} documents holds out none of them",
                          "validation needs at least one document", f"raise it above {1 / num_documents:.2g}")


def make_manifest(key: str, job: Job, work: Work) -> Manifest:
    """The manifest of a finished corpus."""
    dropped = sum((Counter(read["dropped"]) for read in work.reads), Counter[str]())
    for record in work.duplicates:
        dropped.update({reason: record[reason] for reason in DROP_REASONS if record[reason]})
    train, validation = (_make_split(split, job, work) for split in SPLITS)
    packed = [record["train"] for record in work.packed if "train" in record]
    counts = {name: sum(record[name] for record in packed)
              for name in ("num_cut_documents", "num_truncated_documents", "num_truncated_tokens")}
    files = work.source_files()
    utilization = round(train.num_tokens / (train.num_rows * job.sequence_tokens), 6)
    return Manifest(
        version=VERSION, key=key, sequence_tokens=job.sequence_tokens, group_rows=job.group_rows,
        vocab_size=job.info.vocab_size, pad_token_id=job.info.pad_token_id, eos_token_id=job.info.eos_token_id,
        encoder=job.info.encoder, labels=job.labels, train=train,
        validation=validation if validation.num_rows else None,
        num_source_files=len(files), num_source_bytes=sum(file.num_bytes for file in files),
        dropped=dict(sorted(dropped.items())), num_records=work.total("num_records"), num_bad=work.total("num_bad"),
        packing=Packing(utilization=utilization, **counts), shuffle_seed=job.shuffle_seed,
        validation_compressors=work.compressors,
    )


def _make_split(split: str, job: Job, work: Work) -> Split:
    rows: list[SourceRows] = []
    for index, source in enumerate(job.sources):
        mine = [record[split] for chunk, record in zip(job.chunks, work.packed, strict=True)
                if chunk.source == index and split in record]
        if not mine:
            continue
        counts = {name: sum(record[name] for record in mine)
                  for name in ("num_rows", "num_documents", "num_tokens", "num_text_bytes")}
        shards = tuple(shard for plan, shard in zip(work.plans, work.shards, strict=True)
                       if (plan.split, plan.source) == (split, index))
        weight = source.source.weight if split == "train" else None
        rows.append(SourceRows(name=source.name, weight=weight, shards=shards, **counts))
    return Split(sources=tuple(rows))
