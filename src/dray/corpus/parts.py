"""What the pieces of work that preparing a corpus is cut into share, and what they are.

    cut_quoted        a large csv   → where records begin, for ranges that are read apart
    scatter_part      input files   → records of documents that are gathered, by partition
    read_part         input files   → chunks: token ids, document lengths, hashes; quarantine
    gather_hashes     hashes of a bundle of chunks → one file
    find_duplicates   hashes        → the documents to leave out, one hash partition at a time
    spread_drops      what all partitions leave out of a bundle of chunks → one file
    find_bands        shingles      → bands of MinHash signatures, by partition
    find_candidates   bands         → pairs of documents that share one, by bundle of the first
    verify            pairs         → links between documents that are alike
    drop_near         all links     → the near-duplicates to leave out
    pack_chunk        chunk         → rows in random order
    mix_rows          rows of a bundle of chunks → those that go to a group of shards
    merge_rows        slices of all chunks' rows → one token shard
    tell_shard        token shard   → the same with what a model tells of its rows
    translate_shard   token shard   → the same with its texts in other words

`scatter_part` is in `scattering.py`, the others of the first three in `chunks.py`, the next three
in `duplicates.py`, four in `near.py`, three in `rows.py`, the last two, which few corpora need, in
`telling.py` and `translating.py`; each is a pure function of files to files.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import fs as pafs

from dray.corpus.reading import Span
from dray.corpus.records import Wanted
from dray.corpus.redacting import Redactor
from dray.corpus.shards import Stored, stored_columns
from dray.corpus.sources import InputFile
from dray.corpus.tokenizing import (
    TokenizerInfo,
)
from dray.spec import Cleaning, Source
from dray.storage.filesystem import (
    open_whole,
    read_bytes,
    share_filesystem,
    write_bytes,
)

STAGING = ".staging"
NAMES = b"names"
"""Where a chunk's documents say which names their numbers stand for."""
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class CorpusSource:
    """A source of the spec with its name and split; its rows stay apart from those of the
    others."""

    name: str
    split: str
    source: Source
    where: str
    names: tuple[InputFile, ...] = ()
    """Files with the names of what it gathers."""


@dataclass(frozen=True)
class Part:
    """Spans of one source that one task reads."""

    index: int
    source: int
    spans: tuple[Span, ...]
    partition: int | None = None
    """Of the records of a source that gathers, which were read before; then it has no spans."""
    scattered: tuple[int, ...] = ()
    """The pieces of work that left such records."""


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
    label: int | None = None
    """The class of all its rows, where those of a source lie apart by class."""

    @property
    def place(self) -> tuple[int, ...]:
        """What its randomness belongs to."""
        place = SPLITS.index(self.split), self.source, self.index
        return place if self.label is None else (*place, self.label)

    @property
    def file(self) -> str:
        """Of its rows, below the corpus folder."""
        label = "" if self.label is None else f"-{self.label:05d}"
        return f"{self.split}/{self.source:03d}{label}-{self.index:06d}.arrow"


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
    balance: float = 0.0
    """How far training evens out the classes; above 0 the rows of each lie apart."""
    num_labels: int | None = None
    """How many classes the spec wants; None: as many as there are."""
    known_labels: tuple[str, ...] = ()
    """The classes of a trained model that the corpus is to measure; empty: they are found."""
    work: str = "work"
    """Folder of the intermediate files: another one for inputs of other names, which the records
    tell of."""
    teller: Any = None
    """The model that tells columns of the rows (`telling.Teller`), where the task has such."""
    translators: Any = None
    """The models that write their texts in other words (`translating.Translators`)."""
    redactor: Redactor | None = None
    """What takes personal data out of their texts."""
    task_options: Mapping[str, Any] = field(default_factory=lambda: {"num_cpus": 1})
    """Ray's options of the tasks: what each takes, and where it may be."""

    @property
    def packs(self) -> bool:
        """Whether documents are packed into full rows, or kept one a row."""
        return bool(self.task.packs)

    @property
    def answers(self) -> bool:
        """Whether what goes along with documents are texts."""
        return any(field.kind == "answer" for field in self.task.fields.values())

    def wanted(self, source: Source) -> Wanted:
        """The columns of a source that make documents."""
        return Wanted.of(source, self.task.fields, source.format)

    @property
    def columns(self) -> list[Stored]:
        """The columns of the rows, once the classes are known."""
        return stored_columns(self.task, self.sequence_tokens, self.info.dtype, len(self.labels))

    def parts_labels(self, split: str) -> bool:
        """Whether the rows of a split lie apart by class, so that the order can weigh classes."""
        return self.balance > 0 and split == "train"

    @property
    def finds_near(self) -> bool:
        """Whether near-duplicates are left out."""
        return self.cleaning.deduplicate == "near"

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


def save_record(job: Preparation, stage: str, index: int, record: dict[str, Any]) -> dict[str, Any]:
    write_bytes(
        *staged(job, stage, record_name(index)),
        json.dumps(record, sort_keys=True).encode(),
        durable=False,
    )
    return record


def write_arrays(
    filesystem: pafs.FileSystem, path: str, arrays: Sequence[npt.NDArray[Any]]
) -> None:
    with open_whole(filesystem, path, durable=False) as stream:
        for array in arrays:
            stream.write(np.ascontiguousarray(array).data.cast("B"))


def write_batch(filesystem: pafs.FileSystem, path: str, batch: pa.RecordBatch) -> None:
    with (
        open_whole(filesystem, path, durable=False) as stream,
        pa.ipc.new_file(stream, batch.schema) as writer,
    ):
        writer.write_batch(batch)


def read_batch(filesystem: pafs.FileSystem, path: str) -> pa.RecordBatch:
    with filesystem.open_input_file(path) as file:
        return pa.ipc.open_file(file).get_batch(0)
