"""Documents that are whole records, and targets that are texts, from every form with columns."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dray.corpus.cleaning import clean
from dray.corpus.reading import Bad, Span, SpanReader
from dray.corpus.sources import find_files
from dray.errors import CorpusError
from dray.spec import Cleaning, Field, Source

RECORD = {"record": Field("record")}
ANSWERED = {"text": Field("text"), "answer": Field("answer", column="answer")}
RECORDS = [
    {"instruction": "say “hi”", "output": "hi\nthere"},
    {"instruction": "漢字\uff02\uff3c", "output": ""},
]


def read(path: Path, fields: Any, **source: Any) -> tuple[list[str], Any, list[Bad]]:
    given = Source(path=str(path), **source)
    reader = SpanReader(Span(find_files(given, "s")[0]), given, 1 << 20, fields)
    texts: list[str] = []
    answers: list[str] = []
    bad: list[Bad] = []
    for documents in reader.read():
        texts += documents.texts.to_pylist()
        answers += [] if documents.labels is None else documents.labels.to_pylist()
        bad += documents.bad
    return texts, answers, bad


def write(folder: Path, form: str) -> Path:
    path = folder / f"a.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    elif form == "json":
        path.write_text(json.dumps(RECORDS, indent=2), encoding="utf-8")
    elif form == "jsonl":
        path.write_text("\n".join(map(json.dumps, RECORDS)), encoding="utf-8")
    else:
        rows = ['"say “hi”","hi\nthere"', "漢字\uff02\uff3c,"]
        path.write_text("\n".join(["instruction,output", *rows]), encoding="utf-8")
    return path


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_a_record_is_all_its_columns(tmp_path: Path, form: str) -> None:
    texts, _, bad = read(write(tmp_path, form), RECORD)
    assert not bad
    assert [json.loads(text) for text in texts] == RECORDS
    # A compatibility form of it is JSON, too.
    assert json.loads(unicodedata.normalize("NFKC", texts[1])).keys() == RECORDS[1].keys()


def test_a_record_may_be_one_column(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"id": 1, "talk": RECORDS}), encoding="utf-8")
    texts, _, _ = read(path, RECORD, columns={"record": "talk"})
    assert [json.loads(text) for text in texts] == [RECORDS]


def test_what_is_no_record_costs_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = ['{"a": 1, "a": 2}', '{"a": "\\u0000"}', '{"a": "\\\\u0000"}', '{"a": "\\ud800"}']
    path.write_text("\n".join([*lines, '{"a": NaN}', "[1]"]), encoding="utf-8")
    texts, _, bad = read(path, RECORD)
    assert [json.loads(text) for text in texts] == [{"a": "\\u0000"}]
    assert [item.reason for item in bad] == [
        "'a' is given twice",
        "null byte",
        "lone surrogate",
        "'*' holds what JSON does not",
        "not a JSON object",
    ]
    for form in ("text", "lines", "conll"):
        with pytest.raises(CorpusError, match=f"format {form} has no record column"):
            read(path, RECORD, format=form)


def test_answers_go_along_and_are_normalised(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [{"text": "a", "answer": "e\u0301"}, {"text": "", "answer": "x"}, {"text": "b"}]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    texts, answers, bad = read(path, ANSWERED)
    assert (texts, answers) == (["a", ""], ["e\u0301", "x"])
    assert [item.reason for item in bad] == ["no column 'answer'"]
    arrays = pa.array(texts, pa.large_string()), pa.array(answers)
    cleaned = clean(*arrays, Cleaning(), answers=True)
    assert (cleaned.texts.to_pylist(), cleaned.labels.to_pylist()) == (["a"], ["é"])
    assert clean(*arrays, Cleaning()).labels.to_pylist() == ["e\u0301"]
