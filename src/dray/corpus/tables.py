"""Encoded documents that are a row each, as the columns of rows: what preparing, predicting and
augmentation share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dray.corpus.encoded import as_array
from dray.corpus.packing import Aligned, Ints, Rows, Values, Varying, one_a_row
from dray.corpus.shards import make_batch, stored_columns
from dray.corpus.tokenizing import TokenizerInfo
from dray.tasks.rows import Encoded


def pad_rows(  # noqa: PLR0917
    task: Any,
    info: TokenizerInfo,
    sequence_tokens: int,
    tokens: npt.NDArray[np.unsignedinteger],
    lengths: Ints,
    aligned: Aligned,
) -> Rows:
    """A document a row, between what the tokeniser puts around one; as it is where the task packs,
    since its documents have that already."""
    if not task.tokenizes:
        return Rows(np.empty((len(lengths), 0), tokens.dtype), lengths.astype(np.int32))
    return one_a_row(
        tokens,
        lengths,
        sequence_tokens,
        info.filler,
        prefix=() if task.packs else info.prefix,
        suffix=() if task.packs else info.suffix,
        aligned=aligned,
        extended=[column.name for column in task.columns if column.extends],
    )


def make_table(
    task: Any, info: TokenizerInfo, sequence_tokens: int, num_labels: int, encoded: Encoded
) -> tuple[pa.Table, Rows]:
    """Encoded documents, a row each, as a table with the columns of the task's rows, and the rows
    as they were padded. Numbers of names are those of the classes already. What `encode` was not
    given, such as a target, is 0 or of no length."""
    aligned: Aligned = {
        column.name: (np.asarray(encoded.columns[column.name]), column.pad)
        for column in task.columns
        if column.each == "token"
    }
    rows = pad_rows(task, info, sequence_tokens, encoded.tokens, encoded.lengths, aligned)
    values: dict[str, Any] = {
        "input_ids": rows.tokens,
        "num_tokens": rows.num_tokens,
        **rows.aligned,
    }
    for column in task.columns:
        if column.each == "row" and column.name in encoded.columns:
            found = as_array(encoded.columns[column.name])
            if column.hot:
                classes = np.arange(num_labels, dtype=np.int32)
                values[column.name] = hot_values(column, found, classes, num_labels)
            else:
                values[column.name] = row_values(column, found)
    stored = stored_columns(task, sequence_tokens, info.dtype, num_labels)
    for column in stored:
        if column.name in values:
            continue
        if column.varies:
            empty = np.zeros(0, column.dtype), np.zeros(len(rows.num_tokens), np.int64)
            values[column.name] = Varying(*empty)
        else:
            values[column.name] = np.zeros((len(rows.num_tokens), *column.shape), column.dtype)
    return pa.Table.from_batches([make_batch(stored, values)]), rows


def row_values(column: Any, found: pa.Array) -> Values:
    """A column that documents have one value each of, as rows have it."""
    if column.varies:
        return Varying.of(found, column.dtype)
    values = found.flatten() if column.shape else found
    own: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False).astype(column.dtype)
    return own.reshape(len(found), math.prod(column.shape)) if column.shape else own


def hot_values(
    column: Any, found: pa.Array, classes: npt.NDArray[np.int32], num_labels: int
) -> npt.NDArray[Any]:
    """A 1 or 0 for each class, [documents, classes], of lists of numbers of names."""
    hot = np.zeros((len(found), num_labels), column.dtype)
    lengths = pc.list_value_length(found).to_numpy(zero_copy_only=False)
    numbers = found.flatten().to_numpy(zero_copy_only=False)
    hot[np.repeat(np.arange(len(found)), lengths), classes[numbers]] = 1
    return hot


def take_rows(table: pa.Table, indices: Ints) -> pa.Table:
    """Rows by index. numpy gathers fixed-size lists several times faster than Arrow's take."""
    columns = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = column.chunk(0)
        if pa.types.is_fixed_size_list(column.type):
            width = column.type.list_size
            values = column.flatten().to_numpy(zero_copy_only=True).reshape(-1, width)
            columns[name] = pa.FixedSizeListArray.from_arrays(
                pa.array(values[indices].reshape(-1)), width
            )
        else:
            columns[name] = column.take(pa.array(indices))
    return pa.table(columns)
