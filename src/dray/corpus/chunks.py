"""From spans of files to chunks of encoded documents, with what could not be read set aside.

A chunk is its documents' tokens end to end, what its task gives them besides, and hashes by which
equal ones are found.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dray.corpus.cleaning import hash_texts
from dray.corpus.contents import check_unchanged
from dray.corpus.documents import cleaned, with_examples
from dray.corpus.duplicates import further_pieces, partition_hashes
from dray.corpus.encoded import GIVEN_TEXT, as_array, check_encoded, given
from dray.corpus.examples import Examples, merged
from dray.corpus.gathering import TOO_FEW, gathered_documents
from dray.corpus.near import write_shingles
from dray.corpus.parts import (
    NAMES,
    Part,
    Preparation,
    save_record,
    staged,
    write_arrays,
    write_batch,
)
from dray.corpus.reading import Bad, Documents, FileCounts, Span, SpanReader, find_bounds
from dray.corpus.records import PLAIN
from dray.corpus.sections import write_sections
from dray.corpus.shingles import Shingles, gathered, shingle
from dray.corpus.sources import InputFile
from dray.corpus.tools import Tools
from dray.errors import CorpusError, one_line, translated
from dray.spec import Field, Source
from dray.storage.filesystem import (
    child,
    make_folder,
    write_bytes,
)
from dray.tasks.rows import Encoded

BATCH_BYTES = 4 * 1024 * 1024
"""Text that is cleaned and encoded at once."""
COUNTED = ("dropped", "redacted", "removed", "languages")
"""What is counted of cleaned documents by reason, kind or language."""
MAX_QUARANTINED = 10_000
"""Bad records of one part that are listed one by one; all are counted."""


def cut_quoted(job: Preparation, item: tuple[int, InputFile, Source, int]) -> dict[str, Any]:
    """Where a large file with quoted fields may be cut into ranges of about a size. Returns its
    record."""
    index, file, source, size = item
    return save_record(
        job,
        "cuts",
        index,
        {"bounds": find_bounds(file, source, job.max_record_bytes, size, job.task.fields)},
    )


def read_batches(
    spans: Sequence[Span],
    source: Source,
    max_record_bytes: int,
    tally: Callable[[SpanReader, Documents | None], None],
    fields: Mapping[str, Field] = PLAIN,
) -> Iterator[Documents]:
    """The documents of spans in batches of some megabytes, whether they come from one file or from
    a thousand.

    `tally` is told of what each span gave, and at its end of its reader alone.
    """
    pending: list[Documents] = []
    size = 0
    for span in spans:
        reader = SpanReader(span, source, max_record_bytes, fields)
        for documents in reader.read():
            tally(reader, documents)
            if len(documents.texts):
                pending.append(documents)
                size += documents.texts.nbytes
            if size >= BATCH_BYTES:
                yield _joined(pending)
                pending, size = [], 0
        tally(reader, None)
    if pending:
        yield _joined(pending)


def _joined(batches: Sequence[Documents]) -> Documents:
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return Documents(
        pa.concat_arrays([batch.texts for batch in batches]),
        pa.concat_arrays(labels) if labels else None,
    )


class Tally:
    """What was read of each file, and what of it could not be."""

    def __init__(self) -> None:
        self._files: dict[str, FileCounts] = {}
        self._quarantine: list[Bad] = []
        self.dropped: Counter[str] = Counter()
        """Records that are no documents, by reason."""

    def __call__(self, reader: SpanReader, documents: Documents | None) -> None:
        counts = self._files.setdefault(reader.span.file.name, FileCounts(reader.span.file.form))
        if documents is None:
            counts.note, counts.sha256 = counts.note or reader.note, counts.sha256 or reader.sha256
        else:
            counts.add(documents)
            self.dropped += documents.dropped
            self._quarantine.extend(documents.bad[: MAX_QUARANTINED - len(self._quarantine)])

    def write_quarantine(self, job: Preparation, stage: str, index: int) -> None:
        """Write the bad records of a piece of work, if there are any."""
        lines = [json.dumps(vars(bad), ensure_ascii=False) + "\n" for bad in self._quarantine]
        if lines:
            write_bytes(
                *staged(job, stage, f"{index:06d}.quarantine.jsonl"),
                "".join(lines).encode(),
                durable=False,
            )

    def record(self) -> dict[str, Any]:
        """The counts as plain values."""
        files = self._files.values()
        num_bad = sum(counts.num_bad for counts in files)
        return {
            "files": {name: vars(counts) for name, counts in self._files.items()},
            "num_bad": num_bad,
            "num_records": num_bad
            + sum(counts.num_documents + counts.num_dropped for counts in files),
            "dropped": dict(self.dropped),
        }


def part_documents(
    job: Preparation, part: Part, tally: Callable[[SpanReader, Documents | None], None]
) -> Iterator[Documents]:
    """The documents of a part: read from its files, or gathered from records that were."""
    if part.partition is None:
        yield from read_batches(
            part.spans,
            job.sources[part.source].source,
            job.max_record_bytes,
            tally,
            job.task.fields,
        )
        return
    for _, texts, num_dropped in gathered_documents(job, part):
        yield Documents(texts, None, dropped=Counter({TOO_FEW: num_dropped}))


def read_part(job: Preparation, part: Part) -> dict[str, Any]:
    """Read, clean, hash and encode the documents of a part. Returns its record. Raises
    CorpusError."""
    check_unchanged(dict.fromkeys(span.file for span in part.spans))
    tally = Tally()
    writer = _ChunkWriter(job, part)
    counts: dict[str, Counter[str]] = {name: Counter() for name in COUNTED}
    examples: Examples = {}
    num_redacted = 0
    own = job.sources[part.source]
    for batch in part_documents(job, part, tally):
        found = with_examples(job, own, cleaned(job, own, batch.texts, batch.labels))
        for name, counter in counts.items():
            counter.update(getattr(found, name))
        counts["dropped"] += batch.dropped
        num_redacted += found.num_redacted
        examples = merged([examples, found.examples])
        writer.add(found.texts, found.labels)
    writer.close()
    check_unchanged(dict.fromkeys(span.file for span in part.spans))
    tally.write_quarantine(job, "read", part.index)
    return save_record(
        job,
        "read",
        part.index,
        {
            **tally.record(),
            **counts,
            "dropped": counts["dropped"] + writer.refused + tally.dropped,
            "chunks": writer.chunks,
            "num_chunk_documents": writer.num_documents,
            "labels": dict(sorted(writer.labels.items())),
            "num_redacted": num_redacted,
            "examples": examples,
        },
    )


class _ChunkWriter:
    """Gathers encoded documents and writes a chunk whenever there are enough."""

    def __init__(self, job: Preparation, part: Part) -> None:
        self._job, self._part = job, part
        self.refused: Counter[str] = Counter()
        self._tools = Tools(child(job.folder, "tokenizer"), job.info, job.sequence_tokens)
        self._tokens: list[npt.NDArray[np.unsignedinteger]] = []
        self._columns: dict[str, list[Any]] = {}
        self._shingles: list[Shingles] = []
        self._num_bytes = self._num_records = 0
        self.chunks: list[str] = []
        self.num_documents = 0

    @property
    def labels(self) -> Counter[str]:
        """How often each class was met."""
        return self._tools.counts

    def add(self, texts: pa.Array, targets: pa.Array | None) -> None:
        """Encode a batch of cleaned documents."""
        if not len(texts):
            return
        encoded = self._encode(texts, targets)
        self.refused.update(encoded.refused.values())
        bounds = np.frombuffer(texts.buffers()[1], np.int64)[
            texts.offset : texts.offset + len(texts) + 1
        ]
        high, low = hash_texts(texts)
        columns = {"num_bytes": np.diff(bounds), "high": high, "low": low}
        if targets is not None:
            columns["class"] = hash_texts(targets.cast(pa.large_string()))[1]
        if self._job.finds_near:
            shingles, counts = shingle(texts, self._job.cleaning.near.shingle_words)
            columns["shingles"] = counts
        columns["record"] = self._num_records + np.arange(len(texts))
        self._num_records += len(texts)
        if encoded.records is not None:
            columns = {name: values[encoded.records] for name, values in columns.items()}
            further = further_pieces(columns["record"])
            columns["num_bytes"][further] = 0
            if self._job.finds_near:  # those of the texts that are left, each at its first piece
                columns["shingles"][further] = 0
                shingles = gathered(shingles, counts, encoded.records[~further])
        lost = (
            np.zeros(len(encoded.lengths), np.int64)
            if encoded.num_lost is None
            else encoded.num_lost
        )
        if self._job.finds_near:
            self._shingles.append(shingles)
        self._tokens.append(encoded.tokens)
        for name, values in {
            "num_tokens": encoded.lengths,
            "num_lost": lost,
            **columns,
            **encoded.columns,
        }.items():
            self._columns.setdefault(name, []).append(values)
        self._num_bytes += int(bounds[-1] - bounds[0])
        for column in self._job.task.columns:
            if column.shape or column.varies:
                self._num_bytes += encoded.columns[column.name].nbytes
        if self._num_bytes >= self._job.chunk_bytes:
            self.close()

    def _encode(self, texts: pa.Array, targets: pa.Array | None) -> Encoded:
        """What the task makes of documents. Raises CorpusError for what it cannot."""
        task = self._job.task
        names = list(dict.fromkeys(span.file.name for span in self._part.spans)) or list(
            self._job.sources[self._part.source].source.paths
        )
        among = f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''}"

        def explain(error: Exception) -> CorpusError:
            return CorpusError(
                f"task {task.name}",
                f"its encode failed among documents of {among} ({one_line(error)})",
                "a document that is none costs itself",
                "let encode name such records in Encoded.refused, or mend the documents",
            )

        with translated(explain):
            encoded: Encoded = task.encode(texts, targets, self._tools)
        checked = check_encoded(
            task,
            encoded,
            len(texts),
            vocab_size=self._job.info.vocab_size,
            num_names=len(self._tools.names),
        )
        own = given(task, checked, texts, targets) if GIVEN_TEXT in task.columns else {}
        return replace(checked, columns={**checked.columns, **own})

    def close(self) -> None:
        """Write what has been gathered as a chunk."""
        if not self._columns:
            return
        name = f"{self._part.index:06d}-{len(self.chunks):04d}"
        filesystem, path = staged(self._job, "read", name)
        make_folder(filesystem, path.rpartition("/")[0])
        write_arrays(filesystem, f"{path}.tokens", self._tokens)
        for column in self._job.task.columns:
            if column.each == "token":
                write_arrays(filesystem, f"{path}.{column.name}", self._columns.pop(column.name))
        columns = {name: _join(parts) for name, parts in self._columns.items()}
        high, low, classes = columns.pop("high"), columns["low"], columns.pop("class", None)
        if self._job.finds_near:
            none = np.zeros(len(high), np.uint64)
            own = none if classes is None else classes
            shingles = np.concatenate(self._shingles)
            write_shingles(filesystem, path, shingles, columns.pop("shingles"), own)
        batch = pa.record_batch({name: as_array(values) for name, values in columns.items()})
        names = json.dumps(list(self._tools.names)).encode()
        batch = batch.replace_schema_metadata({NAMES: names})
        write_batch(filesystem, f"{path}.documents", batch)
        if self._job.num_partitions:
            write_sections(
                filesystem,
                f"{path}.hashes",
                partition_hashes(high, low, classes, columns["record"], self._job.num_partitions),
            )
        self.chunks.append(name)
        self.num_documents += len(high)
        self._tokens, self._columns, self._num_bytes = [], {}, 0
        self._shingles = []


def _join(parts: Sequence[Any]) -> Any:
    return pa.concat_arrays(parts) if isinstance(parts[0], pa.Array) else np.concatenate(parts)
