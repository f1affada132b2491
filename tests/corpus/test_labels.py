"""What a label is, in any format, and which classes a corpus has."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dray.corpus.labels import choose_labels, label_name, label_names, similar_names
from dray.corpus.reading import Documents, Span, SpanReader
from dray.corpus.sources import find_files
from dray.errors import CorpusError
from dray.spec import Source

SAME = {
    "1": [1, "1", 1.0, "1.0", " 1 ", "+1", Decimal("1.00"), b"1"],
    "0": [0, "0", 0.0, -0.0, "-0", "0.000"],
    "-3": [-3, "-3", -3.0, "-3.0"],
    "true": [True, "true", "True", "TRUE"],
    "false": [False, "False"],
    "007": ["007"],
    "3.5": [3.5, "3.5"],
    "3.10": ["3.10"],
    "café": ["cafe\u0301", "café\n"],
    "90071992547409930001": [90071992547409930001, "90071992547409930001"],
}
NONE = [None, "", "  ", "\t", "\0", float("nan"), float("inf"), [1], {"a": 1}, "\ud800"]


@pytest.mark.parametrize("name", SAME)
def test_one_name_however_it_is_written(name: str) -> None:
    assert {label_name(value) for value in SAME[name]} == {name}


@pytest.mark.parametrize("value", NONE)
def test_what_is_no_label(value: Any) -> None:
    with pytest.raises(ValueError, match=r"no label|the label is"):
        label_name(value)


@given(st.text("0123.+- TRUEtruefalseé\u0301\t", max_size=8))
def test_a_name_is_its_own_name(text: str) -> None:
    try:
        name = label_name(text)
    except ValueError:
        return
    assert label_name(name) == name


def test_columns_of_every_type_are_named_by_the_same_rule() -> None:
    columns = [
        (pa.array([1, None, 2], pa.int8()), ["1", None, "2"]),
        (pa.array([1.0, float("nan"), 2.5]), ["1", None, "2.5"]),
        (pa.array([True, False, None]), ["true", "false", None]),
        (pa.array(["a ", "", "1.0"]).dictionary_encode(), ["a", None, "1"]),
        (pa.array([Decimal("2.00"), None], pa.decimal128(5, 2)), ["2", None]),
        (pa.array(["x", None], pa.string_view()), ["x", None]),
        (pa.array([], pa.string()), []),
    ]
    for column, names in columns:
        assert label_names(column).to_pylist() == names


def read(path: Path) -> tuple[Counter[str], Counter[str]]:
    """Labels of the documents, and reasons of the bad records."""
    source = Source(path=str(path), label="label")
    labels, reasons = Counter[str](), Counter[str]()
    for file in find_files(source, "data.train.0"):
        documents: Documents
        for documents in SpanReader(Span(file), source, 1 << 20).read():
            labels.update(documents.labels.to_pylist() if documents.labels is not None else [])
            reasons.update(item.reason for item in documents.bad)
    return labels, reasons


def write(folder: Path, form: str, values: list[Any]) -> Path:
    path = folder / f"data.{form}"
    rows = [{"text": f"text {i}", "label": value} for i, value in enumerate(values)]
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        buffer = io.StringIO()
        delimiter = "," if form == "csv" else "\t"
        writer = csv.DictWriter(buffer, ["text", "label"], delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(buffer.getvalue())
    return path


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("values", "names", "num_without"),
    [
        ([1, 0, 1, None, 0], {"1": 2, "0": 2}, 1),
        ([1.0, 0.0, float("nan")], {"1": 1, "0": 1}, 1),
        ([True, False, True], {"true": 2, "false": 1}, 0),
        (["a", " a", "b\u0065", "", "  ", "1.0", "1"], {"a": 2, "be": 1, "1": 2}, 2),
    ],
)
def test_every_format_gives_the_same_labels(
    tmp_path: Path, form: str, values: list[Any], names: dict[str, int], num_without: int
) -> None:
    if form in ("csv", "tsv"):  # as pandas writes it
        values = ["" if value is None or str(value) == "nan" else value for value in values]
    labels, reasons = read(write(tmp_path, form, values))
    assert labels == names
    assert reasons == ({"no label": num_without} if num_without else {})


def test_types_that_mix_in_json_lines(tmp_path: Path) -> None:
    labels, reasons = read(write(tmp_path, "jsonl", [1, "1", 1.0, True, "x", None, [1], {"a": 1}]))
    assert labels == {"1": 3, "true": 1, "x": 1}
    assert sum(reasons.values()) == 3
    assert {"no label"} < reasons.keys()


TEN = {str(i): 5 for i in range(10)}


@pytest.mark.parametrize(
    ("train", "validation", "rules", "labels"),
    [
        ({"b": 1, "a": 2}, {"a": 1}, {}, ("a", "b")),
        (TEN, {}, {}, tuple(TEN)),
        ({"10": 1, "9": 1, "-1": 1}, {}, {}, ("-1", "9", "10")),
        ({"10": 1, "9.5": 1, "0.5": 1, "-2": 1}, {}, {}, ("-2", "0.5", "9.5", "10")),
        ({"0": 1, "2": 1}, {}, {"num_labels": 4}, ("0", "1", "2", "3")),
        ({"1": 1, "2": 1}, {}, {"num_labels": 2}, ("1", "2")),
        ({"neg": 1}, {}, {"known": ("pos", "neg")}, ("pos", "neg")),
    ],
)
def test_the_classes(
    train: dict[str, int],
    validation: dict[str, int],
    rules: dict[str, Any],
    labels: tuple[str, ...],
) -> None:
    assert choose_labels(train, validation, **rules) == labels


@pytest.mark.parametrize(
    ("train", "validation", "rules", "what"),
    [
        (
            {"a": 1, "b": 2},
            {"negative": 5},
            {},
            r"no training document has the label 'negative' \(5\)",
        ),
        ({"a": 1}, {}, {}, "only the label 'a'"),
        ({"a": 1}, {}, {"num_labels": 2}, "only the label 'a'"),
        (
            {"0": 1, "1": 1, "2": 1},
            {},
            {"num_labels": 2},
            r"num_labels = 2: .* have 3 labels: '0' \(1\)",
        ),
        (
            {"a": 1, "b": 1},
            {},
            {"num_labels": 3},
            "num_labels = 3: the training documents have 2 labels",
        ),
        (
            {"1": 1, "2": 1, "5": 1},
            {},
            {"num_labels": 5},
            "num_labels = 5: the training documents have 3 labels",
        ),
        ({"1": 1, "0": 1, "true": 1}, {}, {}, "the labels mix '0', '1', 'true'"),
        ({f"{i / 7:.3f}": 1 for i in range(1, 40)}, {}, {}, "different fractions"),
        ({str(i): 1 for i in range(10_001)}, {}, {}, "10,001 different labels"),
        (
            {"x": 3, "neg": 1},
            {},
            {"known": ("pos", "neg")},
            r"does not know the label 'x' \(3\); it knows 'pos', 'neg'",
        ),
    ],
)
def test_classes_that_are_none(
    train: dict[str, int], validation: dict[str, int], rules: dict[str, Any], what: str
) -> None:
    with pytest.raises(CorpusError, match=what):
        choose_labels(train, validation, **rules)


def test_labels_that_are_as_good_as_alike() -> None:
    assert similar_names(("Pos", "neg", "pos", "ｐos", "very  bad", "very bad")) == [
        ["Pos", "pos", "ｐos"],
        ["very  bad", "very bad"],
    ]


def test_large_numbers_are_never_joined(tmp_path: Path) -> None:
    values = [2**64 + 1, 2**64 + 3, 2**53 + 1]
    assert set(read(write(tmp_path, "jsonl", values))[0]) == {str(value) for value in values}
