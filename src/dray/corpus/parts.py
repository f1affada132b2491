"""The pieces of work that preparing a corpus is cut into, each a pure function of files to files.

    cut_quoted        a large csv   → where records begin, for ranges that are read apart
    read_part         input files   → chunks: token ids, document lengths, hashes; quarantine
    gather_hashes     hashes of a bundle of chunks → one file
    find_duplicates   hashes        → the documents to leave out, one hash partition at a time
    spread_drops      what all partitions leave out of a bundle of chunks → one file
    pack_chunk        chunk         → rows in random order
    mix_rows          rows of a bundle of chunks → those that go to a group of shards
    merge_rows        slices of all chunks' rows → one token shard

Twice everything goes everywhere: hashes from chunks to partitions and back, rows from chunks to
shards. Of a large corpus that would be millions of small reads, so it goes there in two steps, by
way of files that hold what some of the chunks send to some of the others (`planning.py` says when).
The result is the same, byte for byte.

Each writes its files whole and then a record that names them: work whose record is there is never
done again. How work is cut depends on the inputs alone: the result is the same whatever ran where,
how often, or when it was stopped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as pafs

from dray.corpus.cleaning import Hashes, clean, hash_texts, held_out
from dray.corpus.compression import SAMPLE_BYTES, decode_sample
from dray.corpus.contents import check_unchanged
from dray.corpus.packing import Aligned, Ints, Rows, gather, one_a_row, order_by_length, pack
from dray.corpus.reading import Bad, Documents, FileCounts, Span, SpanReader, find_bounds
from dray.corpus.records import PLAIN, Wanted
from dray.corpus.sections import Records, read_section, read_sections, write_sections
from dray.corpus.shards import Stored, make_batch, stored_columns, write_shard
from dray.corpus.sources import InputFile
from dray.corpus.tokenizing import (
    TokenizerInfo,
    find_word_starts,
    load_decoder,
    load_encoder,
    read_tokenizer_files,
)
from dray.errors import CorpusError
from dray.spec import Cleaning, Field, Source
from dray.storage.filesystem import (
    child,
    make_folder,
    open_whole,
    read_bytes,
    share_filesystem,
    write_bytes,
)

STAGING = ".staging"
BATCH_BYTES = 4 * 1024 * 1024
"""Text that is cleaned and encoded at once."""
WINDOW_GROUPS = 64
MAX_QUARANTINED = 10_000
"""Bad records of one part that are listed one by one; all are counted."""
DOCUMENT = "document"
"""The column that says which document of the corpus a row is of, if the task has it."""
NAMES = b"names"
"""Where a chunk's documents say which names their numbers stand for."""
SPLITS = ("train", "validation")
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


@dataclass(frozen=True)
class CorpusSource:
    """A source of the spec with its name and split; its rows stay apart from those of the
    others."""

    name: str
    split: str
    source: Source
    where: str


@dataclass(frozen=True)
class Part:
    """Spans of one source that one task reads."""

    index: int
    source: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Chunk:
    """What came of a part, or of a piece of a large one."""

    name: str
    source: int


@dataclass(frozen=True)
class Slice:
    """Some of the rows in an intermediate file."""

    file: str
    start: int
    num_rows: int
    rows_in_file: int


@dataclass(frozen=True)
class ShardPlan:
    """One shard: which rows it holds, one slice after the other."""

    split: str
    source: int
    index: int
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class MixPlan:
    """One file on the way from a bundle of chunks to a group of shards."""

    file: str
    slices: tuple[Slice, ...]
    """One of each chunk: its rows for the whole group, in the order of the shards."""
    counts: npt.NDArray[np.int64]
    """[slices, shards]: how many of a slice's rows go to each shard."""


@dataclass(frozen=True)
class Preparation:
    """What every task knows: settings, and what earlier stages found out."""

    folder: str
    sources: tuple[CorpusSource, ...]
    cleaning: Cleaning
    max_record_bytes: int
    sequence_tokens: int
    group_rows: int
    shuffle_seed: int
    task: Any
    """What is learnt of the rows, and how documents become some (`dray.tasks`)."""
    share: float
    """Share of the documents held out for validation; 0: none."""
    chunk_bytes: int
    num_partitions: int
    """Hash partitions for deduplication; 0: no deduplication."""
    bundle_chunks: int = 1
    """Chunks whose hashes travel together, to find duplicates and back; 1: each by itself."""
    tokenizer: TokenizerInfo | None = None
    chunks: tuple[Chunk, ...] = ()
    labels: tuple[str, ...] = ()
    """Names of the classes in the order of their ids."""
    num_labels: int | None = None
    """How many classes the spec wants; None: as many as there are."""
    known_labels: tuple[str, ...] = ()
    """The classes of a trained model that the corpus is to measure; empty: they are found."""
    work: str = "work"
    """Folder of the intermediate files: another one for inputs of other names, which the records
    tell of."""

    @property
    def packs(self) -> bool:
        """Whether documents are packed into full rows, or kept one a row."""
        return bool(self.task.packs)

    def wanted(self, source: Source) -> Wanted:
        """The columns of a source that make documents."""
        return Wanted.of(source, self.task.fields, source.format)

    @property
    def columns(self) -> list[Stored]:
        """The columns of the rows, once the classes are known."""
        return stored_columns(self.task, self.sequence_tokens, self.info.dtype, len(self.labels))

    @property
    def num_bundles(self) -> int:
        return -(-len(self.chunks) // self.bundle_chunks)

    @property
    def info(self) -> TokenizerInfo:
        if self.tokenizer is None:
            raise RuntimeError("the tokeniser comes first")
        return self.tokenizer

    def rng(self, *place: int) -> np.random.Generator:
        """A generator that belongs to the corpus and a place in it."""
        return np.random.Generator(
            np.random.PCG64(np.random.SeedSequence([self.shuffle_seed % 2**64, *place]))
        )


def staged(job: Preparation, *names: str) -> tuple[pafs.FileSystem, str]:
    """Filesystem and path of an intermediate file."""
    filesystem, path = share_filesystem(job.folder)
    return filesystem, "/".join((path, STAGING, job.work, *names))


def record_name(index: int) -> str:
    return f"{index:06d}.json"


def load_record(job: Preparation, stage: str, index: int) -> dict[str, Any] | None:
    """The record of finished work; None if it has yet to be done."""
    try:
        return cast(dict[str, Any], json.loads(read_bytes(*staged(job, stage, record_name(index)))))
    except FileNotFoundError:
        return None


def _save_record(
    job: Preparation, stage: str, index: int, record: dict[str, Any]
) -> dict[str, Any]:
    write_bytes(
        *staged(job, stage, record_name(index)),
        json.dumps(record, sort_keys=True).encode(),
        durable=False,
    )
    return record


# --- cut ----------------------------------------------------------------------------------------


def cut_quoted(job: Preparation, item: tuple[int, InputFile, Source, int]) -> dict[str, Any]:
    """Where a large file with quoted fields may be cut into ranges of about a size. Returns its
    record."""
    index, file, source, size = item
    return _save_record(
        job,
        "cuts",
        index,
        {"bounds": find_bounds(file, source, job.max_record_bytes, size, job.task.fields)},
    )


# --- read ---------------------------------------------------------------------------------------


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


def read_part(job: Preparation, part: Part) -> dict[str, Any]:
    """Read, clean, hash and encode the documents of a part. Returns its record. Raises
    CorpusError."""
    check_unchanged(dict.fromkeys(span.file for span in part.spans))
    files: dict[str, FileCounts] = {}
    quarantine: list[Bad] = []

    def tally(reader: SpanReader, documents: Documents | None) -> None:
        counts = files.setdefault(reader.span.file.name, FileCounts(reader.span.file.form))
        if documents is None:
            counts.note, counts.sha256 = counts.note or reader.note, counts.sha256 or reader.sha256
        else:
            counts.add(documents)
            quarantine.extend(documents.bad[: MAX_QUARANTINED - len(quarantine)])

    writer = _ChunkWriter(job, part.index)
    dropped: Counter[str] = Counter()
    for batch in read_batches(
        part.spans,
        job.sources[part.source].source,
        job.max_record_bytes,
        tally,
        job.task.fields,
    ):
        cleaned = clean(batch.texts, batch.labels, job.cleaning)
        dropped += cleaned.dropped
        writer.add(cleaned.texts, cleaned.labels)
    writer.close()
    check_unchanged(dict.fromkeys(span.file for span in part.spans))
    lines = [json.dumps(vars(bad), ensure_ascii=False) + "\n" for bad in quarantine]
    if lines:
        write_bytes(
            *staged(job, "read", f"{part.index:06d}.quarantine.jsonl"),
            "".join(lines).encode(),
            durable=False,
        )
    num_bad = sum(counts.num_bad for counts in files.values())
    return _save_record(
        job,
        "read",
        part.index,
        {
            "files": {name: vars(counts) for name, counts in files.items()},
            "dropped": dict(dropped),
            "num_bad": num_bad,
            "num_records": num_bad + sum(counts.num_documents for counts in files.values()),
            "chunks": writer.chunks,
            "num_chunk_documents": writer.num_documents,
            "labels": dict(sorted(writer.labels.items())),
        },
    )


class _Tools:
    """What a task encodes the documents of a part with."""

    def __init__(self, job: Preparation) -> None:
        info = job.info
        self.prefix, self.middle, self.suffix = info.prefix, info.middle, info.suffix
        self.row_tokens, self.dtype = job.sequence_tokens, info.dtype
        self._folder, self._vocab_size = child(job.folder, "tokenizer"), info.vocab_size
        self._encoder = load_encoder(child(job.folder, "tokenizer"), info.encoder)
        self.names: dict[str, int] = {}
        """Numbers of the names met so far."""
        self.counts: Counter[str] = Counter()

    def encode(self, texts: pa.Array) -> tuple[npt.NDArray[np.uint32], Ints]:
        return self._encoder.encode(texts)

    def encode_words(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        tokenizer = load_decoder(self._folder)
        if not hasattr(tokenizer, "encode_batch"):  # transformers' slow ones know no places
            raise CorpusError(
                "tokenizer.path",
                "the tokeniser does not tell which word a token is of",
                "tokens of words need a tokenizer.json",
                "convert the tokeniser to a fast one",
            )
        found = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(item.ids, [start for start, _ in item.offsets]) for item in found]

    @cached_property
    def word_starts(self) -> npt.NDArray[np.uint8]:
        return find_word_starts(read_tokenizer_files(self._folder), self._vocab_size)

    def number(self, names: pa.Array) -> npt.NDArray[np.int32]:
        """Numbers of names, which are counted; -1 for null."""
        encoded = names.dictionary_encode()
        met = encoded.dictionary.to_pylist()
        own = [self.names.setdefault(name, len(self.names)) for name in met]
        places = encoded.indices.fill_null(len(own)).to_numpy()
        found: npt.NDArray[np.int32] = np.array([*own, -1], np.int32)[places]
        for name, count in zip(met, np.bincount(places, minlength=len(met)), strict=False):
            self.counts[name] += int(count)
        return found


class _ChunkWriter:
    """Gathers encoded documents and writes a chunk whenever there are enough."""

    def __init__(self, job: Preparation, part: int) -> None:
        self._job, self._part = job, part
        self._tools = _Tools(job)
        self._tokens: list[npt.NDArray[np.unsignedinteger]] = []
        self._columns: dict[str, list[Any]] = {}
        self._text_bytes = self._num_records = 0
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
        encoded = self._job.task.encode(texts, targets, self._tools)
        bounds = np.frombuffer(texts.buffers()[1], np.int64)[
            texts.offset : texts.offset + len(texts) + 1
        ]
        high, low = hash_texts(texts)
        columns = {"num_bytes": np.diff(bounds), "high": high, "low": low}
        if targets is not None:
            columns["class"] = hash_texts(targets.cast(pa.large_string()))[1]
        columns["record"] = self._num_records + np.arange(len(texts))
        self._num_records += len(texts)
        if encoded.records is not None:
            columns = {name: values[encoded.records] for name, values in columns.items()}
            columns["num_bytes"][_further(columns["record"])] = 0
        lost = (
            np.zeros(len(encoded.lengths), np.int64)
            if encoded.num_lost is None
            else encoded.num_lost
        )
        self._tokens.append(encoded.tokens)
        for name, values in {
            "num_tokens": encoded.lengths,
            "num_lost": lost,
            **columns,
            **encoded.columns,
        }.items():
            self._columns.setdefault(name, []).append(values)
        self._text_bytes += int(bounds[-1] - bounds[0])
        if self._text_bytes >= self._job.chunk_bytes:
            self.close()

    def close(self) -> None:
        """Write what has been gathered as a chunk."""
        if not self._columns:
            return
        name = f"{self._part:06d}-{len(self.chunks):04d}"
        filesystem, path = staged(self._job, "read", name)
        make_folder(filesystem, path.rpartition("/")[0])
        _write_arrays(filesystem, f"{path}.tokens", self._tokens)
        for column in self._job.task.columns:
            if column.each == "token":
                _write_arrays(filesystem, f"{path}.{column.name}", self._columns.pop(column.name))
        columns = {name: _join(parts) for name, parts in self._columns.items()}
        high, low, classes = columns.pop("high"), columns["low"], columns.pop("class", None)
        batch = pa.record_batch({name: pa.array(values) for name, values in columns.items()})
        names = json.dumps(list(self._tools.names)).encode()
        batch = batch.replace_schema_metadata({NAMES: names})
        _write_batch(filesystem, f"{path}.documents", batch)
        if self._job.num_partitions:
            write_sections(
                filesystem,
                f"{path}.hashes",
                _partition(high, low, classes, columns["record"], self._job.num_partitions),
            )
        self.chunks.append(name)
        self.num_documents += len(high)
        self._tokens, self._columns, self._text_bytes = [], {}, 0


def _further(records: Ints) -> npt.NDArray[np.bool_]:
    """Which documents are not the first that came of their record."""
    further = np.zeros(len(records), bool)
    further[1:] = records[1:] == records[:-1]
    return further


def _write_arrays(
    filesystem: pafs.FileSystem, path: str, arrays: Sequence[npt.NDArray[Any]]
) -> None:
    with open_whole(filesystem, path, durable=False) as stream:
        for array in arrays:
            stream.write(np.ascontiguousarray(array).data.cast("B"))


def _join(parts: Sequence[Any]) -> Any:
    return pa.concat_arrays(parts) if isinstance(parts[0], pa.Array) else np.concatenate(parts)


def _partition(
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
    place[_further(records)] = num_partitions
    order = np.argsort(place, kind="stable")
    order = order[: int((place < num_partitions).sum())]
    entries = np.zeros(len(order), ENTRY)
    entries["high"], entries["low"], entries["document"] = high[order], low[order], order
    if classes is not None:
        entries["class"] = classes[order]
    bounds = np.searchsorted(place[order], np.arange(1, num_partitions))
    return np.split(entries, bounds.tolist())


def _write_batch(filesystem: pafs.FileSystem, path: str, batch: pa.RecordBatch) -> None:
    with (
        open_whole(filesystem, path, durable=False) as stream,
        pa.ipc.new_file(stream, batch.schema) as writer,
    ):
        writer.write_batch(batch)


def _read_batch(filesystem: pafs.FileSystem, path: str) -> pa.RecordBatch:
    with filesystem.open_input_file(path) as file:
        return pa.ipc.open_file(file).get_batch(0)


# --- deduplicate --------------------------------------------------------------------------------


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
    return _save_record(job, "hashes", bundle, {})


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
    return _save_record(
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
    return _save_record(job, "drops", bundle, {})


def _kept(job: Preparation, chunk: int, num_documents: int) -> npt.NDArray[np.bool_]:
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


# --- pack ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Encoded:
    """The documents of a chunk, or some of them."""

    tokens: npt.NDArray[np.unsignedinteger]
    lengths: Ints
    aligned: Aligned
    """What goes along with the tokens."""
    columns: pa.RecordBatch
    """What documents have one each of."""

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = self.columns.column(name).to_numpy()
        return found

    def take(self, chosen: Ints) -> _Encoded:
        """Some of the documents."""
        if len(chosen) == len(self.lengths):
            return self
        starts, lengths = (np.cumsum(self.lengths) - self.lengths)[chosen], self.lengths[chosen]
        return _Encoded(
            gather(self.tokens, starts, lengths),
            lengths,
            {n: (gather(v, starts, lengths), pad) for n, (v, pad) in self.aligned.items()},
            self.columns.take(pa.array(chosen)),
        )


def _load_documents(job: Preparation, chunk: Chunk) -> _Encoded:
    filesystem, path = staged(job, "read", chunk.name)

    def read(name: str, kind: str) -> npt.NDArray[Any]:
        return np.frombuffer(read_bytes(filesystem, f"{path}.{name}"), kind)

    columns = _read_batch(filesystem, f"{path}.documents")
    classes = _class_ids(job, columns)
    aligned = {}
    for column in job.task.columns:
        if column.each == "token":
            values = read(column.name, column.dtype)
            aligned[column.name] = (
                _renumber(values, classes) if column.names else values,
                column.pad,
            )
    tokens = read("tokens", job.info.dtype)
    return _Encoded(tokens, columns.column("num_tokens").to_numpy(), aligned, columns)


def pack_chunk(job: Preparation, index: int) -> dict[str, Any]:
    """Turn the documents of a chunk into rows, in random order, apart for each split. Returns
    counts by split."""
    chunk = job.chunks[index]
    documents = _load_documents(job, chunk)
    further = _further(documents["record"])
    keep = _kept(job, index, len(documents.lengths))
    keep = keep[np.maximum.accumulate(np.where(further, 0, np.arange(len(keep))))]
    own = job.sources[chunk.source].split
    held = np.full(len(documents.lengths), own == "validation")
    if job.share and own == "train":
        held = held_out(documents["low"], job.share)
    record: dict[str, Any] = {}
    for split, wanted in zip(SPLITS, (keep & ~held, keep & held), strict=True):
        chosen = np.flatnonzero(wanted)
        if len(chosen):
            mine = documents.take(chosen)
            if split == "validation" and job.packs:
                _write_sample(job, index, mine)
            rows, values = _make_rows(job, index, mine)
            order = job.rng(1, index, SPLITS.index(split)).permutation(len(rows.num_tokens))
            _write_rows(
                *staged(job, "packed", f"{index:06d}.{split}"),
                [values[column.name] for column in job.columns],
                order,
            )
            lost = mine["num_lost"]
            record[split] = {
                "num_rows": len(order),
                "num_documents": int((~further[chosen]).sum()),
                "num_tokens": int(rows.num_tokens.sum()),
                "num_text_bytes": int(mine["num_bytes"].sum()),
                "num_cut_documents": rows.num_cut_documents,
                "num_truncated_documents": rows.num_truncated_documents + int((lost > 0).sum()),
                "num_truncated_tokens": rows.num_truncated_tokens + int(lost.sum()),
            }
            if job.labels:
                record[split]["by_label"] = _count_classes(job, values)
    return _save_record(job, "packed", index, record)


def _count_classes(job: Preparation, values: Mapping[str, npt.NDArray[Any]]) -> list[int]:
    """How often each class is there."""
    counts = np.zeros(len(job.labels), np.int64)
    for column in job.task.columns:
        found = values[column.name]
        if column.hot:
            counts += found.sum(axis=0, dtype=np.int64)
        elif column.names:
            counts += np.bincount(found[found >= 0].reshape(-1), minlength=len(counts))
    return [int(count) for count in counts]


def _write_sample(job: Preparation, index: int, documents: _Encoded) -> None:
    tokenizer = load_decoder(child(job.folder, "tokenizer"))
    text = decode_sample(
        tokenizer,
        documents.tokens,
        documents.lengths,
        np.arange(len(documents.lengths)),
        SAMPLE_BYTES // len(job.chunks),
    )
    write_bytes(*staged(job, "packed", f"{index:06d}.text"), text, durable=False)


def _make_rows(
    job: Preparation, index: int, documents: _Encoded
) -> tuple[Rows, dict[str, npt.NDArray[Any]]]:
    """Documents as rows, and the columns of these by name."""
    info, width = job.info, job.sequence_tokens
    tokens, lengths, aligned = documents.tokens, documents.lengths, documents.aligned
    if job.packs:
        rows = pack(tokens, lengths, width, info.filler, aligned)
    else:
        around = {"prefix": info.prefix, "suffix": info.suffix}
        extended = [column.name for column in job.task.columns if column.extends]
        rows = one_a_row(
            tokens, lengths, width, info.filler, aligned=aligned, extended=extended, **around
        )
    values = {"input_ids": rows.tokens, "num_tokens": rows.num_tokens, **rows.aligned}
    classes = _class_ids(job, documents.columns)
    for column in job.task.columns:
        if column.name == DOCUMENT:
            values[DOCUMENT] = (index << 32) + documents["record"]
        elif column.each == "row":
            found = documents.columns.column(column.name)
            values[column.name] = _row_values(column, found, classes, len(job.labels))
    return rows, values


def _class_ids(job: Preparation, documents: pa.RecordBatch) -> npt.NDArray[np.int32]:
    """The id of the class that each number of a chunk stands for, and what is no class last."""
    ids = {label: index for index, label in enumerate(job.labels)}
    names = json.loads((documents.schema.metadata or {}).get(NAMES, b"[]"))
    return np.array([ids.get(name, -1) for name in names] + [-1], np.int32)


def _renumber(numbers: npt.NDArray[Any], classes: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Class ids of numbers; negative ones stay as they are."""
    return np.where(numbers < 0, numbers, classes[np.maximum(numbers, -1)])


def _row_values(
    column: Any, found: pa.Array, classes: npt.NDArray[np.int32], num_labels: int
) -> npt.NDArray[Any]:
    if not column.hot:
        values = found.to_numpy(zero_copy_only=False).astype(column.dtype)
        return _renumber(values, classes) if column.names else values
    hot = np.zeros((len(found), num_labels), column.dtype)
    lengths = pc.list_value_length(found).to_numpy(zero_copy_only=False)
    numbers = found.flatten().to_numpy(zero_copy_only=False)
    hot[np.repeat(np.arange(len(found)), lengths), classes[numbers]] = 1
    return hot


def _write_rows(
    filesystem: pafs.FileSystem, path: str, columns: Sequence[npt.NDArray[Any]], order: Ints
) -> None:
    """One column of the rows after the other, as plain bytes: a slice of each is one range."""
    make_folder(filesystem, path.rpartition("/")[0])
    _write_arrays(filesystem, path, [column[order] for column in columns])


# --- merge --------------------------------------------------------------------------------------


def mix_rows(job: Preparation, item: tuple[int, MixPlan]) -> dict[str, Any]:
    """Write the rows that a bundle of chunks sends to a group of shards, shard after shard."""
    index, plan = item
    shard_of = np.concatenate([np.repeat(np.arange(len(counts)), counts) for counts in plan.counts])
    _write_rows(
        *staged(job, plan.file),
        list(_read_slices(job, plan.slices).values()),
        np.argsort(shard_of, kind="stable"),
    )
    return _save_record(job, "mixed", index, {})


def merge_rows(job: Preparation, item: tuple[int, ShardPlan]) -> dict[str, Any]:
    """Write one shard from its slices of the chunks, in a random order of its own. Returns the
    shard's record."""
    index, plan = item
    rng = job.rng(2, SPLITS.index(plan.split), plan.source, plan.index)
    values = _read_slices(job, plan.slices)
    num_tokens = values["num_tokens"]
    order = rng.permutation(len(num_tokens))
    if not job.packs:
        order = order[order_by_length(num_tokens[order], job.group_rows, WINDOW_GROUPS, rng)]
    for name in list(values):
        values[name] = values.pop(name)[order]  # one at a time: a shard is there twice for none
    file = f"{plan.split}/{plan.source:03d}-{plan.index:06d}.arrow"
    rows = make_batch(job.columns, values)
    shard = write_shard(*share_filesystem(job.folder), file, rows, job.group_rows)
    return _save_record(job, "shards", index, shard.model_dump())


def _read_slices(job: Preparation, slices: Sequence[Slice]) -> dict[str, npt.NDArray[Any]]:
    """The columns of rows by name, slice after slice."""
    num_rows = sum(piece.num_rows for piece in slices)
    columns = job.columns
    values = {column.name: np.empty((num_rows, *column.shape), column.dtype) for column in columns}
    done = 0
    for piece in slices:
        filesystem, path = staged(job, piece.file)
        begin = 0
        with filesystem.open_input_file(path) as file:
            for column in columns:
                size = column.row_bytes
                data = file.read_at(piece.num_rows * size, begin + piece.start * size)
                found = np.frombuffer(data, column.dtype).reshape(piece.num_rows, *column.shape)
                values[column.name][done : done + piece.num_rows] = found
                begin += piece.rows_in_file * size
        done += piece.num_rows
    return values
