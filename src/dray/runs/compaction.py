"""Rows as a typed table and back, exactly: what was logged as JSON is the same after it was
compacted to Parquet.

A column is typed where all its values are of one plain kind, and JSON text otherwise; keys that a
row does not have are told from those that are null. What cannot be kept in columns is kept as JSON
lines: nothing is changed or left out.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pyarrow as pa

from dray.errors import StoreError

PART, SHAPE, LINE = "_part", "_shape", "_row"
"""Columns beside the rows' own: which part a row stood in, which keys it has, and the row itself
where that is text."""
MAX_SHAPES = 64
"""Rows with more different sets of keys are kept as lines."""
MAX_LOSSES = 16
_TYPES = {
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    str: pa.string(),
    type(None): pa.null(),
}
_AS_JSON = {b"dray": b"json"}
_SHAPES, _SUMMARY = b"dray.shapes", b"dray.summary"

Row = dict[str, Any]


def make_parquet(rows: Sequence[Row], parts: Sequence[int]) -> bytes:
    """The rows as a Parquet file, with a summary in its footer. Raises StoreError if it does not
    read back as the same.

    `parts`: the number of the part in which each row stood.
    """
    import pyarrow.parquet as pq

    table = _make_columns(rows, parts)
    metadata = {**(table.schema.metadata or {}), _SUMMARY: json.dumps(summarize(rows)).encode()}
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), buffer, compression="zstd")
    content = buffer.getvalue()
    if [(part, json.dumps(row)) for part, row in read_parquet(content)] != [
        (part, json.dumps(row)) for part, row in zip(parts, rows, strict=True)
    ]:
        raise StoreError(
            f"{len(rows)} rows",
            "read back from Parquet as others than they were",
            "rows are never changed",
        )
    return content


def read_parquet(
    source: bytes | str, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, Row]]:
    """(part, row) of a file's content or of a local file, a few thousand rows at a time; only the
    keys in `columns` if given. Raises OSError, and StoreError for what is no such file."""
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            schema = file.schema_arrow
            wanted = None
            if columns is not None and LINE not in schema.names:
                wanted = [PART, SHAPE, *(name for name in columns if name in schema.names)]
            for batch in file.iter_batches(4096, columns=wanted):
                yield from _rows_of(batch, schema, columns)
    except (pa.ArrowException, KeyError, ValueError, TypeError) as error:
        where = source if isinstance(source, str) else "rows"
        raise StoreError(
            where, f"not a file of rows ({error})", "dray writes this file whole"
        ) from error


def read_summary(file: Any) -> Row:
    """The summary in a Parquet file's footer (`summarize`); empty if it has none."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(file).metadata or {}
    found: Row = json.loads(metadata.get(_SUMMARY, b"{}"))
    return found


def summarize(rows: Sequence[Mapping[str, Any]]) -> Row:
    """What a page about a run needs to know of some metrics rows; `ordered` says whether each step
    comes once, in order. Empty for rows that are none of steps."""
    if not rows or not all(isinstance(row.get("step"), int) for row in rows):
        return {}
    steps = [row["step"] for row in rows]
    size = -(-len(rows) // MAX_LOSSES)
    chunks = [[row.get("loss") for row in rows[at : at + size]] for at in range(0, len(rows), size)]
    return {
        "rows": len(rows),
        "first_step": min(steps),
        "last_step": max(steps),
        "ordered": all(a < b for a, b in pairwise(steps)),
        "seconds": sum(_number(row, "seconds") for row in rows),
        "tokens": rows[-1].get("tokens"),
        "memory_bytes_max": max(_number(row, "memory_bytes_max") for row in rows),
        "first_loss": rows[0].get("loss"),
        "losses": [_mean(chunk) for chunk in chunks],
    }


def _number(row: Mapping[str, Any], key: str) -> float:
    value = row.get(key)
    return value if isinstance(value, (int, float)) else 0.0


def _mean(values: Sequence[Any]) -> float | None:
    finite = [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _make_columns(rows: Sequence[Row], parts: Sequence[int]) -> pa.Table:
    shapes: dict[tuple[str, ...], int] = {}
    numbers = [shapes.setdefault(tuple(row), len(shapes)) for row in rows]
    names = dict.fromkeys(name for shape in shapes for name in shape)
    if len(shapes) <= MAX_SHAPES and not names.keys() & {PART, SHAPE, LINE}:
        fields, arrays = (
            [pa.field(PART, pa.int32()), pa.field(SHAPE, pa.int32())],
            [pa.array(parts, pa.int32()), pa.array(numbers, pa.int32())],
        )
        try:
            for name in names:
                field, array = _make_column(name, [row.get(name) for row in rows])
                fields.append(field)
                arrays.append(array)
            metadata = {_SHAPES: json.dumps(list(shapes)).encode()}
            return pa.table(arrays, schema=pa.schema(fields, metadata))
        except (pa.ArrowException, OverflowError, UnicodeError):
            pass  # numbers beyond 64 bits, halves of characters
    return pa.table({PART: pa.array(parts, pa.int32()), LINE: [json.dumps(row) for row in rows]})


def _make_column(name: str, values: Sequence[Any]) -> tuple[pa.Field, pa.Array]:
    kinds = {type(value) for value in values} - {type(None)}
    kind = kinds.pop() if len(kinds) == 1 else type(None) if not kinds else dict
    if kind in _TYPES:
        return pa.field(name, _TYPES[kind]), pa.array(values, _TYPES[kind])
    texts = [None if value is None else json.dumps(value) for value in values]
    return pa.field(name, pa.string(), metadata=_AS_JSON), pa.array(texts, pa.string())


def _rows_of(
    batch: pa.RecordBatch, schema: pa.Schema, columns: Sequence[str] | None
) -> Iterator[tuple[int, Row]]:
    parts = batch.column(PART).to_pylist()
    if LINE in schema.names:
        for part, line in zip(parts, batch.column(LINE).to_pylist(), strict=True):
            row = json.loads(line)
            yield part, row if columns is None else {key: row[key] for key in row if key in columns}
        return
    found: dict[str, list[Any]] = {}
    for name in batch.schema.names:
        if name not in (PART, SHAPE):
            values = batch.column(name).to_pylist()
            as_json = schema.field(name).metadata == _AS_JSON or (
                schema.field(name).metadata or {}
            ).get(b"dray")
            found[name] = (
                [None if v is None else json.loads(v) for v in values] if as_json else values
            )
    shapes = [
        [key for key in shape if key in found] for shape in json.loads(schema.metadata[_SHAPES])
    ]
    for index, (part, shape) in enumerate(zip(parts, batch.column(SHAPE).to_pylist(), strict=True)):
        yield part, {key: found[key][index] for key in shapes[shape]}
