"""What tasks declare of their rows, and what they make of documents: checked before it is written,
since a task may be anybody's, and a column that is not what it says shifts all that follow.

Refuses columns that rows cannot have, and documents that are not as they are declared.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dray.corpus.packing import Varying
from dray.errors import CorpusError
from dray.tasks.rows import SEGMENT, Column, Encoded

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


GIVEN_TEXT = Column("given_text", "uint8", varies=True)
"""The text that a row was made of, in UTF-8, if the task has it: where a document became several
rows it is empty."""
GIVEN_TARGET = Column("given_target", "uint8", varies=True)
"""What went along with that text, as it was read."""
PARAPHRASE = Column("paraphrase", "uint8", varies=True)
"""The same text in other words, as translators wrote it once the rows were there; empty: they did
not."""
NOT_ENCODED = {DOCUMENT, GIVEN_TEXT.name, GIVEN_TARGET.name, PARAPHRASE.name}
"""Columns that no task's `encode` gives."""


def check_columns(task: Any) -> None:
    """Raises CorpusError for a task whose columns rows cannot have."""
    names = [column.name for column in task.columns]
    for column in task.columns:
        flags = [column.hot, column.varies, bool(column.shape), column.each == "token"]
        where = f"column {column.name!r} of task {task.name}"
        if column.name in RESERVED or names.count(column.name) > 1:
            raise CorpusError(where, "has a name that another has", "names are unique", "rename it")
        _check_column(where, column)
        if sum(flags) > 1 or (column.names and any(flags[:3])):
            raise CorpusError(
                where,
                "is of several kinds",
                "a number a token, or for each row a number, classes (hot), an array of one shape, "
                "or a list that varies",
                "declare a column for each",
            )
        if column.told and (sum(flags) or column.names or np.dtype(column.dtype).kind != "f"):
            raise CorpusError(
                where,
                "is told by a model, and no number of a row",
                "a model tells one number of each row",
                "declare a column of floats for each",
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


def _check_column(where: str, column: Column) -> None:
    """Raises CorpusError for a column that holds what no column can."""
    try:
        kind: str = np.dtype(column.dtype).kind
    except TypeError:
        kind = "none"
    if kind not in ("i", "u", "f"):
        raise CorpusError(
            where, f"holds {column.dtype}", "columns hold integers or floats", "uint8 does"
        )
    if column.names and kind == "f":
        raise CorpusError(
            where, f"numbers names in {column.dtype}", "they are numbered by integers", "int32 does"
        )
    if any(not isinstance(size, int) or size < 1 for size in column.shape):
        raise CorpusError(
            where, f"is of shape {column.shape}", "an array has something in it", "leave it out"
        )
    if column.name == SEGMENT and (column.each != "token" or kind == "f"):
        raise CorpusError(
            where,
            "is called like what says which text of its row a token is of",
            "models get it as token_type_ids",
            "rename it",
        )


def check_encoded(
    task: Any,
    encoded: Encoded,
    num_texts: int,
    *,
    vocab_size: int = 0,
    num_names: int | None = None,
) -> Encoded:
    """The documents, with tokens of a vocabulary of that size and columns of the types that are
    declared. `num_names`: how many names of classes have numbers by now. Raises CorpusError for
    what is not as the task declares it, or was not counted."""
    lengths = _integers(task, "lengths", encoded.lengths)
    if len(lengths) and (lengths.min() < 0 or lengths.max() >= 2**31):
        raise _wrong(task, "lengths", "are below 0, or 2^31 or more")
    num_documents, num_tokens = len(lengths), int(lengths.sum())
    tokens = encoded.tokens
    if task.tokenizes:
        if len(tokens) != num_tokens:
            raise _wrong(task, "tokens", f"are {len(tokens):,}, but {num_tokens:,} by lengths")
        tokens = _checked_tokens(task, tokens, vocab_size)
    num_lost = encoded.num_lost
    if num_lost is not None:
        num_lost = _integers(task, "num_lost", num_lost)
        if num_lost.shape != lengths.shape or (num_lost < 0).any():
            raise _wrong(task, "num_lost", f"is no number from 0 for each of {num_documents:,}")
    records = _check_records(task, encoded, num_documents, num_texts)
    declared = {
        column.name: column
        for column in task.columns
        if column.name not in NOT_ENCODED and not column.told
    }
    if declared.keys() != encoded.columns.keys():
        raise _wrong(task, "columns", f"are {sorted(encoded.columns)}, not {sorted(declared)}")
    columns = {
        name: _checked(task, column, encoded.columns[name], num_documents, num_tokens)
        for name, column in declared.items()
    }
    for name, column in declared.items():
        if column.names or column.hot:
            _check_numbers(task, column, columns[name], num_names)
        if name == SEGMENT and columns[name].size and not 0 <= columns[name].max() <= 1:
            raise _wrong(task, name, "is not 0 or 1, for the text of its row that a token is of")
    later = {
        column.name: np.zeros(num_documents, column.dtype) for column in task.columns if column.told
    }
    return replace(
        encoded,
        tokens=tokens,
        lengths=lengths,
        columns=columns | later,
        records=records,
        num_lost=num_lost,
    )


def given(
    task: Any, encoded: Encoded, texts: pa.Array, targets: pa.Array | None
) -> dict[str, pa.Array]:
    """What documents were made of, as lists of bytes, where the task has columns of that."""
    records = np.arange(len(texts)) if encoded.records is None else encoded.records
    alone = pa.array(np.bincount(records, minlength=len(texts))[records] == 1)
    found = {}
    for column, values in ((GIVEN_TEXT, texts), (GIVEN_TARGET, targets), (PARAPHRASE, None)):
        own = pa.array([""] * len(records), pa.large_string())
        if values is not None:
            taken = values.take(pa.array(records)).cast(pa.large_string()).fill_null("")
            own = pc.if_else(alone, taken, own)
        if column in task.columns:
            found[column.name] = as_bytes(own)
    return found


def as_bytes(texts: pa.Array) -> pa.Array:
    """Texts (large_string without nulls) as lists of their bytes."""
    whole = pa.concat_arrays([texts])
    offsets = np.frombuffer(whole.buffers()[1], np.int64)[whole.offset :][: len(whole) + 1]
    data = whole.buffers()[2]
    content = np.frombuffer(b"" if data is None else data, np.uint8)[offsets[0] : offsets[-1]]
    return pa.LargeListArray.from_arrays(pa.array(offsets - offsets[0]), pa.array(content))


def as_array(values: Any) -> pa.Array:
    """A column of documents, one value each: what is an array in every row lies flat."""
    if not isinstance(values, np.ndarray) or values.ndim == 1:
        return pa.array(values)
    flat = pa.array(values.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, math.prod(values.shape[1:]))


def _checked_tokens(task: Any, tokens: Any, vocab_size: int) -> npt.NDArray[np.unsignedinteger]:
    """Tokens in the dtype that rows keep those of the vocabulary in."""
    ids = np.asarray(tokens)
    if ids.dtype.kind not in "iu":
        raise _wrong(task, "tokens", f"are {ids.dtype}, not integers")
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise _wrong(
            task, "tokens", f"are {ids.min()} to {ids.max()}, of a vocabulary of {vocab_size:,}"
        )
    return ids.astype("uint16" if vocab_size <= 2**16 else "uint32", copy=False)


def _check_numbers(task: Any, column: Column, values: Any, num_names: int | None) -> None:
    """Raises CorpusError for classes that nobody has named; a negative number is of none, but in a
    list."""
    numbers = values.flatten().to_numpy(zero_copy_only=False) if column.hot else values
    if not numbers.size:
        return
    if (column.hot and numbers.min() < 0) or (num_names is not None and numbers.max() >= num_names):
        raise _wrong(
            task,
            column.name,
            f"has {numbers.min()} to {numbers.max()}, not the numbers that Tools.number gives",
        )


def _check_records(
    task: Any, encoded: Encoded, num_documents: int, num_texts: int
) -> npt.NDArray[np.int64] | None:
    """The record of each document, where the task says it. Raises CorpusError where it is not said
    of each record what became of it."""
    if encoded.records is None and num_documents != num_texts:
        raise _wrong(task, "documents", f"are {num_documents:,} of {num_texts:,}, without records")
    if encoded.records is None and not encoded.refused:
        return None
    records = None if encoded.records is None else _integers(task, "records", encoded.records)
    if records is not None and records.shape != (num_documents,):
        raise _wrong(task, "records", f"are {records.size:,} of {num_documents:,} documents")
    given, refused = set(range(num_texts)), set(encoded.refused)
    told = given if records is None else set(records.tolist())
    if (told & refused) or (told | refused) - given:
        raise _wrong(task, "records", "name some that were refused, or not given")
    if missing := given - told - refused:
        raise _wrong(task, "records", f"say nothing of number {min(missing)}: name it in refused")
    return records


def _checked(task: Any, column: Column, values: Any, num_documents: int, num_tokens: int) -> Any:
    """A column's values in its dtype."""
    size = num_tokens if column.each == "token" else num_documents
    if len(values) != size:
        raise _wrong(task, column.name, f"has {len(values):,} values, not {size:,}")
    if isinstance(values, pa.Array | pa.ChunkedArray) and values.null_count:
        raise _wrong(task, column.name, "has nulls")
    if column.hot:
        lists = _joined_lists(task, column, values)
        if not pa.types.is_integer(lists.type.value_type):
            raise _wrong(task, column.name, f"has {lists.type.value_type} values, not classes")
        return lists
    if column.varies:
        return _checked_lists(task, column, _joined_lists(task, column, values))
    array = np.asarray(values)
    if array.shape[1:] != column.shape:
        raise _wrong(
            task, column.name, f"has values of shape {array.shape[1:]}, not {column.shape}"
        )
    return _cast(task, column, array)


def _joined_lists(task: Any, column: Column, lists: Any) -> pa.Array:
    """A column of lists of numbers as one array."""
    if isinstance(lists, pa.ChunkedArray):
        lists = pa.concat_arrays(lists.chunks)
    if not isinstance(lists, pa.ListArray | pa.LargeListArray):
        raise _wrong(task, column.name, f"is a {type(lists).__name__}, not lists of numbers")
    if lists.flatten().null_count:
        raise _wrong(task, column.name, "has nulls")
    return lists


def _checked_lists(task: Any, column: Column, lists: pa.Array) -> pa.Array:
    values = lists.flatten()
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
    with np.errstate(over="ignore"):
        cast = values.astype(wanted, copy=False)
    if wanted.kind == "f" and (lost := np.isinf(cast) & np.isfinite(values)).any():
        # What is infinite counts as none: a document would silently have no target.
        raise _wrong(task, column.name, f"has {values[lost].flat[0]}, beyond {wanted}")
    return cast


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
