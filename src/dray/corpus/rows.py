"""From chunks of documents to shards of rows, in random order.

Rows of a chunk are mixed with those of all others: directly, or by way of files that hold what some
of the chunks send to some of the shards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import fs as pafs

from dray.corpus.cleaning import held_out
from dray.corpus.compression import SAMPLE_BYTES, decode_sample
from dray.corpus.duplicates import further_pieces, kept_documents
from dray.corpus.encoded import DOCUMENT, GIVEN_TEXT
from dray.corpus.near import near_kept
from dray.corpus.packing import (
    Aligned,
    Ints,
    Rows,
    Values,
    Varying,
    gather,
    order_by_length,
    pack,
)
from dray.corpus.parts import (
    NAMES,
    SPLITS,
    Chunk,
    MixPlan,
    Preparation,
    ShardPlan,
    Slice,
    read_batch,
    save_record,
    staged,
    write_arrays,
)
from dray.corpus.shards import Stored, make_batch, write_shard
from dray.corpus.tables import hot_values, pad_rows, row_values
from dray.corpus.tokenizing import load_decoder
from dray.storage.filesystem import (
    child,
    make_folder,
    read_bytes,
    share_filesystem,
    write_bytes,
)
from dray.tasks.rows import VOTES

WINDOW_GROUPS = 64


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
            gather(self.tokens, starts, lengths) if len(self.tokens) else self.tokens,
            lengths,
            {n: (gather(v, starts, lengths), pad) for n, (v, pad) in self.aligned.items()},
            self.columns.take(pa.array(chosen)),
        )


def _load_documents(job: Preparation, chunk: Chunk) -> _Encoded:
    filesystem, path = staged(job, "read", chunk.name)

    def read(name: str, kind: str) -> npt.NDArray[Any]:
        return np.frombuffer(read_bytes(filesystem, f"{path}.{name}"), kind)

    columns = read_batch(filesystem, f"{path}.documents")
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
    further = further_pieces(documents["record"])
    keep = kept_documents(job, index, len(documents.lengths))
    keep &= near_kept(job, index, len(keep))
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
            labels = _labels_of(job, values) if job.parts_labels(split) else None
            if labels is not None:
                order = order[np.argsort(labels[order], kind="stable")]
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
            arrays = [c.name for c in job.task.columns if c.shape or c.varies]
            if arrays:
                record[split]["num_array_bytes"] = sum(values[name].nbytes for name in arrays)
            if GIVEN_TEXT in job.task.columns:
                texts: Any = values[GIVEN_TEXT.name]
                record[split]["num_without_text"] = int((texts.lengths == 0).sum())
            if job.task.rules:
                voted: Any = values[VOTES] != 0
                record[split]["votes"] = voted.reshape(len(order), -1).sum(axis=0).tolist()
            if job.labels:
                record[split]["by_label"] = _count_classes(job, values)
            if labels is not None:
                sizes = {
                    "num_rows": np.ones(len(labels), np.int64),
                    "num_documents": ~further[chosen],
                    "num_tokens": rows.num_tokens,
                    "num_text_bytes": mine["num_bytes"],
                }
                record[split]["labels"] = [
                    {name: int(size[labels == label].sum()) for name, size in sizes.items()}
                    for label in range(len(job.labels))
                ]
    return save_record(job, "packed", index, record)


def _labels_of(job: Preparation, values: Mapping[str, Any]) -> npt.NDArray[Any]:
    """The class of each row, where it has one."""
    (name,) = (c.name for c in job.task.columns if c.names and c.each == "row")
    labels: npt.NDArray[Any] = values[name]
    return labels


def _count_classes(job: Preparation, values: Mapping[str, Any]) -> list[int]:
    """How often each class is there."""
    counts = np.zeros(len(job.labels), np.int64)
    for column in job.task.columns:
        if column.hot:
            counts += values[column.name].sum(axis=0, dtype=np.int64)
        elif column.names:
            found = values[column.name]
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


def _make_rows(job: Preparation, index: int, documents: _Encoded) -> tuple[Rows, dict[str, Values]]:
    """Documents as rows, and the columns of these by name."""
    info, width = job.info, job.sequence_tokens
    tokens, lengths, aligned = documents.tokens, documents.lengths, documents.aligned
    if job.packs:
        rows = pack(tokens, lengths, width, info.filler, aligned)
    else:
        rows = pad_rows(job.task, info, width, tokens, lengths, aligned)
    values: dict[str, Values] = {
        "input_ids": rows.tokens,
        "num_tokens": rows.num_tokens,
        **rows.aligned,
    }
    classes = _class_ids(job, documents.columns)
    for column in job.task.columns:
        if column.name == DOCUMENT:
            values[DOCUMENT] = (index << 32) + documents["record"]
        elif column.each == "row":
            found = documents.columns.column(column.name)
            if column.hot:
                values[column.name] = hot_values(column, found, classes, len(job.labels))
            else:
                own = row_values(column, found)
                values[column.name] = _renumber(own, classes) if column.names else own
    return rows, values


def _class_ids(job: Preparation, documents: pa.RecordBatch) -> npt.NDArray[np.int32]:
    """The id of the class that each number of a chunk stands for, and what is no class last."""
    ids = {label: index for index, label in enumerate(job.labels)}
    names = json.loads((documents.schema.metadata or {}).get(NAMES, b"[]"))
    return np.array([ids.get(name, -1) for name in names] + [-1], np.int32)


def _renumber(numbers: Any, classes: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Class ids of numbers; negative ones stay as they are."""
    found: npt.NDArray[np.int32] = np.where(numbers < 0, numbers, classes[np.maximum(numbers, -1)])
    return found


def _write_rows(
    filesystem: pafs.FileSystem, path: str, columns: Sequence[Values], order: Ints
) -> None:
    """One column of the rows after the other, as plain bytes: a slice of each is one range. Before
    numbers that vary stands where each row's begin (int64, and the end of the last)."""
    make_folder(filesystem, path.rpartition("/")[0])
    arrays: list[npt.NDArray[Any]] = []
    for column in columns:
        values = column[order]
        arrays += [values.offsets, values.values] if isinstance(values, Varying) else [values]
    write_arrays(filesystem, path, arrays)


def mix_rows(job: Preparation, item: tuple[int, MixPlan]) -> dict[str, Any]:
    """Write the rows that a bundle of chunks sends to a group of shards, shard after shard."""
    index, plan = item
    shard_of = np.concatenate([np.repeat(np.arange(len(counts)), counts) for counts in plan.counts])
    _write_rows(
        *staged(job, plan.file),
        list(_read_slices(job, plan.slices).values()),
        np.argsort(shard_of, kind="stable"),
    )
    return save_record(job, "mixed", index, {})


def merge_rows(job: Preparation, item: tuple[int, ShardPlan]) -> dict[str, Any]:
    """Write one shard from its slices of the chunks, in a random order of its own. Returns the
    shard's record."""
    index, plan = item
    rng = job.rng(2, *plan.place)
    values = _read_slices(job, plan.slices)
    num_tokens: Any = values["num_tokens"]
    order = rng.permutation(len(num_tokens))
    if not job.packs:
        order = order[order_by_length(num_tokens[order], job.group_rows, WINDOW_GROUPS, rng)]
    for name in list(values):
        values[name] = values.pop(name)[order]  # one at a time: a shard is there twice for none
    rows = make_batch(job.columns, values)
    shard = write_shard(*share_filesystem(job.folder), plan.file, rows, job.group_rows)
    return save_record(job, "shards", index, shard.model_dump())


def _read_slices(job: Preparation, slices: Sequence[Slice]) -> dict[str, Values]:
    """The columns of rows by name, slice after slice."""
    num_rows = sum(piece.num_rows for piece in slices)
    columns = job.columns
    values: dict[str, Any] = {
        column.name: np.empty((num_rows, *column.shape), column.dtype)
        for column in columns
        if not column.varies
    }
    varying: dict[str, list[Varying]] = {column.name: [] for column in columns if column.varies}
    done = 0
    for piece in slices:
        filesystem, path = staged(job, piece.file)
        begin = 0
        with filesystem.open_input_file(path) as file:
            for column in columns:
                if column.varies:
                    found, begin = _read_varying(file, column, piece, begin)
                    varying[column.name].append(found)
                    continue
                size = column.row_bytes
                data = file.read_at(piece.num_rows * size, begin + piece.start * size)
                fixed = np.frombuffer(data, column.dtype).reshape(piece.num_rows, *column.shape)
                values[column.name][done : done + piece.num_rows] = fixed
                begin += piece.rows_in_file * size
        done += piece.num_rows
    return {
        column.name: Varying.join(varying.pop(column.name), column.dtype)
        if column.varies
        else values[column.name]
        for column in columns
    }


def _read_varying(file: Any, column: Stored, piece: Slice, begin: int) -> tuple[Varying, int]:
    """What a slice has of a column that begins at a byte of the file, and where that ends."""

    def read(first: int, count: int, dtype: str) -> npt.NDArray[Any]:
        return np.frombuffer(file.read_at(count * np.dtype(dtype).itemsize, first), dtype)

    offsets = read(begin + piece.start * 8, piece.num_rows + 1, "int64")
    (total,) = read(begin + piece.rows_in_file * 8, 1, "int64").tolist()
    first, last = int(offsets[0]), int(offsets[-1])
    data, size = begin + (piece.rows_in_file + 1) * 8, np.dtype(column.dtype).itemsize
    values = read(data + first * size, last - first, column.dtype)
    return Varying(values, np.diff(offsets)), data + total * size
