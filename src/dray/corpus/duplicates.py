"""Which documents have equal text: hashes go from chunks to partitions and back.

The first of equal documents is kept, in the order of sources, files and offsets; those of
validation come first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dray.corpus.cleaning import Hashes
from dray.corpus.packing import Ints
from dray.corpus.parts import Preparation, save_record, staged
from dray.corpus.sections import Records, read_section, read_sections, write_sections

DROP_REASONS = ("duplicate", "in_validation")
ENTRY = np.dtype(
    [
        ("high", np.uint64),
        ("low", np.uint64),
        ("class", np.uint64),
        ("chunk", np.int32),
        ("document", np.int32),
    ]
)
"""A document's hash, its label's (0: none) and its place."""
DROP = np.dtype([("chunk", np.int32), ("document", np.int32)])
"""A document that is left out."""


def further_pieces(records: Ints) -> npt.NDArray[np.bool_]:
    """Which documents are not the first that came of their record."""
    further = np.zeros(len(records), bool)
    further[1:] = records[1:] == records[:-1]
    return further


def partition_hashes(
    high: Hashes,
    low: Hashes,
    classes: Hashes | None,
    records: Ints,
    num_partitions: int,
) -> list[Records]:
    """Hashes and places of the documents of each partition, in reading order; hashes of labels
    where there are any. Of what came of one record the first stands for all. The chunk is filled in
    by the reader."""
    place = (high % np.uint64(num_partitions)).astype(np.int64)
    place[further_pieces(records)] = num_partitions
    order = np.argsort(place, kind="stable")
    order = order[: int((place < num_partitions).sum())]
    entries = np.zeros(len(order), ENTRY)
    entries["high"], entries["low"], entries["document"] = high[order], low[order], order
    if classes is not None:
        entries["class"] = classes[order]
    bounds = np.searchsorted(place[order], np.arange(1, num_partitions))
    return np.split(entries, bounds.tolist())


def gather_hashes(job: Preparation, bundle: int) -> dict[str, Any]:
    """The hashes of a bundle of chunks in one file, by partition."""
    first = bundle * job.bundle_chunks
    parts: list[list[Records]] = [[] for _ in range(job.num_partitions)]
    for index, chunk in enumerate(job.chunks[first : first + job.bundle_chunks], first):
        sections = read_sections(
            *staged(job, "read", f"{chunk.name}.hashes"), job.num_partitions, ENTRY
        )
        for part, section in zip(parts, sections, strict=True):
            part.append(_of_chunk(section, index))
    write_sections(
        *staged(job, "hashes", f"{bundle:06d}.hashes"), [np.concatenate(part) for part in parts]
    )
    return save_record(job, "hashes", bundle, {})


def _of_chunk(entries: Records, chunk: int) -> Records:
    entries = entries.copy()
    entries["chunk"] = chunk
    return entries


def _read_hashes(job: Preparation, partition: int) -> Records:
    """What all chunks have in a hash partition, in the order of the chunks and of reading."""
    if job.bundle_chunks == 1:
        entries = [
            _of_chunk(
                read_section(
                    *staged(job, "read", f"{chunk.name}.hashes"),
                    partition,
                    job.num_partitions,
                    ENTRY,
                ),
                index,
            )
            for index, chunk in enumerate(job.chunks)
        ]
    else:
        entries = [
            read_section(
                *staged(job, "hashes", f"{bundle:06d}.hashes"), partition, job.num_partitions, ENTRY
            )
            for bundle in range(job.num_bundles)
        ]
    return np.concatenate(entries) if entries else np.empty(0, ENTRY)


def find_duplicates(job: Preparation, partition: int) -> dict[str, Any]:
    """Of the documents of one hash partition with equal text, all but the first: by split, source,
    file and offset.

    Validation sources come first: a training document that equals one of theirs is left out of
    training. Those whose label is not the first one's are counted.
    """
    held = np.array([job.sources[chunk.source].split == "validation" for chunk in job.chunks], bool)
    entries = _read_hashes(job, partition)
    if held.any():
        entries = entries[np.argsort(~held[entries["chunk"]], kind="stable")]
    order = np.lexsort((entries["low"], entries["high"]))
    high, low = entries["high"][order], entries["low"][order]
    again = np.zeros(len(order), bool)
    again[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    first = (
        order[np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))]
        if len(order)
        else order
    )
    lost, kept = entries[order[again]], entries[first[again]]
    contradicting = int((lost["class"] != kept["class"]).sum())
    if job.cleaning.deduplicate == "none":  # looked for contradictions only
        lost, kept = lost[:0], kept[:0]
    leaked = held[kept["chunk"]] & ~held[lost["chunk"]]
    drops = np.empty(len(lost), DROP)
    drops["chunk"], drops["document"] = lost["chunk"], lost["document"]
    drops = drops[np.argsort(drops["chunk"], kind="stable")]
    bounds = np.searchsorted(drops["chunk"], np.arange(1, job.num_bundles) * job.bundle_chunks)
    write_sections(
        *staged(job, "duplicates", f"{partition:06d}.drops"), np.split(drops, bounds.tolist())
    )
    return save_record(
        job,
        "duplicates",
        partition,
        {
            "duplicate": int((~leaked).sum()),
            "in_validation": int(leaked.sum()),
            "contradicting": contradicting,
        },
    )


def spread_drops(job: Preparation, bundle: int) -> dict[str, Any]:
    """What all partitions leave out of a bundle of chunks in one file, by chunk."""
    drops = np.concatenate(
        [
            read_section(
                *staged(job, "duplicates", f"{partition:06d}.drops"), bundle, job.num_bundles, DROP
            )
            for partition in range(job.num_partitions)
        ]
    )
    drops = drops[np.argsort(drops["chunk"], kind="stable")]
    chunks = bundle * job.bundle_chunks + np.arange(1, job.bundle_chunks)
    bounds = np.searchsorted(drops["chunk"], chunks)
    write_sections(*staged(job, "drops", f"{bundle:06d}.drops"), np.split(drops, bounds.tolist()))
    return save_record(job, "drops", bundle, {})


def kept_documents(job: Preparation, chunk: int, num_documents: int) -> npt.NDArray[np.bool_]:
    keep = np.ones(num_documents, bool)
    if job.bundle_chunks > 1 and job.num_partitions:
        bundle, place = divmod(chunk, job.bundle_chunks)
        found = [
            read_section(
                *staged(job, "drops", f"{bundle:06d}.drops"), place, job.bundle_chunks, DROP
            )
        ]
    else:
        found = [
            read_section(
                *staged(job, "duplicates", f"{partition:06d}.drops"), chunk, job.num_bundles, DROP
            )
            for partition in range(job.num_partitions)
        ]
    for drops in found:
        keep[drops["document"]] = False
    return keep
