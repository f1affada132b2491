"""csv and tsv: RFC 4180 however the bytes arrive, and what breaks it costs itself."""

from __future__ import annotations

import csv
import io
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dray.corpus.delimited import Delimited, record_blocks, split_fields
from dray.corpus.reading import Bad, Span, SpanReader, find_bounds
from dray.corpus.records import BadRecord, Wanted
from dray.corpus.sources import find_files
from dray.errors import CorpusError
from dray.spec import Source

WANTED = Wanted((("text", "0", "text"),))
LIMIT = 1 << 20


def read(
    path: Path, limit: int = LIMIT, bounds: list[int] | None = None, **fields: Any
) -> tuple[list[str], list[Bad]]:
    """Texts and bad records of a file, read in ranges if bounds are given."""
    source = Source(path=str(path), **fields)
    file = find_files(source, "s")[0]
    found: list[str] = []
    bad: list[Bad] = []
    starts = [0, *(bounds or [])]
    for start, stop in zip(starts, [*starts[1:], None], strict=True):
        for documents in SpanReader(Span(file, start, stop), source, limit).read():
            found += documents.texts.to_pylist()
            bad += documents.bad
    return found, bad


def cut(
    data: bytes, size: int, limit: int = LIMIT, fields: int = 2
) -> tuple[list[bytes], list[tuple[int, int]]]:
    """Records and losses of data that arrives in pieces of a size."""
    parser = Delimited(",", True, False, [], fields, WANTED, {"0": 0})
    chunks: Iterator[bytes] = (data[start : start + size] for start in range(0, len(data), size))
    records: list[bytes] = []
    lost: list[tuple[int, int]] = []
    for offset, block, losses in record_blocks(chunks, limit, ",", fields):
        assert data[offset : offset + len(block)] == block
        records += [record for record in parser.split(block) if record]
        lost += [(item.offset, item.num_bytes) for item in losses]
    return records, lost


FIELDS = st.text('ab,"\n\r é\t', max_size=8)


@given(
    rows=st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=12),
    end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    form=st.sampled_from(["csv", "tsv"]),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_what_is_written_by_the_rule_is_read(
    tmp_path: Path, rows: list[tuple[str, str]], end: str, quoting: Any, form: str
) -> None:
    stream = io.StringIO(newline="")
    out = csv.writer(
        stream, quoting=quoting, lineterminator=end, delimiter="," if form == "csv" else "\t"
    )
    out.writerows([("text", "n"), *rows])
    path = tmp_path / f"a.{form}"
    path.write_bytes(stream.getvalue().encode())
    assert read(path) == ([text for text, _ in rows], [])


@given(
    data=st.lists(
        st.sampled_from([b"a", b",", b'"', b'""', b"\n", b"b,c\n", b'"x"', b'"y\nz",1\n']),
        max_size=40,
    ),
    size=st.integers(1, 30),
    limit=st.sampled_from([12, LIMIT]),
)
@settings(max_examples=150, deadline=None)
def test_pieces_of_any_size_give_the_same(data: list[bytes], size: int, limit: int) -> None:
    content = b"".join(data)
    records, lost = cut(content, size, limit)
    assert sum(map(len, records)) + sum(count for _, count in lost) <= len(content)
    if limit == LIMIT:
        assert (records, lost) == cut(content, len(content) + 1, limit)


@given(
    data=st.lists(
        st.sampled_from([b"a", b",", b'"', b'""', b"\n", b"b,c\n", b'"x"', b'"y\nz",1\n']),
        max_size=40,
    )
)
@settings(max_examples=100, deadline=None)
def test_blocks_and_records_parse_alike(data: list[bytes]) -> None:
    parser = Delimited(",", True, False, ["0", "1"], 2, WANTED, {"0": 0})
    for _, block, _ in record_blocks(iter([b"".join(data)]), LIMIT, ",", 2):
        at_once = parser.parse_block(block)
        if at_once is not None:
            records = [record.decode() for record in parser.split(block) if record.strip()]
            assert at_once[0].to_pylist() == [parser.parse_line(record)[0] for record in records]


def rows_with(line: bytes, count: int = 200) -> tuple[bytes, list[str]]:
    """A csv of lines with one of them amid them, and the texts of the others."""
    lines = [b"text,n", *(b"document %d,%d" % (i, i) for i in range(count))]
    lines.insert(100, line)
    return b"\n".join(lines) + b"\n", [f"document {i}" for i in range(count)]


@pytest.mark.parametrize(
    ("line", "rest"),
    [
        (b'"never closed,5', b""),
        (b'5,"never closed', b""),
        (b'"""never closed,5', b""),
        (b'"never closed,5', b'last,"said ""x"" twice"\n'),  # closes amid a field of another record
        (b'"closed" too early,5', b""),
    ],
)
def test_a_stray_quote_costs_its_line(tmp_path: Path, line: bytes, rest: bytes) -> None:
    data, texts = rows_with(line)
    path = tmp_path / "a.csv"
    path.write_bytes(data + rest)
    found, bad = read(path)
    assert found == texts + ["last"] * bool(rest)
    assert [(item.offset, item.num_bytes) for item in bad] == [(data.index(line), len(line))]
    assert "`quoting: none`" in bad[0].reason


def test_a_text_cut_off_in_a_quoted_field_is_one_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    tail = '"begins\n' + "a line of the text, and more\n" * 50 + "the end is miss"
    path.write_text("id,text,n\n1,ok,2\n2," + tail)
    found, bad = read(path)
    assert found == ["ok"]
    assert [(item.offset, item.num_bytes) for item in bad] == [(17, len("2," + tail))]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_a_sound_text_that_look_like_records_stay_in_it(tmp_path: Path, end: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(f'text,n{end}"one,1\ntwo,2\nthree",3{end}"x ""y""{end}z,4",5{end}'.encode())
    assert read(path) == (["one,1\ntwo,2\nthree", f'x "y"{end}z,4'], [])


def test_broken_quotes_in_a_text_of_lines_do_not_become_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    broken = '"he said "hi"\nand left\nin a hurry, they say",1'
    path.write_text(f"text,n\nok,1\n{broken}\nfine,2\n")
    found, bad = read(path)
    assert found == ["ok", "fine"]
    assert sum(item.num_bytes + 1 for item in bad) == len(broken) + 1


@pytest.mark.parametrize("size", [100, 100_000])
def test_a_quoted_field_over_the_limit_is_lost_and_reading_goes_on(size: int) -> None:
    long = b'"' + b"a line of text\n" * 50 + b'",1\n'
    data = b"ok,1\n" + long + b"fine,2\n" * 40
    records, lost = cut(data, size, limit=200)
    assert records == [b"ok,1", *[b"fine,2"] * 40]
    assert [offset for offset, _ in lost][:1] == [5]
    assert sum(count for _, count in lost) >= len(long) - 10


def test_a_quote_that_never_closes_is_held_within_bounds() -> None:
    def chunks() -> Iterator[bytes]:
        yield b'"open,0\n'
        for _ in range(300):
            yield b"a text,1\n" * 8192

    tracemalloc.start()
    found = [(len(block), lost) for _, block, lost in record_blocks(chunks(), 1 << 18, ",", 2)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(size for size, _ in found) == 300 * 8192 * 9
    assert [(item.offset, item.num_bytes) for _, lost in found for item in lost] == [(0, 7)]
    assert peak < 3_000_000


def test_ranges_begin_where_quoting_allows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["text", "n"])
        out.writerows([f"{i}\n" + '"quoted, text"\n1,2\n' * (i % 7 * 100), i] for i in range(3000))
        file.write('"stray,7\r\n')
        out.writerows([f"{i} at the end", i] for i in range(3000))
    source = Source(path=str(path))
    bounds = find_bounds(find_files(source, "s")[0], source, LIMIT, 4 << 20)
    assert len(bounds) > 1
    whole, bad = read(path)
    assert read(path, bounds=bounds) == (whole, bad)
    assert len(whole) == 6000
    assert len(bad) == 1


@pytest.mark.parametrize("form", ["csv", "tsv"])
def test_quoting_none_takes_quotes_as_they_are(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"a.{form}"
    delimiter = "," if form == "csv" else "\t"
    path.write_text(
        f'text{delimiter}n\n"good" film{delimiter}1\n"open{delimiter}0\nsay "x"{delimiter}1\n'
    )
    assert read(path, quoting="none") == (['"good" film', '"open', 'say "x"'], [])
    found, bad = read(path)
    assert found == ['say "x"']
    assert len(bad) == 2


def test_a_header_over_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbf"te\nxt","n"\n"a\nb",1\n')
    assert read(path, text="te\nxt") == (["a\nb"], [])
    with pytest.raises(CorpusError, match="no text column 'text'"):
        read(path)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,text,n\na,b,1\n")
    with pytest.raises(CorpusError, match="two columns are named 'text'"):
        read(path)


def test_fields() -> None:
    assert split_fields('a,"b ""c"", d",,"', ",", quoted=False) == ["a", '"b ""c""', ' d"', "", '"']
    assert split_fields('a,"b ""c"", d",', ",", quoted=True) == ["a", 'b "c", d', ""]
    for broken in ('"a', '"a"b,c', 'x,"a'):
        with pytest.raises(BadRecord):
            split_fields(broken, ",", quoted=True)
