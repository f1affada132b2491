"""What tasks declare of their rows, and what they make of documents: checked before it is written,
since a task may be anybody's, and a column that is not what it says shifts all that follow.

Refuses columns that rows cannot have, and documents that are not as they are declared.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dray.corpus.packing import Varying
from dray.errors import CorpusError
from dray.tasks.rows import Column, Encoded

RESERVED = {
    "input_ids",
    "num_tokens",
    "row_id",
    "num_lost",
    "num_bytes",
    "record",
    "class",
    "high",
    "low",
}
"""Names that rows and documents have columns of already."""
DOCUMENT = "document"
"""The column that says which document of the corpus a row is of, if the task has it."""


def check_columns(task: Any) -> None:
    """Raises CorpusError for a task whose columns rows cannot have."""
    names = [column.name for column in task.columns]
    for column in task.columns:
        flags = [column.hot, column.varies, bool(column.shape), column.each == "token"]
        where = f"column {column.name!r} of task {task.name}"
        if column.name in RESERVED or names.count(column.name) > 1:
            raise CorpusError(where, "has a name that another has", "names are unique", "rename it")
        if np.dtype(column.dtype).kind not in "iuf":
            raise CorpusError(
                where, f"holds {column.dtype}", "columns hold integers or floats", "uint8 does"
            )
        if sum(flags) > 1 or (column.names and any(flags[:3])):
            raise CorpusError(
                where,
                "is of several kinds",
                "a number a token, or for each row a number, classes (hot), an array of one shape, "
                "or a list that varies",
                "declare a column for each",
            )
        if task.packs and column.each == "row":
            raise CorpusError(
                where,
                "is one of rows, and the task packs documents",
                "a packed row has several documents",
                "let it have a value for each token, or do not pack",
            )
        if column.each == "token" and not task.tokenizes:
            raise CorpusError(
                where, "is one of tokens, of which the task has none", "", "declare one of rows"
            )
    if task.packs and not task.tokenizes:
        raise CorpusError(
            f"task {task.name}", "packs documents without tokens", "", "set packs = False"
        )


def check_encoded(task: Any, encoded: Encoded, num_texts: int) -> Encoded:
    """The documents, with columns of the types that are declared. Raises CorpusError for what is
    not as the task declares it, or was not counted."""
    lengths = _integers(task, "lengths", encoded.lengths)
    if len(lengths) and (lengths.min() < 0 or lengths.max() >= 2**31):
        raise _wrong(task, "lengths", "are below 0, or 2^31 or more")
    num_documents, num_tokens = len(lengths), int(lengths.sum())
    if task.tokenizes and len(encoded.tokens) != num_tokens:
        raise _wrong(task, "tokens", f"are {len(encoded.tokens):,}, but {num_tokens:,} by lengths")
    _check_records(task, encoded, num_documents, num_texts)
    declared = {column.name: column for column in task.columns if column.name != DOCUMENT}
    if declared.keys() != encoded.columns.keys():
        raise _wrong(task, "columns", f"are {sorted(encoded.columns)}, not {sorted(declared)}")
    columns = {
        name: _checked(task, column, encoded.columns[name], num_documents, num_tokens)
        for name, column in declared.items()
    }
    return Encoded(
        encoded.tokens, lengths, columns, encoded.records, encoded.num_lost, encoded.refused
    )


def _check_records(task: Any, encoded: Encoded, num_documents: int, num_texts: int) -> None:
    """Raises CorpusError where it is not said of each record what became of it."""
    if encoded.records is None and num_documents != num_texts:
        raise _wrong(task, "documents", f"are {num_documents:,} of {num_texts:,}, without records")
    if encoded.records is None and not encoded.refused:
        return
    given, refused = set(range(num_texts)), set(encoded.refused)
    told = given if encoded.records is None else set(np.asarray(encoded.records).tolist())
    if (told & refused) or (told | refused) - given:
        raise _wrong(task, "records", "name some that were refused, or not given")
    if missing := given - told - refused:
        raise _wrong(task, "records", f"say nothing of number {min(missing)}: name it in refused")


def _checked(task: Any, column: Column, values: Any, num_documents: int, num_tokens: int) -> Any:
    """A column's values in its dtype."""
    size = num_tokens if column.each == "token" else num_documents
    if len(values) != size:
        raise _wrong(task, column.name, f"has {len(values):,} values, not {size:,}")
    if isinstance(values, pa.Array | pa.ChunkedArray) and values.null_count:
        raise _wrong(task, column.name, "has nulls")
    if column.hot:
        return values
    if column.varies:
        return _checked_lists(task, column, values)
    array = np.asarray(values)
    if array.shape[1:] != column.shape:
        raise _wrong(
            task, column.name, f"has values of shape {array.shape[1:]}, not {column.shape}"
        )
    return _cast(task, column, array)


def _checked_lists(task: Any, column: Column, lists: Any) -> pa.Array:
    if isinstance(lists, pa.ChunkedArray):
        lists = pa.concat_arrays(lists.chunks)
    if not isinstance(lists, pa.ListArray | pa.LargeListArray):
        raise _wrong(task, column.name, f"is a {type(lists).__name__}, not lists of numbers")
    values = lists.flatten()
    if values.null_count:
        raise _wrong(task, column.name, "has nulls")
    numbers = _cast(task, column, values.to_numpy(zero_copy_only=False))
    return Varying(numbers, pc.list_value_length(lists).to_numpy()).lists()


def _cast(task: Any, column: Column, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Values in the column's dtype, which must hold them as they are; floats may lose digits."""
    wanted = np.dtype(column.dtype)
    if values.dtype.kind not in ("iuf" if wanted.kind == "f" else "iu"):
        raise _wrong(task, column.name, f"has {values.dtype} values, not {wanted}")
    if wanted.kind != "f" and values.size:
        least, most = np.iinfo(wanted).min, np.iinfo(wanted).max
        if values.min() < least or values.max() > most:
            raise _wrong(
                task, column.name, f"has {values.min()} to {values.max()}, beyond {wanted}"
            )
    return values.astype(wanted, copy=False)


def _integers(task: Any, name: str, values: Any) -> npt.NDArray[np.int64]:
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise _wrong(task, name, f"are {array.dtype}, not integers")
    return array.astype(np.int64)


def _wrong(task: Any, name: str, what: str) -> CorpusError:
    return CorpusError(
        f"task {task.name}",
        f"its encode gives what it does not declare: {name} {what}",
        "rows hold what the task's columns say",
        f"mend {type(task).__name__}.encode",
    )
