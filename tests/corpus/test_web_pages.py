"""WARC files and pages of HTML: what becomes a document, and every other record by its reason."""

from __future__ import annotations

import gzip
import random
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dray.corpus.pages import DroppedPage, decode_page, extract_text, page_text
from dray.corpus.prepare import corpus_key, find_inputs, prepare
from dray.corpus.reading import Bad, Span, SpanReader
from dray.corpus.records import PLAIN
from dray.corpus.shards import read_groups
from dray.corpus.sources import find_files
from dray.errors import CorpusError, SpecError
from dray.spec import Source, Spec, make_spec
from dray.storage.filesystem import open_filesystem
from tiny import tiny_tree

pytest.importorskip("fastwarc", reason="dray[web] is not installed")
pytest.importorskip("trafilatura", reason="dray[web] is not installed")

ARTICLE = (
    "<html><head><title>Rivers</title></head><body><nav><a href=/>Home</a> <a href=/x>Menu</a>"
    "</nav><main><article><h1>Rivers</h1><p>{}</p></article></main><footer>All rights reserved"
    "</footer></body></html>"
)
TEXT = "A river rises in the hills, gathers its brooks on the way, and comes to the sea at last. "
CHINESE = "雨水汇成河流，河流奔向大海。" * 5


def page(text: str = TEXT * 3) -> str:
    return ARTICLE.format(text)


def http(
    body: bytes, media_type: str = "text/html", status: str = "200 OK", **headers: str
) -> bytes:
    lines = [f"HTTP/1.1 {status}", *([f"Content-Type: {media_type}"] if media_type else [])]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def record(
    block: bytes, kind: str = "response", media_type: str = "application/http", nth: int = 0
) -> bytes:
    head = (
        f"WARC/1.1\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{nth:08d}>\r\n"
        f"WARC-Date: 2024-05-06T07:08:09Z\r\nWARC-Target-URI: <http://rivers.example/{nth}>\r\n"
        f"Content-Type: {media_type}; msgtype={kind}\r\nContent-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def read(path: Path, limit: int = 1 << 20, fields: Any = PLAIN, **source: Any) -> Any:
    """Texts, targets, dropped by reason, bad records, and bytes that were read."""
    texts: list[str] = []
    targets: list[str] = []
    dropped: Counter[str] = Counter()
    bad: list[Bad] = []
    num_bytes = 0
    given = Source(path=str(path), **source)
    for file in find_files(given, "data.train.0"):
        for documents in SpanReader(Span(file), given, limit, fields).read():
            texts += documents.texts.to_pylist()
            targets += [] if documents.labels is None else documents.labels.to_pylist()
            dropped += documents.dropped
            bad += documents.bad
            num_bytes += documents.num_bytes
    return texts, targets, dropped, bad, num_bytes


def spec_of(path: Path, **source: Any) -> Spec:
    tree = tiny_tree(Path("."))
    tree["data"] = {"train": {"path": str(path), **source}, "sequence_tokens": 32}
    tree["tokenizer"] = {"train": "byte_bpe", "vocab_size": 300}
    return make_spec(tree)


# --- WARC files ----------------------------------------------------------------------------------


def test_pages_become_documents_and_every_other_record_has_a_reason(tmp_path: Path) -> None:
    html = page().encode()
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(html[i : i + 100]), html[i : i + 100])
                       for i in range(0, len(html), 100)) + b"0\r\n\r\n"  # fmt: skip
    records = [
        record(b"software: a crawler\r\n", "warcinfo", "application/warc-fields"),
        record(b"GET / HTTP/1.1\r\n\r\n", "request"),
        record(http(html)),
        record(http(gzip.compress(html), Content_Encoding="gzip")),
        record(http(zlib.compress(html), Content_Encoding="deflate")),
        record(http(chunked, Transfer_Encoding="chunked")),
        record(http(html, Content_Encoding="gzip")),  # the crawler has decoded it already
        record(http(page(CHINESE).encode("gbk"), "text/html; charset=GBK")),
        record(http(b"plain & simple, <b>as it is</b>", "text/plain; charset=utf-8")),
        record(http(html, "")),
        record(http(html, status="404 Not Found")),
        record(http(b"", status="301 Moved")),
        record(http(b"\x89PNG\r\n\x1a\n", "image/png")),
        record(http(b"%PDF-1.4", "")),
        record(http(b"<html><script>let x = 1</script></html>")),
        record(http(b"<div>" * 5000 + b"deep")),
        record(b"20240506\nrivers.example. 300 IN A 10.0.0.1", media_type="text/dns"),
        record(b"fetchTimeMs: 3\r\n", "metadata", "application/warc-fields"),
        record(http(b""), "revisit"),
        record(http(gzip.compress(html)[:-30], Content_Encoding="gzip")),
        record(b"nothing of the kind"),
        record(http(html, Content_Encoding="rot13").replace(b"<html>", b"uryyb ")),
    ]  # fmt: skip
    for name, data in (("a.warc", b"".join(records)),
                       ("a.warc.gz", b"".join(map(gzip.compress, records)))):  # fmt: skip
        (tmp_path / name).write_bytes(data)
        texts, _, dropped, bad, num_bytes = read(tmp_path / name)
        assert len(texts) == 8
        assert all(TEXT.strip() in text for text in (*texts[:5], texts[7]))
        assert all("Menu" not in text and "<p>" not in text for text in texts)
        assert "雨水汇成河流" in texts[5]
        assert texts[6] == "plain & simple, <b>as it is</b>"
        assert dropped == {
            "warc_info": 1, "warc_request": 1, "http_status": 2, "not_html": 2, "no_text": 1,
            "too_complex": 1, "not_http": 1, "warc_metadata": 1, "warc_revisit": 1,
        }  # fmt: skip
        assert [one.reason.partition(" (")[0] for one in bad] == [
            "a body that cannot be decoded",
            "no HTTP response",
            "a body that cannot be decoded",
        ]
        assert not any(one.ends_file for one in bad)
        content = b"".join(records)
        assert all(content[one.offset :].startswith(b"WARC/1.1") for one in bad)
        assert len(texts) + dropped.total() + len(bad) == len(records)
        assert num_bytes < len(content)


def test_a_page_has_a_url_and_a_date(tmp_path: Path) -> None:
    path = tmp_path / "a.warc"
    path.write_bytes(b"".join(record(http(page(f"{TEXT} {i}").encode()), nth=i) for i in range(3)))
    texts, targets, *_ = read(path, template="{url} {date}", label="url")
    assert texts == [f"http://rivers.example/{i} 2024-05-06T07:08:09Z" for i in range(3)]
    assert targets == [f"http://rivers.example/{i}" for i in range(3)]
    with pytest.raises(CorpusError, match="no text column 'body'; columns: text, url, date"):
        read(path, text="body")


def test_a_record_over_the_limit_costs_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.warc"
    large = http(page("long " * 100_000).encode())
    bomb = http(gzip.compress(page("long " * 100_000).encode()), Content_Encoding="gzip")
    path.write_bytes(record(large) + record(bomb) + record(b"x" * 200_000, "resource")
                     + record(http(page().encode())))  # fmt: skip
    texts, _, dropped, bad, _ = read(path, limit=100_000)
    assert (len(texts), dropped) == (1, {"warc_resource": 1})
    assert {one.reason for one in bad} == {"longer than data.max_record_bytes = 100000"}
    assert [one.num_bytes for one in bad] == [len(large), len(bomb)]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_file_gives_what_comes_before(tmp_path: Path, compressed: bool) -> None:
    whole = [record(http(page(f"{TEXT} {i}" * 20).encode()), nth=i) for i in range(10)]
    pack = gzip.compress if compressed else bytes
    start = sum(len(pack(one)) for one in whole[:6])
    data = b"".join(map(pack, whole))
    path = tmp_path / ("a.warc.gz" if compressed else "a.warc")
    cut_head, cut_body = (60, len(pack(whole[6])) // 2)
    for damaged in (
        data[: start + cut_head],
        data[: start + cut_body],
        data[:start] + b"xxxx" + data[start:],
        data[:start] + pack(whole[6].replace(b"-Length: ", b"-Length: x")) + data[:500],
    ):  # fmt: skip
        path.write_bytes(damaged)
        texts, _, dropped, bad, _ = read(path)
        assert (len(texts), dropped) == (6, {})
        assert [one.ends_file for one in bad] == [True]
        assert sum(map(len, whole[:5])) < bad[0].offset <= sum(map(len, whole[:6]))
    path.write_bytes(pack(b"not a WARC at all\n" * 100))
    texts, _, _, bad, _ = read(path)
    assert (texts, len(bad), bad[0].offset, bad[0].num_bytes) == ([], 1, 0, 1800)
    path.write_bytes(b"")
    assert read(path)[:1] == ([],) or compressed


def test_an_outage_of_the_storage_is_no_damage() -> None:
    from dray.corpus.warc import read_warc

    def chunks() -> Any:
        yield record(http(page().encode()))
        raise ConnectionResetError("the storage is gone")

    found = read_warc(chunks(), "main", 1 << 20)
    assert next(found).values
    with pytest.raises(ConnectionResetError):
        list(found)


@pytest.mark.usefixtures("local_ray")
def test_from_a_real_crawl_to_rows(tmp_path: Path, shared_data: Path) -> None:
    path = shared_data / "web_messy/sample-0000.warc.gz"
    spec = spec_of(path)
    corpus = prepare(spec, str(tmp_path))
    manifest = corpus.manifest
    assert (manifest.num_records, manifest.num_bad) == (48, 0)
    dropped = {name: n for name, n in manifest.dropped.items() if name.startswith("warc_")}
    assert dropped == {
        "warc_info": 1, "warc_metadata": 1, "warc_request": 22, "warc_resource": 2,
    }  # fmt: skip
    assert manifest.train.num_documents + sum(manifest.dropped.values()) == 48
    (file,) = corpus.source_files()
    assert (file.form, file.num_documents, file.num_dropped) == ("warc", 22, 26)
    told = "\n".join(corpus.describe())
    assert "1 warc" in told
    assert "22 warc_request" in told
    filesystem, folder = open_filesystem(corpus.folder)
    (source,) = manifest.train.sources
    groups = range(-(-source.num_rows // manifest.group_rows))
    rows = read_groups(filesystem, folder, source, groups, manifest.group_rows)
    assert rows.num_rows == manifest.train.num_rows > 100
    other = prepare(spec_of(path, extract="trafilatura"), str(tmp_path)).manifest
    assert other.key != manifest.key
    assert 0.3 < other.train.num_text_bytes / manifest.train.num_text_bytes < 0.9


@pytest.mark.usefixtures("local_ray")
def test_a_corpus_of_no_page_says_what_there_was(tmp_path: Path) -> None:
    (tmp_path / "a.warc").write_bytes(record(b"GET / HTTP/1.1\r\n\r\n", "request") * 3)
    with pytest.raises(CorpusError, match="dropped: 3 warc_request"):
        prepare(spec_of(tmp_path / "a.warc"), str(tmp_path / "out"))


# --- files of HTML -------------------------------------------------------------------------------


def test_a_file_of_html_is_a_page(tmp_path: Path) -> None:
    for folder, text in (("rivers", TEXT * 3), ("lakes", TEXT * 2)):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / "a.html").write_text(page(text))
    (tmp_path / "in/lakes/b.htm.gz").write_bytes(
        gzip.compress(page("naïve " * 20).encode("latin1"))
    )
    (tmp_path / "in/lakes/c.html").write_bytes(page("wide " * 20).encode("utf-16"))
    (tmp_path / "in/lakes/d.html").write_text("<p></p>")
    (tmp_path / "in/lakes/e.html").write_bytes(b"%PDF-1.4 and so on")
    (tmp_path / "in/lakes/f.html").write_text(page("long " * 30_000))
    texts, targets, dropped, bad, _ = read(tmp_path / "in", 100_000, format="html", label="folder")
    assert targets == ["lakes", "lakes", "lakes", "rivers"]
    assert "naïve naïve" in texts[1]
    assert "wide wide" in texts[2]
    assert dropped == {"no_text": 1}
    assert [one.reason for one in bad] == [
        "a PDF, where HTML is read",
        "longer than data.max_record_bytes = 100000",
    ]
    as_text, *_ = read(tmp_path / "in/rivers")
    assert as_text == [page()]
    with pytest.raises(CorpusError, match="no text column 'url'; columns: text, folder, name"):
        read(tmp_path / "in", format="html", text="url")


def test_what_is_kept_of_a_page() -> None:
    found = {
        extract: page_text(page().encode(), "", is_html=True, extract=extract)
        for extract in ("main", "all", "trafilatura")
    }
    assert all(TEXT.strip() in text for text in found.values())
    assert "Menu" in found["all"]
    assert "Menu" not in found["main"] + found["trafilatura"]


def test_a_page_is_decoded_by_what_says_most_of_it() -> None:
    text = "Ünïcödé, 河流"
    assert decode_page(b"\xef\xbb\xbf" + text.encode(), "gbk") == text
    assert decode_page(text.encode("utf-16"), "utf-8") == text
    assert decode_page(text.encode(), '"UTF-8"') == text
    assert decode_page("naïve €".encode("cp1252"), "ISO-8859-1") == "naïve €"  # as browsers do
    declared = '<meta http-equiv="Content-Type" content="text/html; charset=gb2312"><p>河流'
    assert decode_page(declared.encode("gbk"), "no-such-charset") == declared
    assert decode_page('<meta charset="utf-16"><p>河流'.encode()).endswith("河流")
    assert decode_page("Привет, как дела сегодня?".encode("cp1251")) == "Привет, как дела сегодня?"
    assert decode_page(b"caf\xe9 ok", "utf-8") == "caf\ufffd ok"
    assert decode_page(b"caf\xe9 ok") == "café ok"
    assert decode_page((text * 9).encode() + b"\xff") == text * 9 + "\ufffd"
    assert decode_page(b"") == ""


BOMBS = {
    "elements": "<div>" * 200_000 + "deep",
    "formatting": "".join(f"<b id={i}><p>" for i in range(20_000)),
    "attributes": "<p " + " ".join(f"a{i}=1" for i in range(100_000)) + ">text",
    "capitals": "<DIV>" * 200_000 + "deep",
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("extract", ["main", "trafilatura"])
def test_a_bomb_is_left_out(bomb: str, extract: str) -> None:
    with pytest.raises(DroppedPage, match="too_complex"):
        extract_text(BOMBS[bomb], extract)


def test_bytes_that_are_no_text_are_no_page() -> None:
    for content in (
        bytes(range(256)) * 20,
        b"\x00\x01\x02" * 500,
        random.Random(0).randbytes(5000),
    ):
        with pytest.raises(DroppedPage, match="binary"):
            page_text(content, "", is_html=True, extract="main")
    page = f"<html><body><p>{TEXT * 5} caf\ufffd</p></body></html>"
    assert TEXT.strip() in page_text(page.encode(), "", is_html=True, extract="main")


def test_a_deep_page_is_read() -> None:
    nested = "<div>" * 300 + f"<p>{TEXT * 5}</p>" + "</div>" * 300
    soup = "<font color=red>word</font> <b>bold</b> " * 3000
    assert TEXT.strip() in extract_text(nested, "main")
    assert extract_text(soup, "all").count("bold") == 3000
    unclosed = "<p><font color=red>word" * 500
    assert extract_text(unclosed, "all").count("word") == 500


# --- settings ------------------------------------------------------------------------------------


def test_a_missing_package_is_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.warc"
    path.write_bytes(record(http(page().encode())))
    absent = ["fastwarc", "resiliparse", "trafilatura"]
    monkeypatch.setattr(
        "dray.processes.imports.find_spec", lambda name: None if name in absent else name
    )
    for package in list(absent):
        with pytest.raises(SpecError, match=rf"{package} is not installed.*dray\[web\]"):
            find_inputs(spec_of(path, extract="trafilatura"))
        with pytest.raises(SpecError, match=rf"{package} is not installed"):
            read(path, extract="trafilatura")
        absent.remove(package)
    absent.append("trafilatura")
    assert find_inputs(spec_of(path))
    assert not (tmp_path / "corpora").exists()


def test_settings_that_are_not_asked_for_change_nothing(tmp_path: Path) -> None:
    assert "extract" not in Source(path="a").model_dump(mode="json")
    with pytest.raises(ValueError, match="extract all: text is extracted from warc and html"):
        Source(path="a", format="jsonl", extract="all")
    path = tmp_path / "a.warc"
    path.write_bytes(record(http(page().encode())))
    assert len({corpus_key(spec_of(path, extract=how)) for how in ("main", "all")}) == 2
    (tmp_path / "a.txt").write_text(TEXT)
    keys = {corpus_key(spec_of(tmp_path / "a.txt", extract=how)) for how in ("main", "all")}
    assert len(keys) == 1


def test_pages_come_with_targets_of_no_document(tmp_path: Path) -> None:
    path = tmp_path / "a.warc"
    path.write_bytes(record(b"GET / HTTP/1.1\r\n\r\n", "request"))
    given = Source(path=str(path), label="url")
    (file,) = find_files(given, "data.train.0")
    (documents,) = SpanReader(Span(file), given, 1 << 20).read()
    assert documents.labels == pa.array([], pa.string())
    assert documents.num_records == 1
