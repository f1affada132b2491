"""Labels: what names a class in a file of any format, and which classes a corpus has.

A label is a text, a number, or true or false; its name is the same whether it was written `1`,
`"1"` or `1.0`. Refuses classes that nothing could be learnt of, and columns that are no labels.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa

from dray.errors import CorpusError

MAX_LABELS = 10_000
MAX_FRACTIONS = 20
"""More classes than this that are fractions are measurements, not classes."""
MAX_NAMED = 8
"""Labels that a message names."""
RULE = "a label is a text, a number, or true or false"


def label_name(value: Any) -> str:
    """The name of the class that a value stands for. Raises ValueError, with the reason, for what
    is no label.

    White space around it is nothing, and so is how a whole number is written: 1, "1", 1.0 and "+1"
    are one class; true and "True" are, too.
    """
    if value is None:
        raise ValueError("no label")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (float, Decimal)):
        if not math.isfinite(value):
            raise ValueError("no label")  # what pandas makes of a missing one
        return str(int(value)) if value == int(value) else str(value)
    if isinstance(value, bytes):
        value = value.decode(errors="surrogateescape")
    if not isinstance(value, (int, str)):
        raise ValueError(f"the label is a {type(value).__name__}; {RULE}")
    return _text_name(str(value))


def _text_name(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the label is no valid Unicode") from error
    name = unicodedata.normalize("NFC", text.replace("\0", " ").strip())
    if not name:
        raise ValueError("no label")
    if re.fullmatch(r"[+-]?(0|[1-9][0-9]*)(\.0+)?", name):  # 007 is a name
        sign, digits = "-" * name.startswith("-"), name.lstrip("+-").partition(".")[0]
        return digits if digits == "0" else sign + digits
    return name.lower() if name.lower() in ("true", "false") else name


def label_names(column: pa.Array) -> pa.Array:
    """The names of a column of values of any type, as strings; null for what is no label."""
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.string())
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    names: list[str | None] = []
    for value in encoded.dictionary.to_pylist():
        try:
            names.append(label_name(value))
        except ValueError:
            names.append(None)
    return pa.array(names, pa.string()).take(encoded.indices)


def choose_labels(
    train: Mapping[str, int],
    validation: Mapping[str, int],
    *,
    num_labels: int | None = None,
    known: Sequence[str] = (),
) -> tuple[str, ...]:
    """Names of the classes in the order of their ids: by number if all are numbers, else by
    name.

    `train`, `validation`: documents of each label. `num_labels`: how many classes the model has, if
    the spec says so; `known`: the classes of a model that is to be measured, which stay as they
    are. Raises CorpusError.
    """
    if known:
        _check_known(train, known)
        return tuple(known)
    only = {name: count for name, count in validation.items() if name not in train}
    if only:
        raise CorpusError(
            "data.validation",
            f"no training document has the label {named(only)}",
            "a class is learnt from its documents",
            "mend the label, or leave those documents out",
        )
    _check_kind(train)
    if len(train) < 2:
        raise CorpusError(
            "data.train.label",
            f"only the label {next(iter(train), '')!r}",
            "a classification has two classes or more",
            "check the column and the files",
        )
    return _sorted(train) if num_labels is None else _checked_number(train, num_labels)


def named(labels: Mapping[str, int]) -> str:
    """Labels with their numbers of documents, for a message."""
    shown = [f"{name!r} ({count:,})" for name, count in list(labels.items())[:MAX_NAMED]]
    return ", ".join(shown) + (
        f" and {len(labels) - MAX_NAMED:,} more" if len(labels) > MAX_NAMED else ""
    )


def similar_names(labels: Sequence[str]) -> list[list[str]]:
    """Groups of labels that differ only in capitals, accents' encoding or the white space
    inside."""
    groups: dict[str, list[str]] = {}
    for name in labels:
        groups.setdefault(
            " ".join(unicodedata.normalize("NFKC", name).casefold().split()), []
        ).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _sorted(labels: Mapping[str, int]) -> tuple[str, ...]:
    if all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", name) for name in labels):
        return tuple(sorted(labels, key=lambda name: (Decimal(name), name)))
    return tuple(sorted(labels))


def _check_known(found: Mapping[str, int], known: Sequence[str]) -> None:
    unknown = {name: count for name, count in found.items() if name not in set(known)}
    if unknown:
        more = " …" if len(known) > MAX_NAMED else ""
        raise CorpusError(
            "--data",
            f"the model does not know the label {named(unknown)}",
            f"it knows {', '.join(map(repr, known[:MAX_NAMED]))}{more}",
            "check the label column",
        )


def _check_kind(labels: Mapping[str, int]) -> None:
    """Raises CorpusError for columns that hold no classes, or name one class twice."""
    where = "data.train.label"
    if len(labels) > MAX_LABELS:
        raise CorpusError(
            where,
            f"{len(labels):,} different labels",
            f"at most {MAX_LABELS:,}",
            "is it a column of text?",
        )
    fractions = [name for name in labels if re.fullmatch(r"-?[0-9]*\.[0-9]+(e-?[0-9]+)?", name)]
    if len(fractions) > MAX_FRACTIONS:
        raise CorpusError(
            where,
            f"{len(fractions):,} different fractions, such as {fractions[0]}",
            "a label names a class",
            "is it a column of measurements?",
        )
    if {"true", "false"} & labels.keys() and {"0", "1"} & labels.keys():
        raise CorpusError(
            where,
            f"the labels mix {', '.join(map(repr, sorted(labels)[:MAX_NAMED]))}",
            "true is another class than 1, and false than 0",
            "write them alike in all files",
        )


def _checked_number(labels: Mapping[str, int], num_labels: int) -> tuple[str, ...]:
    """The labels of a model with `num_labels` classes; numbers from 0 on may leave some of them
    out."""
    if len(labels) == num_labels:
        return _sorted(labels)
    if set(labels) <= set(map(str, range(num_labels))):
        return tuple(map(str, range(num_labels)))
    way_out = "leave it out: classes are counted in the corpus"
    raise CorpusError(
        f"model.num_labels = {num_labels}",
        f"the training documents have {len(labels)} labels: "
        f"{named({name: labels[name] for name in _sorted(labels)})}",
        "every label is a class, and every class has a name",
        way_out,
    )
