"""Reading: every form gives the same documents however it is stored and cut, and bad records cost
themselves."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dray.corpus import bytes_in
from dray.corpus.bytes_in import line_blocks
from dray.corpus.parsing import make_parser
from dray.corpus.reading import Bad, Span, SpanReader
from dray.corpus.records import PLAIN, Wanted
from dray.corpus.sources import InputFile, find_files
from dray.errors import CorpusError
from dray.spec import Source

LIMIT = 1 << 20
TEXTS = [
    "plain",
    "two words",
    'quoted "x", and a comma',
    "tab\there",
    "漢字 😀 é",
    "  spaces  ",
    "back\\slash \\n",
]


def read(
    path: Path, start: int = 0, stop: int | None = None, limit: int = LIMIT, **fields: Any
) -> tuple[list[tuple[str, str | None]], list[Bad], str]:
    """(text, label) of the documents, the bad records and the file's digest."""
    source = Source(path=str(path), **fields)
    reader = SpanReader(Span(find_files(source, "s")[0], start, stop), source, limit)
    found: list[tuple[str, str | None]] = []
    bad: list[Bad] = []
    for documents in reader.read():
        texts = documents.texts.to_pylist()
        labels = (
            documents.labels.to_pylist() if documents.labels is not None else [None] * len(texts)
        )
        found += zip(texts, labels, strict=True)
        bad += documents.bad
    return found, bad, reader.sha256


def texts(path: Path, **fields: Any) -> list[str]:
    found, bad, _ = read(path, **fields)
    assert not bad
    return [text for text, _ in found]


def reasons(bad: list[Bad]) -> list[tuple[int, str]]:
    return [(item.offset, item.reason.partition(" (")[0]) for item in bad]


def jsonl(items: list[str]) -> bytes:
    records = ({"id": index, "text": item, "label": index % 3} for index, item in enumerate(items))
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_form_plain_or_compressed(tmp_path: Path, suffix: str) -> None:
    def write(name: str, data: bytes) -> Path:
        path = tmp_path / (name + suffix)
        path.write_bytes(COMPRESS[suffix](data))
        return path

    assert texts(write("a.jsonl", jsonl(TEXTS))) == TEXTS
    assert texts(write("a.txt", "a\nb\n漢".encode())) == ["a\nb\n漢"]
    assert texts(write("b.txt", b"a\r\n\n  \nb"), format="lines") == ["a", "b"]
    rows = 'id,text\n1,"say ""x"", ok"\n2,plain\n3,漢\n'
    assert texts(write("a.csv", rows.encode())) == ['say "x", ok', "plain", "漢"]
    assert texts(write("a.tsv", b'text\tn\nsay "x\t1\nb\t2\n')) == ['say "x', "b"]


def test_digest_is_that_of_the_stored_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(TEXTS)))
    import hashlib

    assert read(path)[2] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_columns_by_number_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('good " film\t1\nbad film\t0\n')
    found, bad, _ = read(path, header=False, text="0", label="1")
    assert (found, bad) == ([('good " film', "1"), ("bad film", "0")], [])


@pytest.mark.parametrize("values", [["b", "a", "c"], [2, 0, 1], [True, False, True]])
def test_labels_of_any_type_become_names(tmp_path: Path, values: list[Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "t", "y": value}) + "\n" for value in values))
    found, _, _ = read(path, label="y")
    assert [label for _, label in found] == [str(value).lower() for value in values]


def test_labels_of_mixed_types_and_odd_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(
            json.dumps({"text": "t", "y": value}) + "\n" for value in ["a", 1, None, 1.5, "", [1]]
        )
    )
    found, bad, _ = read(path, label="y")
    assert [label for _, label in found] == ["a", "1", "1.5"]
    assert len(bad) == 3


BAD_LINES: list[tuple[bytes, str]] = [
    (b'{"text": "caf\xe9"}', "invalid UTF-8"),
    (b'{"text": "half', "broken JSON"),
    (b'{"text": "a\x00b"}', "null byte"),
    (b'{"text": "a\\u0000b"}', "null byte"),
    (b'{"text": 5}', "'text' is not a string"),
    (b'{"text": null}', "'text' is not a string"),
    (b'{"text": "a", "text": "b"}', "'text' is given twice"),
    (b'{"text": "a"},', "broken JSON"),
    (b"{", "broken JSON"),
    (b'{"other": "x"}', "no column 'text'"),
    (b'["text"]', "not a JSON object"),
    (b'{"text": "\\ud800"}', "lone surrogate"),
    (b'{"text": "a"} {"text": "b"}', "broken JSON"),
    (b'{"text": "' + b"x" * 3000 + b'"}', "longer than data.max_record_bytes = 2000"),
    (b"[" * 2000, "broken JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[reason for _, reason in BAD_LINES])
def test_a_bad_line_costs_itself(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    head, tail = jsonl(["one", "two"]), jsonl(["three"])
    path.write_bytes(head + line + b"\n" + tail)
    found, bad, _ = read(path, limit=2000)
    assert [text for text, _ in found] == ["one", "two", "three"]
    assert reasons(bad) == [(len(head), reason)]
    assert bad[0].num_bytes == len(line)
    assert bad[0].file == str(path)


def test_all_bad_lines_together(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = jsonl(["x"])
    path.write_bytes(b"".join(good + line + b"\n" for line, _ in BAD_LINES))
    found, bad, _ = read(path, limit=2000)
    assert len(found) == len(BAD_LINES)
    assert [item.reason.partition(" (")[0] for item in bad] == [reason for _, reason in BAD_LINES]


@pytest.mark.parametrize(
    ("name", "data", "good", "bad"),
    [
        ("a.csv", b'text,n\nok,1\n"open,2\nfine,3\nshort\n', ["ok", "fine"], [12, 27]),
        ("a.csv", b'text,n\nok,1\n"two\nlines"x,2\nfine,3\n', ["ok", "fine"], [12]),
        (
            "a.csv",
            b'text,n\nok,1\n"two\nlines",2\nfine,3,4\nend,5',
            ["ok", "two\nlines", "end"],
            [26],
        ),
        ("a.tsv", b"text\tn\nok\t1\nsh\xffrt\t2\na\tb\tc\n", ["ok"], [12, 20]),
        ("a.txt", b"fine\nb\xffd\nnu\x00l\nend", ["fine", "end"], [5, 9]),
    ],
)
def test_bad_lines_of_other_forms(
    tmp_path: Path, name: str, data: bytes, good: list[str], bad: list[int]
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    found, quarantined, _ = read(path, **({"format": "lines"} if name == "a.txt" else {}))
    assert [text for text, _ in found] == good
    assert [item.offset for item in quarantined] == bad


@pytest.mark.parametrize(
    ("data", "reason", "offset"),
    [
        (b"ok \xff", "invalid UTF-8", 3),
        (b"a\x00b", "null byte", 1),
        (b"x" * 5000, "longer than data.max_record_bytes = 2000", 0),
    ],
)
def test_a_bad_whole_file_document(tmp_path: Path, data: bytes, reason: str, offset: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    found, bad, digest = read(path, limit=2000)
    assert (found, reasons(bad)) == ([], [(offset, reason)])
    assert len(digest) == 64


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_file_gives_all_before_the_damage(tmp_path: Path, suffix: str) -> None:
    items = [f"{i} " + str(zlib.crc32(bytes([i % 256, i // 256]))) * 20 for i in range(3000)]
    path = tmp_path / f"a.jsonl{suffix}"
    whole = COMPRESS[suffix](jsonl(items))
    path.write_bytes(whole[: len(whole) * 2 // 3])
    found, bad, _ = read(path)
    assert [text for text, _ in found] == items[: len(found)]
    assert len(found) > 1000 if suffix == ".gz" else len(found) >= 0
    assert [item.reason for item in bad] == [f"truncated {'gzip' if suffix == '.gz' else 'zstd'}"]
    assert bad[0].offset == len(jsonl(items[: len(found)]))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damage_and_what_is_no_archive_at_all(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"\x00\x01this is not compressed")
    found, bad, _ = read(path)
    assert found == []
    assert bad[0].reason.startswith("damaged")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_members_one_after_the_other(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](jsonl(["a"])) + COMPRESS[suffix](jsonl(["b", "c"])))
    assert texts(path) == ["a", "b", "c"]


def test_byte_order_mark_blank_lines_and_no_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\r\n\n   \n{"text": "b"}')
    assert texts(path) == ["a", "b"]
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext\na\n\nb")
    assert texts(path) == ["a", "b"]


@given(data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_spans_give_every_line_exactly_once(tmp_path: Path, data: st.DataObject) -> None:
    lines = data.draw(st.lists(st.text("abé\r ", max_size=12), max_size=12))
    content = "\n".join(["", *lines]).encode()
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(content) - 1)), max_size=5)))
    whole, _, _ = read(path, format="lines")
    bounds = [0, *cuts]
    pieces = [
        read(path, start, stop, format="lines")[0]
        for start, stop in zip(bounds, [*cuts, None], strict=True)
    ]
    assert [item for piece in pieces for item in piece] == whole
    assert [text for text, _ in whole] == [line.rstrip("\r") for line in lines if line.strip()]


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["text", "n", "z"]), st.none() | st.text(max_size=8) | st.integers()
        )
    )
)
@settings(max_examples=50, deadline=None)
def test_blocks_and_lines_parse_alike(records: list[dict[str, Any]]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    data = b"".join(line.encode("utf-8", "surrogatepass") + b"\n" for line in lines)
    parser = make_parser(
        InputFile("", "", 0, "", "jsonl", ""), Source(path="x"), Wanted.of(Source(path="x"), PLAIN)
    )
    at_once = parser.parse_block(data) if records else None
    if at_once is not None:
        assert at_once[0].to_pylist() == [
            parser.parse_line(line)[0] for line in data.decode().split("\n") if line
        ]


@given(
    st.lists(
        st.tuples(st.text('a," é', max_size=6), st.text("b1", min_size=1, max_size=3)), min_size=1
    )
)
@settings(max_examples=50, deadline=None)
def test_csv_blocks_and_lines_parse_alike(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    quoted = [(f'"{text.replace(chr(34), chr(34) * 2)}"', other) for text, other in rows]
    path = tmp_path_factory.getbasetemp() / "alike.csv"
    path.write_text("text,other\n" + "".join(",".join(row) + "\n" for row in quoted))
    source = Source(path=str(path))
    parser = make_parser(find_files(source, "s")[0], source, Wanted.of(source, PLAIN))
    lines = [",".join(row) for row in quoted]
    at_once = parser.parse_block("".join(line + "\n" for line in lines).encode())
    assert at_once is not None
    assert (
        at_once[0].to_pylist()
        == [parser.parse_line(line)[0] for line in lines]
        == [text for text, _ in rows]
    )


def test_a_huge_line_is_skipped_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(jsonl(["before"]) + b'{"text": "')
        for _ in range(50):
            stream.write(b"x" * 1_000_000)
        stream.write(b'"}\n' + jsonl(["after"]))
    tracemalloc.start()
    found, bad, _ = read(path, limit=LIMIT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [text for text, _ in found] == ["before", "after"]
    assert [(item.offset, item.num_bytes) for item in bad] == [(len(jsonl(["before"])), 50_000_012)]
    assert peak < 8 * bytes_in.BLOCK_BYTES


def test_line_blocks_of_any_chunking() -> None:
    data = b"one\ntwo\nthree is long\nfour\nlast"

    def chunks(size: int) -> Iterator[bytes]:
        yield from (data[i : i + size] for i in range(0, len(data), size))

    for size in range(1, len(data) + 1):
        lines: list[bytes] = []
        bad: list[tuple[int, int, str]] = []
        for offset, block, skipped in line_blocks(chunks(size), 5):
            assert data[offset : offset + len(block)] == block
            lines += [line for line in block.split(b"\n") if line]
            bad += skipped
        # A line that arrived whole is left to the parser to judge; one that did not is skipped.
        assert [line for line in lines if line != b"three is long"] == [
            b"one",
            b"two",
            b"four",
            b"last",
        ]
        assert [item[:2] for item in bad] in ([], [(8, 13)])
        assert (b"three is long" in lines) != bool(bad)


# --- parquet ------------------------------------------------------------------------------------


def write_parquet(path: Path, columns: dict[str, Any], rows: int = 2) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return path


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_columns_of_any_text_type(tmp_path: Path, kind: pa.DataType) -> None:
    values = ["a", "漢", "c", "a", ""]
    column = (
        pa.array(values).dictionary_encode()
        if pa.types.is_dictionary(kind)
        else pa.array(values).cast(kind)
    )
    path = write_parquet(tmp_path / "a.parquet", {"text": column, "y": pa.array(range(5))})
    assert texts(path) == values
    assert [label for _, label in read(path, label="y")[0]] == ["0", "1", "2", "3", "4"]
    assert [text for text, _ in read(path, 1, 2)[0] + read(path, 2, None)[0]] == values[2:]


def test_bad_parquet_rows_cost_themselves(tmp_path: Path) -> None:
    column = pa.array([b"ok", b"\xff", None, b"nu\x00l", b"x" * 3000, b"end"], pa.binary())
    path = write_parquet(tmp_path / "a.parquet", {"text": column})
    found, bad, _ = read(path, limit=2000)
    assert [text for text, _ in found] == ["ok", "end"]
    assert [item.offset for item in bad] == [1, 2, 3, 4]
    assert [text for text, _ in read(path, 2, None, limit=2000)[0]] == ["end"]
    assert [item.offset for item in read(path, 2, None, limit=2000)[1]] == [4]


def test_a_damaged_parquet_file_is_one_bad_record(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ["a"] * 100})
    path.write_bytes(path.read_bytes()[:-20])
    found, bad, _ = read(path)
    assert found == []
    assert bad[0].reason.startswith("damaged parquet")


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "fields", "message"),
    [
        ("a.jsonl", b'{"body": "x", "id": 1}\n', {}, "no text column 'text'; columns: body, id"),
        (
            "a.jsonl",
            b'{"text": "x", "id": 1}\n',
            {"label": "y"},
            "no label column 'y'; columns: text, id",
        ),
        ("a.csv", b"body,id\nx,1\n", {}, "no text column 'text'; columns: body, id"),
        ("a.tsv", b"x\ty\n", {"header": False, "text": "2"}, "no text column '2'; columns: 0, 1"),
        ("a.csv", b'"open\n', {}, "its first line is broken"),
        ("a.txt", b"x\n", {"format": "lines", "label": "y"}, "format lines has no label column"),
        ("a.txt", b"x\n", {"label": "y"}, "format text has no label column"),
    ],
)
def test_a_missing_column_names_those_there_are(
    tmp_path: Path, name: str, data: bytes, fields: dict[str, Any], message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=message):
        read(path, **fields)


def test_parquet_refusals(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"n": [1], "text": [2.5], "t": ["x"]})
    with pytest.raises(CorpusError, match="holds double"):
        read(path)
    with pytest.raises(CorpusError, match="no text column 'body'; columns: n, text, t"):
        read(path, text="body")
    path = write_parquet(tmp_path / "b.parquet", {"text": ["x"], "y": [[1]]})
    with pytest.raises(CorpusError, match="the label column 'y' holds list"):
        read(path, label="y")
