"""Texts made of several columns: triples of a graph, entries of a lexicon."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dray.corpus.prepare import corpus_key
from dray.corpus.reading import Span, SpanReader
from dray.corpus.sources import list_source
from dray.errors import CorpusError, SpecError
from dray.spec import Field, Source, make_spec
from tiny import tiny_tree

TRIPLES = [
    {"head": "Paris", "relation": "is the capital of", "tail": "France", "year": 987, "kind": "a"},
    {"head": "Oslo", "relation": "lies in", "tail": "Norway {north}", "year": 1048, "kind": "b"},
    {"head": "Rome", "relation": "", "tail": "Italy", "year": 753, "kind": "a"},
]
TEMPLATE = "{head} {relation} {tail} {{since}} {year}."
TEXTS = [
    "Paris is the capital of France {since} 987.",
    "Oslo lies in Norway {north} {since} 1048.",
]


def write(folder: Path, form: str) -> Path:
    path = folder / f"triples.{form}"
    if form == "jsonl":
        path.write_text("\n".join(map(json.dumps, TRIPLES)), encoding="utf-8")
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(TRIPLES), path)
    else:
        with path.open("w", newline="") as file:
            rows = csv.DictWriter(file, list(TRIPLES[0]), delimiter="\t" if form == "tsv" else ",")
            rows.writeheader()
            rows.writerows(TRIPLES)
    return path


def read(
    path: Path, fields: dict[str, Field], **source: Any
) -> tuple[list[str], list[str], list[str]]:
    """Texts, labels, and why others are bad."""
    given = Source.model_validate({"path": str(path), "template": TEMPLATE, **source})
    (file,) = list_source(given, "data.train.0").files
    texts, labels, reasons = list[str](), list[str](), list[str]()
    for documents in SpanReader(Span(file), given, 10_000, fields).read():
        texts += documents.texts.to_pylist()
        labels += [] if documents.labels is None else documents.labels.to_pylist()
        reasons += [bad.reason for bad in documents.bad]
    return texts, labels, reasons


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "parquet"])
def test_a_text_is_the_template_with_the_columns_in_it(tmp_path: Path, form: str) -> None:
    path = write(tmp_path, form)
    texts, _, reasons = read(path, {"text": Field("text")})
    assert texts == TEXTS
    assert reasons == ["'relation' is empty"]
    fields = {"text": Field("text"), "label": Field("label")}
    texts, labels, _ = read(path, fields, label="kind")
    assert (texts, labels) == (TEXTS, ["a", "b"])


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_a_column_that_is_not_there_is_named(tmp_path: Path, form: str) -> None:
    with pytest.raises(CorpusError, match=r"no template column 'nobody'.*set `template`"):
        read(write(tmp_path, form), {"text": Field("text")}, template="{nobody}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no place", "no column is named"),
        ("{head", "a brace is written twice"),
        ("{head!r}", "the name of a column alone"),
        ("{head:>10}", "the name of a column alone"),
        ("{head.__class__}", "the name of a column alone"),
        ("{head[0]}", "the name of a column alone"),
        ("{}", "the name of a column alone"),
    ],
)
def test_what_is_no_template_is_refused(template: str, message: str) -> None:
    tree = tiny_tree(Path("none"))
    with pytest.raises(SpecError, match=message):
        make_spec({**tree, "data": {"train": {"path": "none", "template": template}}})


def test_another_template_is_another_corpus(tmp_path: Path) -> None:
    path = write(tmp_path, "csv")
    keys = set()
    for template in ("{head} {tail}", "{tail} {head}", None):
        source: dict[str, Any] = {"path": str(path), "text": "head"}
        source |= {} if template is None else {"template": template}
        tree = tiny_tree(tmp_path, data={"train": [source], "validation": None})
        keys.add(corpus_key(make_spec(tree)))
    assert len(keys) == 3
