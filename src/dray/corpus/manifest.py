"""The manifest of a prepared corpus: what its token shards hold and where they came from.

Written last, so that its presence means that the corpus is complete. It holds no time and no name
of a machine: the same inputs and settings give the same bytes. Refuses manifests of another
version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pyarrow import fs as pafs
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from dray.errors import CorpusError, StoreError
from dray.runs import Run
from dray.storage.filesystem import exists, open_filesystem, read_bytes

VERSION = 3
"""Of the manifest's form; version 2, which held the source files itself, is read too."""
ROWS_VERSION = 3
"""Raised when the same inputs and settings give other rows: it is a part of a corpus' key."""
MANIFEST = "manifest.json"
SOURCE_FILES = "source_files.json"
EXAMPLES = "examples.json"
"""Some documents of each fate."""
EXPORTED_MANIFEST = "dray-corpus.json"
"""What a model must know of its corpus, in a folder that it was exported to."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Record):
    """One Arrow IPC file of rows."""

    file: Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$")]
    """Path below the corpus folder, and of nothing else: a manifest may come from anybody."""
    num_rows: Annotated[int, Field(ge=0)]
    num_bytes: Annotated[int, Field(ge=0)]
    sha256: str


class SourceRows(_Record):
    """The rows of one source, numbered 0.. through its shards in order."""

    name: str
    weight: float | None
    num_rows: int
    num_documents: int
    num_tokens: int
    """Tokens in the rows, padding excluded."""
    num_text_bytes: int
    """UTF-8 bytes of the cleaned text in these rows."""
    shards: tuple[Shard, ...]

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if self.num_rows != sum(shard.num_rows for shard in self.shards):
            raise ValueError("the shards have other rows in all than their source")
        return self


class Split(_Record):
    """The training or the validation rows: those of one source after the other."""

    sources: tuple[SourceRows, ...]
    documents_by_label: dict[str, int] = {}
    """Documents of each class; empty for tasks without labels."""

    @property
    def num_rows(self) -> int:
        return sum(source.num_rows for source in self.sources)

    @property
    def num_documents(self) -> int:
        return sum(source.num_documents for source in self.sources)

    @property
    def num_tokens(self) -> int:
        return sum(source.num_tokens for source in self.sources)

    @property
    def num_text_bytes(self) -> int:
        return sum(source.num_text_bytes for source in self.sources)

    @property
    def num_bytes(self) -> int:
        """Bytes of the token shards."""
        return sum(shard.num_bytes for source in self.sources for shard in source.shards)


class SourceFile(_Record):
    """One input file as it was read."""

    path: str
    num_bytes: int
    """Size on storage, compressed if it is."""
    sha256: str
    """Of the file as it lies on storage."""
    num_documents: int
    """Documents read from it, before cleaning and deduplication."""
    num_bad: int
    """Records in it that could not be read, as far as known; they are listed in
    quarantine.jsonl."""
    num_dropped: Annotated[int, Field(exclude_if=lambda count: not count)] = 0
    """Records in it that are no documents, such as the requests of a crawl."""
    form: str = ""
    """As `format` of a source has it."""
    num_content_bytes: int = 0
    """Bytes of its content that were read, decompressed, bad records included."""
    num_bad_bytes: int = 0
    """Bytes of its content, or of the file as it lies on storage, that could not be read."""
    problem: str = ""
    """Why the first of its bad records, or the file, could not be read."""
    problem_offset: int = 0
    """Where that is: bytes of the decompressed file, or rows of a parquet file."""
    is_damaged: bool = False
    """Whether it could not be read to its end, so that nobody knows how much is missing."""
    note: str = ""
    """What its content showed to be other than its name says."""

    @property
    def num_records(self) -> int:
        """Those that it is known to have: documents, bad ones, and what is no document."""
        return self.num_documents + self.num_bad + self.num_dropped


class LeftOut(_Record):
    """Files below the sources' paths that were not read, for one reason."""

    reason: str
    num_files: int
    num_bytes: int
    examples: tuple[str, ...]
    """The first of them by name."""


_SOURCE_FILES = TypeAdapter(tuple[SourceFile, ...])
_EXAMPLES = TypeAdapter(dict[str, list[str]])


class Packing(_Record):
    """How well documents fill rows, the training rows unless a name says otherwise."""

    utilization: float
    """Share of the token slots that hold a token rather than padding; 1 without tokens."""
    num_cut_documents: int
    """Documents longer than a row, which go on in another row (language modelling only)."""
    num_truncated_documents: int
    """Documents longer than a row, whose end is lost (tasks with one document a row)."""
    num_truncated_tokens: int
    num_truncated_validation_documents: int = 0
    num_truncated_validation_tokens: int = 0


class Manifest(_Record):
    """A whole prepared corpus."""

    version: int
    key: str
    sequence_tokens: int
    group_rows: Annotated[int, Field(ge=1)]
    """Rows in a group, the unit of reading: one Arrow record batch. Only the last group of a source
    may be shorter."""
    vocab_size: int
    pad_token_id: int | None
    """None where packed rows need none."""
    eos_token_id: int | None
    encoder: str
    """What encoded the text: `gigatoken` where a check proved its ids equal, else `tokenizers` or
    `transformers`."""
    prefix: tuple[int, ...] | None = None
    """Ids that stand before each document; None in manifests that did not say so yet, as for
    `suffix`."""
    suffix: tuple[int, ...] | None = None
    """Ids that stand after each document."""
    middle: tuple[int, ...] = ()
    """Ids that stand between two texts of one document."""
    mask_token_id: int | None = None
    """What stands where a token is to be guessed."""
    labels: tuple[str, ...]
    """Names of the classes in the order of their ids; empty for tasks without labels."""
    train: Split
    validation: Split | None
    num_source_files: int
    num_source_bytes: int
    """Size of the input files on storage. What each gave is told in source_files.json, which no
    worker reads."""
    dropped: dict[str, int]
    """Documents that were left out, by reason."""
    num_contradicting: int = 0
    """Documents whose text an earlier one has under another label."""
    num_records: int
    """Records read: documents, bad ones, and those of a WARC that are no documents."""
    num_bad: int
    packing: Packing
    shuffle_seed: int
    bad_share: float | None = None
    """Share of the documents or of the bytes, whichever is larger, that could not be read."""
    left_out: tuple[LeftOut, ...] = ()
    """Files that the sources' paths hold but that were not read, by reason."""
    num_unchanged: Annotated[int, Field(exclude_if=lambda count: not count)] = 0
    """Training rows that augmentation of texts leaves as they are, since their document became
    several."""
    num_untranslated: Annotated[int, Field(exclude_if=lambda count: not count)] = 0
    """Training rows that translators have no other words for."""
    votes: Annotated[dict[str, int], Field(exclude_if=lambda counts: not counts)] = {}
    """Training rows that each rule votes for, where the task has some."""
    fitted: Annotated[tuple[dict[str, Any], ...], Field(exclude_if=lambda found: not found)] = ()
    """What the task has taken from a sample of the training documents (`Task.fit`)."""
    redacted: Annotated[dict[str, int], Field(exclude_if=lambda counts: not counts)] = {}
    """Personal data that was replaced in documents as they were read, by kind."""
    num_redacted: Annotated[int, Field(exclude_if=lambda count: not count)] = 0
    """Documents that had some."""
    removed: Annotated[dict[str, int], Field(exclude_if=lambda counts: not counts)] = {}
    """Lines and marks that cleaning took out of documents that it kept, by reason."""
    languages: Annotated[dict[str, int], Field(exclude_if=lambda counts: not counts)] = {}
    """Documents that cleaning kept by language, before deduplication, where languages were looked
    at."""
    evaluation: Annotated[dict[str, int], Field(exclude_if=lambda counts: not counts)] = {}
    """`texts` of the evaluation sets that training documents were compared with, and
    `short_texts`, which have too few words to be found in a longer document."""
    validation_compressors: dict[str, float] = {}
    """Bits a byte that general compressors need for (up to 4 MB of) the held-out text."""

    @property
    def label_counts(self) -> Mapping[str, float]:
        """Training documents of each class, as often as they are read where the order evens classes
        out (`data.balance`): as many in all as there are. Empty for tasks without labels."""
        counts = self.train.documents_by_label
        read: dict[str, float] = {}
        for source in self.train.sources:
            label = source.name.partition("/")[2]
            if label in counts and source.weight is not None:
                read[label] = read.get(label, 0.0) + source.weight
        if not read or read.keys() != {label for label, count in counts.items() if count}:
            return counts
        share = sum(counts.values()) / sum(read.values())
        return {label: read[label] * share for label in counts}

    @property
    def row_bytes(self) -> int:
        """About what a row takes."""
        size = 2 if self.vocab_size <= 65536 else 4
        tokens = self.sequence_tokens * size if self.vocab_size else 0
        return max(tokens + 24, self.train.num_bytes // max(1, self.train.num_rows))

    @property
    def num_bytes(self) -> int:
        """Bytes of all token shards."""
        return self.train.num_bytes + (self.validation.num_bytes if self.validation else 0)


def load_manifest(filesystem: pafs.FileSystem, folder: str) -> Manifest:
    """The manifest of the corpus in a folder. Raises CorpusError if there is none, or it is of
    another version."""
    path = f"{folder}/{MANIFEST}"
    try:
        tree = json.loads(read_bytes(filesystem, path))
        version = tree.get("version") if isinstance(tree, dict) else None
        if version not in (2, VERSION):
            raise CorpusError(
                path,
                f"is of version {version}",
                f"this dray reads version {VERSION}",
                "prepare again",
            )
        return Manifest.model_validate(_from_version_2(tree) if version == 2 else tree)
    except FileNotFoundError as error:
        raise CorpusError(
            folder,
            "holds no prepared corpus",
            f"a complete corpus has a {MANIFEST}",
            "`dray prepare` makes one",
        ) from error
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(
            path, "is not a manifest", "it is written by `dray prepare`", "delete the folder"
        ) from error


def _from_version_2(tree: dict[str, Any]) -> dict[str, Any]:
    """A manifest of version 2 as one of today, which keeps the account of its source files
    elsewhere."""
    files = tree.get("source_files", [])
    counts = {
        "num_source_files": len(files),
        "num_source_bytes": sum(file["num_bytes"] for file in files),
    }
    return (
        {key: value for key, value in tree.items() if key != "source_files"}
        | counts
        | {"version": VERSION}
    )


def load_run_manifest(run: Run) -> Manifest:
    """The manifest of a run's corpus: the run's own copy, else the corpus'. Raises StoreError if
    the run has no corpus on record, CorpusError if it is gone."""
    filesystem, path = open_filesystem(run.corpus_copy)
    if exists(filesystem, f"{path}/{MANIFEST}"):
        return load_manifest(filesystem, path)
    if not run.corpus:
        raise StoreError(
            f"run {run.name!r}", "has no corpus on record", "a run keeps the rows it began with"
        )
    return load_manifest(*open_filesystem(run.corpus))


def load_source_files(filesystem: pafs.FileSystem, folder: str) -> tuple[SourceFile, ...]:
    """What each input file of a corpus gave, in reading order. Raises CorpusError for a corpus
    without that account."""
    try:
        try:
            tree = json.loads(read_bytes(filesystem, f"{folder}/{SOURCE_FILES}"))
        except FileNotFoundError:  # version 2 kept it in the manifest
            tree = json.loads(read_bytes(filesystem, f"{folder}/{MANIFEST}")).get("source_files")
        return _SOURCE_FILES.validate_python(tree)
    except (ValueError, RecursionError, AttributeError) as error:
        raise CorpusError(
            f"{folder}/{SOURCE_FILES}",
            "is not the account of a corpus' source files",
            "it is written by `dray prepare`",
            "delete the folder",
        ) from error


def dump_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON, the same bytes for the same content."""
    return _dump(manifest.model_dump(mode="json"))


def dump_source_files(files: Sequence[SourceFile]) -> bytes:
    """The account of the source files as JSON."""
    return _dump([file.model_dump(mode="json") for file in files])


def dump_examples(examples: Mapping[str, Sequence[tuple[str, str]]]) -> bytes:
    """The examples as JSON."""
    return _dump({fate: [text for _, text in pairs] for fate, pairs in examples.items()})


def load_examples(filesystem: pafs.FileSystem, folder: str) -> dict[str, list[str]]:
    """The beginnings of some documents of a corpus by what became of them; nothing of a corpus
    that keeps none. Raises CorpusError for a file that holds something else."""
    path = f"{folder}/{EXAMPLES}"
    try:
        return _EXAMPLES.validate_python(json.loads(read_bytes(filesystem, path)))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise CorpusError(
            path, "holds no examples", "it is written by `dray prepare`", "delete it"
        ) from error


def _dump(tree: Any) -> bytes:
    return (json.dumps(tree, ensure_ascii=False, indent=1) + "\n").encode()
