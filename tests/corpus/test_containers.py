"""What the first bytes of a file show, whatever its name says, and JSON arrays."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dray.corpus.arrays import array_to_lines
from dray.corpus.bytes_in import DamagedFile
from dray.corpus.reading import Bad, Span, SpanReader
from dray.corpus.sources import find_files
from dray.errors import CorpusError
from dray.spec import Source

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstandard.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


def read(path: Path, **fields: Any) -> tuple[list[str], list[Bad], str]:
    """Texts, bad records and what was noted of a file."""
    source = Source(path=str(path), **fields)
    reader = SpanReader(Span(find_files(source, "s")[0]), source, 1 << 20)
    found: list[str] = []
    bad: list[Bad] = []
    for documents in reader.read():
        found += documents.texts.to_pylist()
        bad += documents.bad
    return found, bad, reader.note


def jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_compression_of_several_members(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESS[suffix]
    path = write(tmp_path / f"a.jsonl.{suffix}", compress(jsonl("a")) + compress(jsonl("b", "c")))
    assert read(path) == (["a", "b", "c"], [], "")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_what_is_cut_off_says_so(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(0)
    whole = COMPRESS[suffix](jsonl(*(str(rng.random()) * 10 for _ in range(8_000))))
    found, bad, _ = read(write(tmp_path / f"a.jsonl.{suffix}", whole[: len(whole) * 2 // 3]))
    assert 0 < len(found) < 8_000
    assert [(item.reason.split()[0], item.ends_file) for item in bad] == [("truncated", True)]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.other"])
def test_compressed_under_another_name(tmp_path: Path, suffix: str, name: str) -> None:
    name = name.replace("other", next(other for other in COMPRESS if other != suffix))
    found, bad, note = read(write(tmp_path / name, COMPRESS[suffix](jsonl("a", "b"))))
    assert (found, bad) == (["a", "b"], [])
    assert note.endswith("whatever its name says")


def test_not_compressed_though_its_name_says_so(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.jsonl.gz", jsonl("a"))) == (
        ["a"],
        [],
        "not compressed, whatever its name says",
    )


def pack_zip(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def test_the_files_of_a_zip_archive(tmp_path: Path) -> None:
    files = {
        "b.jsonl": jsonl("c"),
        "a.jsonl": b"\xef\xbb\xbf" + jsonl("a", "b").rstrip(),
        "__MACOSX/a.jsonl": b"?",
        ".DS_Store": b"?",
        "empty/": b"",
    }
    assert read(write(tmp_path / "a.jsonl.zip", pack_zip(files))) == (["a", "b", "c"], [], "")
    found, bad, note = read(write(tmp_path / "a.csv", pack_zip({"x.csv": b"text,n\na,1"})))
    assert (found, bad, note) == (["a"], [], "zip, whatever its name says")


UNREADABLE: list[tuple[str, bytes, str]] = [
    ("a.jsonl", "\ufeffx".encode("utf-16-le") + b'{\0"\0', "UTF-16, where UTF-8 is read"),
    ("a.csv", "text,n\nabcdef,1\n".encode("utf-16"), "UTF-16, where UTF-8 is read"),
    ("a.txt", "plain words of text".encode("utf-16-be"), "UTF-16BE by its null bytes"),
    ("a.txt", "plain words".encode("utf-32"), "UTF-32, where UTF-8 is read"),
    ("a.jsonl", b"PK\x03\x04rest", "damaged or locked zip"),
    ("a.csv", b"text,n\ra,1\rb,2\r", "lines that end with carriage returns alone"),
    ("a.jsonl.gz", b"no magic at all \xff, but more of it", "damaged gzip"),
    (
        "a.csv.zip",
        pack_zip({"a.csv": b"text\na\n", "b.csv": b"text\nb\n"}),
        "a zip archive of 2 files; unpack it",
    ),
    ("a.jsonl.zip", pack_zip({".hidden": b"x"}), "a zip archive of 0 files"),
    ("a.jsonl", b"7z\xbc\xaf\x27\x1crest", "a 7z archive, where text is read"),
    ("a.jsonl.gz", gzip.compress(gzip.compress(b"{}")), "gzip inside, compressed twice"),
    ("a.jsonl.gz", b"", "empty, where gzip is read"),
    ("a.txt", b"%PDF-1.7", "a PDF"),
    ("a.jsonl", b"PAR1....", "a parquet file, where text is read"),
    ("a.parquet", b"", "empty, where parquet is read"),
    ("a.parquet", gzip.compress(b"PAR1"), "gzip around parquet"),
    ("a.parquet", b"PK\x03\x04rest", "zip around parquet"),
    ("a.parquet", b"PAR1 and then nothing", "damaged parquet"),
]


@pytest.mark.parametrize(
    ("name", "data", "reason"), UNREADABLE, ids=[f"{n} {r}" for n, _, r in UNREADABLE]
)
def test_what_is_no_data_costs_the_file_and_is_named(
    tmp_path: Path, name: str, data: bytes, reason: str
) -> None:
    found, bad, _ = read(write(tmp_path / name, data))
    assert found == []
    assert [(item.offset, item.num_bytes, item.ends_file) for item in bad] == [(0, len(data), True)]
    assert bad[0].reason.startswith(reason)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.parquet"])
def test_a_pointer_counts_for_the_file_it_stands_for(tmp_path: Path, name: str) -> None:
    pointer = (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:"
        + b"0" * 64
        + b"\nsize 123456789\n"
    )
    _, bad, _ = read(write(tmp_path / name, pointer))
    assert [(item.num_bytes, item.reason) for item in bad] == [
        (123456789, "a git-LFS pointer in place of the file; fetch it: git lfs pull")
    ]


# --- arrays -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout", [{}, {"indent": 2}, {"separators": (",", ":")}, {"indent": 1, "ensure_ascii": False}]
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_array_of_records_is_read(tmp_path: Path, layout: dict[str, Any], suffix: str) -> None:
    texts = ['a "quoted" \\ one', "brackets ]}, {[", "line\nbreak", "\\", "漢\u2028", ""]
    records = [{"text": text, "more": [{"deep": [1, {}]}, "x,y"]} for text in texts]
    data = b"\xef\xbb\xbf" + json.dumps(records, **layout).encode() + b"\n"
    found, bad, note = read(
        write(tmp_path / f"a.json{suffix}", gzip.compress(data) if suffix else data)
    )
    assert (found, bad, note) == (texts, [], "one JSON array")


def test_bad_records_of_an_array_cost_themselves_and_keep_their_offsets(tmp_path: Path) -> None:
    data = b'[\n {"text": "a"},\n {"text": 5},\n ["text"],\n {"text": "b"}\n]\n'
    found, bad, _ = read(write(tmp_path / "a.json", data))
    assert found == ["a", "b"]
    assert [data[item.offset : item.offset + item.num_bytes].strip() for item in bad] == [
        b'{"text": 5}',
        b'["text"]',
    ]


def test_an_array_without_an_end_is_damaged(tmp_path: Path) -> None:
    found, bad, _ = read(write(tmp_path / "a.json", b'[{"text": "a"}, {"text": "b"}, {"te'))
    assert found == ["a", "b"]
    assert [(item.reason, item.ends_file) for item in bad] == [("the JSON array has no end", True)]


@given(
    values=st.lists(
        st.dictionaries(
            st.text('ab"\\{}[],\n', max_size=4),
            st.text('ab"\\{}[],\n ', max_size=6) | st.lists(st.integers()),
            max_size=3,
        ),
        max_size=5,
    ),
    sizes=st.lists(st.integers(1, 9), min_size=1),
    indent=st.sampled_from([None, 1]),
)
@settings(max_examples=40, deadline=None)
def test_arrays_of_any_content_in_any_pieces(
    values: list[Any], sizes: list[int], indent: int | None
) -> None:
    data = json.dumps(values, indent=indent).encode()
    pieces, start = [], 0
    while start < len(data):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(data[start : start + size])
        start += size
    lines = b"".join(array_to_lines(iter(pieces)))
    assert len(lines) == len(data)
    assert [json.loads(line) for line in lines.split(b"\n") if line.strip()] == values
    with pytest.raises(DamagedFile):
        list(array_to_lines(iter([data[:-1]])))


# --- parquet ------------------------------------------------------------------------------------


def test_a_damaged_row_group_costs_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rng = random.Random(0)
    texts = [f"{i} {rng.random()}" for i in range(3000)]
    pq.write_table(
        pa.table({"text": texts}),
        path,
        row_group_size=1000,
        use_dictionary=False,
        compression="zstd",
    )
    metadata = pq.read_metadata(path)
    start = metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start + 40 : start + 2000] = b"\xff" * 1960
    path.write_bytes(data)
    found, bad, _ = read(path)
    assert found == texts[:1000] + texts[2000:]
    assert [(item.offset, item.num_documents, item.ends_file) for item in bad] == [
        (1000, 1000, False)
    ]
    assert "damaged parquet, row group 1" in bad[0].reason


def test_parquet_columns_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    text = pa.array(["a"])
    pq.write_table(pa.Table.from_arrays([text, text], names=["text", "text"]), path)
    with pytest.raises(CorpusError, match="two columns are named 'text'"):
        read(path)
    pq.write_table(pa.table({"text": [["a"]], "n": [{"x": 1}]}), path)
    with pytest.raises(CorpusError, match="the text column 'text' holds list"):
        read(path)
