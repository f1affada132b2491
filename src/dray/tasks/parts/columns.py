"""Columns of token shards as tensors, without a Python loop over rows.

Refuses tables without the columns that every token shard has (KeyError).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from dray.tasks.rows import SEGMENT

if TYPE_CHECKING:
    from torch import Tensor


def token_matrix(table: pa.Table) -> Tensor:
    """`input_ids` as int64 [rows, sequence_tokens]."""
    return matrix(table, "input_ids")


def matrix(table: pa.Table, name: str) -> Tensor:
    """A column of fixed-size lists of integers as int64 [rows, width]. Raises TypeError for other
    columns: `array_column` is for those."""
    column = table.column(name)
    if not pa.types.is_integer(getattr(column.type, "value_type", column.type)):
        raise TypeError(f"{name} holds {column.type}, no integers")
    flat = np.concatenate([part.astype(np.int64) for part in _flat_parts(column)])
    return torch.from_numpy(flat).view(-1, column.type.list_size)


def array_column(table: pa.Table, name: str, shape: tuple[int, ...]) -> Tensor:
    """A column of arrays of one shape, in its own dtype [rows, *shape]."""
    return torch.from_numpy(np.concatenate(_flat_parts(table.column(name)))).view(-1, *shape)


def _flat_parts(column: pa.ChunkedArray) -> list[npt.NDArray[Any]]:
    """The numbers of a column of lists, chunk by chunk; at least one part."""
    chunks = column.chunks or [pa.array([], column.type)]
    return [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in chunks]


def list_column(table: pa.Table, name: str) -> list[Tensor]:
    """A varying column: what each row has of it, in its own dtype [its number]."""
    return [
        torch.from_numpy(np.array(value.values.to_numpy(zero_copy_only=True)))
        for value in table.column(name)
    ]


def integer_column(table: pa.Table, name: str) -> Tensor:
    """A column of integers as int64 [rows]."""
    return torch.from_numpy(table.column(name).to_numpy().astype(np.int64))


def number_column(table: pa.Table, name: str) -> Tensor:
    """A column of numbers as fp32 [rows]."""
    return torch.from_numpy(table.column(name).to_numpy().astype(np.float32))


def real_rows(table: pa.Table) -> Tensor:
    """Which rows are rows of the corpus and not padding, as bool [rows]; all, if the table has no
    `row_id`."""
    if "row_id" not in table.column_names:
        return torch.ones(table.num_rows, dtype=torch.bool)
    return integer_column(table, "row_id") >= 0


def draw_numbers(
    draw: int, ids: Iterable[int], shape: int | tuple[int, ...], dtype: Any = np.float64
) -> npt.NDArray[Any]:
    """Numbers from 0 to below 1, [ids, *shape], each row's by the draw and the row's id alone."""
    found = [
        np.random.Generator(np.random.Philox(key=np.array([draw, row % 2**64], np.uint64))).random(
            shape, dtype
        )
        for row in ids
    ]
    return np.array(found, dtype).reshape(len(found), *np.atleast_1d(shape))


def drawn_by_row(
    table: pa.Table, draw: int, shape: int | tuple[int, ...], dtype: Any = np.float64
) -> npt.NDArray[Any]:
    """The numbers of a table's rows, [rows, *shape]: by their places, if it has no `row_id`."""
    has_ids = "row_id" in table.column_names
    ids = table.column("row_id").to_pylist() if has_ids else range(table.num_rows)
    return draw_numbers(draw, ids, shape, dtype)


def padded_tokens(table: pa.Table, pad_token_id: int | None) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of rows with a document each, and `token_type_ids` where
    they have segments, as int64 [rows, width]: as wide as the longest row that is none of
    padding."""
    num_tokens, real = integer_column(table, "num_tokens"), real_rows(table)
    tokens = token_matrix(table)
    longest = int((num_tokens * real).max()) if table.num_rows else 0
    width = max(1, min(tokens.shape[1], longest))
    # A row without any token to attend to would give NaN, also in the gradients of its neighbours.
    mask = torch.arange(width)[None, :] < num_tokens.clamp(min=1)[:, None]
    input_ids = tokens[:, :width].contiguous()
    if pad_token_id is not None:
        input_ids = input_ids.masked_fill(~mask, pad_token_id)
    batch = {"input_ids": input_ids, "attention_mask": mask.long()}
    if SEGMENT in table.column_names:
        batch["token_type_ids"] = matrix(table, SEGMENT)[:, :width].contiguous()
    return batch
