"""What every form of records has in common: the interface of a parser, and what it says of what it
cannot read."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from dray.corpus.bytes_in import Blocks
from dray.corpus.labels import label_name, label_names
from dray.errors import CorpusError
from dray.spec import TEXT_KINDS, WHOLE, Field, Source
from dray.tasks.rows import SEPARATOR

MAX_EXACT = 2.0**53
PLAIN = {"text": Field("text"), "label": Field("label", wanted=False)}
"""The fields of a text with or without a class."""


class BadRecord(Exception):
    """One record is unreadable; the message says why."""


class RecordParser(Protocol):
    """Turns the bytes of a file into texts and labels. A record ends with a newline, or with the
    file."""

    skips_first_record: bool
    columns: list[str]

    def cut(self, chunks: Iterator[bytes], limit: int) -> Blocks:
        """Blocks of whole records, and what was lost between them."""

    def split(self, data: bytes) -> Iterator[bytes]:
        """The records of a block, without the newline behind each."""

    def is_blank(self, record: bytes) -> bool:
        """Whether a record is nothing but an empty line."""

    def parse_block(self, data: bytes) -> tuple[pa.Array, pa.Array | None] | None:
        """Texts and labels of whole records of valid UTF-8; None if anything in them is odd."""

    def parse_line(self, line: str) -> tuple[str, str]:
        """Text and label of one record. Raises BadRecord."""


@dataclass(frozen=True)
class Wanted:
    """The columns of a source that make a document's text and its target, and how they do.

    A document is one text and, for most tasks, one target, both as strings whatever the columns
    hold: several texts and lists are joined with SEPARATOR, numbers written out.
    """

    texts: tuple[tuple[str, str, str], ...]
    """(field, column, kind) of each."""
    target: tuple[str, str, str] | None = None
    most: float = math.inf
    """The greatest size of a target that is a number."""
    template: str | None = None
    """By which the first text is made of `template_columns`, in place of its own column."""
    template_columns: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: Source, fields: Mapping[str, Field], form: str = "") -> Wanted:
        """What a task's fields are in a source of files of a form."""
        found = {
            name: (name, column, field.kind)
            for name, field in fields.items()
            if (column := field.column_in(source, name, form)) is not None
        }
        texts = [part for part in found.values() if part[2] in TEXT_KINDS]
        targets = [part for part in found.values() if part[2] not in TEXT_KINDS]
        more: dict[str, Any] = {}
        if source.template is not None:
            more = {"template": source.template, "template_columns": source.template_columns}
        if not targets:
            return cls(tuple(texts), **more)
        return cls(tuple(texts), targets[0], fields[targets[0][0]].most, **more)

    @property
    def is_plain(self) -> bool:
        """Whether it is one text, with or without the name of a class."""
        return (
            self.template is None
            and [part[2] for part in self.texts] == ["text"]
            and (self.target is None or self.target[2] == "label")
        )

    @property
    def is_whole(self) -> bool:
        """Whether a document is made of all columns there are."""
        return any(column == WHOLE for _, column, _ in self.parts)

    @property
    def text_column(self) -> str:
        return self.template_columns[0] if self.template_columns else self.texts[0][1]

    @property
    def target_column(self) -> str | None:
        return None if self.target is None else self.target[1]

    @property
    def parts(self) -> tuple[tuple[str, str, str], ...]:
        texts = self.texts
        if self.template is not None:
            filled = (("template", column, "name") for column in self.template_columns)
            texts = (*filled, *self.texts[1:])
        return texts if self.target is None else (*texts, self.target)

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that a record must have."""
        named = (column for _, column, _ in self.parts if column != WHOLE)
        return tuple(dict.fromkeys(named))

    def read(self, values: Mapping[str, Any]) -> tuple[str, str]:
        """Text and target of a record's values by column. Raises BadRecord."""
        parts = self.texts[1:] if self.template_columns else self.texts
        texts = [
            _READERS[kind](column, values if column == WHOLE else values[column])
            for _, column, kind in parts
        ]
        if self.template is not None:
            texts.insert(0, self._filled(values))
        if len(texts) > 1 and any(SEPARATOR in text for text in texts):
            raise BadRecord("an ASCII unit separator in a text")
        target = (
            ""
            if self.target is None
            else _READERS[self.target[2]](self.target[1], values[self.target[1]])
        )
        if (
            self.target is not None
            and self.target[2] == "number"
            and abs(float(target)) > self.most
        ):
            raise BadRecord(f"{self.target[1]!r} is beyond {self.most:.3g}")
        if self.target is not None and self.target[2] == "tags":
            num_words, num_tags = (text.count(SEPARATOR) + 1 for text in (texts[0], target))
            if num_words != num_tags:
                raise BadRecord(f"{num_tags} tags for {num_words} tokens")
        return SEPARATOR.join(texts), target

    def _filled(self, values: Mapping[str, Any]) -> str:
        """The template with a record's values in it. Raises BadRecord."""
        found = {name: _filled_in(name, values[name]) for name in self.template_columns}
        return str(self.template).format_map(found)


def _filled_in(column: str, value: Any) -> str:
    """A text or a number in its place. Raises BadRecord."""
    if value is None or value == "":
        raise BadRecord(f"{column!r} is empty")
    return read_text(column, value) if isinstance(value, str) else parse_label(value)


def read_text(column: str, value: Any) -> str:
    """A text. Raises BadRecord."""
    if not isinstance(value, str):
        raise BadRecord(f"{column!r} is not a string")
    if "\0" in value:
        raise BadRecord("null byte")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecord("lone surrogate") from error
    return value


def _read_list(column: str, value: Any) -> str:
    """A list of texts that are not empty, joined."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise BadRecord(f"{column!r} is not a list")
    texts = [read_text(column, item).strip() for item in value]
    if not texts:
        raise BadRecord(f"{column!r} is empty")
    if not all(texts) or any(SEPARATOR in text for text in texts):
        raise BadRecord(f"an empty text in {column!r}")
    return SEPARATOR.join(texts)


def _read_name(column: str, value: Any) -> str:
    """The name of something: a text or a number, written alike however it was."""
    name = parse_label(value)
    if SEPARATOR in name:
        raise BadRecord(f"an ASCII unit separator in {column!r}")
    return name


def _read_names(column: str, value: Any) -> str:
    """A list of names, joined."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise BadRecord(f"{column!r} is not a list")
    if not value:
        raise BadRecord(f"{column!r} is empty")
    return SEPARATOR.join(_read_name(column, item) for item in value)


def _read_bytes(column: str, value: Any) -> str:
    """The bytes of a file as base64: themselves, base64 of them, or as the `bytes` of a record, in
    which datasets keep images and sounds."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, str):
        try:
            value = base64.b64decode(value, validate=True)
        except ValueError as error:
            raise BadRecord(f"{column!r} is not base64") from error
    if not isinstance(value, bytes):
        raise BadRecord(f"{column!r} holds no bytes")
    if not value:
        raise BadRecord(f"{column!r} is empty")
    return base64.b64encode(value).decode()


def _read_record(column: str, value: Any) -> str:
    """Values of any kind as JSON."""
    try:
        text = dump_record(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRecord(f"{column!r} holds what JSON does not") from error
    if _ESCAPED_NULL.search(text):
        raise BadRecord("null byte")
    return read_text(column, text)


def dump_record(value: Any) -> str:
    """Values of any kind as JSON. Marks that a compatibility form would turn into those of JSON's
    own stay as they are, as escapes. Raises what json does."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate(_NEAR_JSON)


_ESCAPED_NULL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_NEAR_JSON = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\uff02\uff3c\ufe68"}


def _read_label(column: str, value: Any) -> str:
    return parse_label(value)


def _read_labels(column: str, value: Any) -> str:
    """A list of class names, or a text of some between commas; there may be none."""
    given = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        given = [given]
    names = {parse_label(item) for item in given if item not in ("", None)}
    return SEPARATOR.join(sorted(names))


def _read_number(column: str, value: Any) -> str:
    try:
        number = float(value)
    except OverflowError as error:  # a whole number of hundreds of digits
        raise BadRecord(f"{column!r} is beyond what a float holds") from error
    except (TypeError, ValueError) as error:
        raise BadRecord(f"{column!r} is no number") from error
    if isinstance(value, bool) or not math.isfinite(number):
        raise BadRecord(f"{column!r} is no number")
    return repr(number)


_READERS: dict[str, Callable[[str, Any], str]] = {
    "text": read_text,
    "words": _read_list,
    "bytes": _read_bytes,
    "record": _read_record,
    "name": _read_name,
    "names": _read_names,
    "answer": read_text,
    "tags": _read_list,
    "label": _read_label,
    "labels": _read_labels,
    "number": _read_number,
}


def absent_part(
    wanted: Wanted, columns: Sequence[str], reasons: Collection[str]
) -> tuple[str, str, str] | None:
    """What no record of a file has, where that is why one is bad; a column that some record has is
    not what the file lacks."""
    for part in wanted.parts:
        told = (f"no column {part[1]!r}", f"no column {part[1]}:")
        if part[1] not in columns and any(reason.startswith(told) for reason in reasons):
            return part
    return None


def missing_column(where: str, part: tuple[str, str, str], columns: Sequence[str]) -> CorpusError:
    """The error for a file without the column of a part of its documents."""
    field, column, _ = part
    known = f"columns: {', '.join(columns)}" if columns else "it has no columns"
    key = {
        "text": "text",
        "label": "label",
        "by": "gather.by",
        "order": "gather.order",
        "template": "template",
    }.get(field, f"columns.{field}")
    return CorpusError(
        where, f"no {field} column {column!r}", known, f"set `{key}` of the source to one of them"
    )


def repeated_column(where: str, name: str) -> CorpusError:
    """The error for a file of which two columns have the wanted name."""
    return CorpusError(
        where,
        f"two columns are named {name!r}",
        "a column has a name of its own",
        "rename one of them, or leave it out",
    )


def whole_column(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array | None:
    """A column as one array of the type; None if it holds invalid UTF-8."""
    array = (
        pa.concat_arrays([chunk.cast(kind) for chunk in column.chunks])
        if column.num_chunks
        else pa.array([], kind)
    )
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        return None
    return array


def named_column(column: pa.ChunkedArray) -> pa.Array:
    """The labels of a column by their names; null for what is none, or cannot be told from a
    neighbour."""
    if pa.types.is_floating(
        column.type
    ):  # so large that other whole numbers would be read as the same
        column = pc.if_else(pc.less(pc.abs(column), MAX_EXACT), column, None)
    return (
        label_names(pa.concat_arrays(column.chunks))
        if column.num_chunks
        else pa.array([], pa.string())
    )


def parse_label(value: Any) -> str:
    """The name of a label. Raises BadRecord."""
    try:
        return label_name(value)
    except ValueError as error:
        raise BadRecord(str(error)) from error
