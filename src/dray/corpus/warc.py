"""The pages of a WARC file: every record of it in turn, as a page, or with the reason why it is
none.

A page is an HTTP response with status 200 that holds HTML or plain text. Memory stays bounded by
the largest record that is allowed: a larger one is passed over. What lies behind a damaged record
is lost, and told so.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from dray.corpus.bytes_in import READ_BYTES, DamagedFile, too_long
from dray.corpus.pages import HTML_TYPES, DroppedPage, begins_with_tag, guess_type, page_text
from dray.corpus.records import BadRecord

COLUMNS = ("text", "url", "date")
"""What a page of a WARC file has."""
_NAMES = {"warcinfo": "warc_info"}
"""Reasons that are no `warc_` and the record's type."""


@dataclass(frozen=True)
class WarcRecord:
    """One record, or what is lost of a file: `values`, `dropped` or `bad` says what it is."""

    offset: int
    """Where it begins in the decompressed file."""
    num_bytes: int
    """Of its content, or of what is lost."""
    values: dict[str, Any] | None = None
    """A page's, by column."""
    dropped: str = ""
    """Why it is no document."""
    bad: str = ""
    """Why it cannot be read."""
    ends_file: bool = False
    """Whether the file is damaged from there on."""


class _Stream:
    """Chunks as the stream that fastwarc reads. It has no `seek`: what is passed over is read."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._left = chunks, memoryview(b"")
        self._position = 0
        self.failure: OSError | None = None
        """Of the storage, which is no damage of the file."""

    def read(self, size: int = READ_BYTES) -> bytes:
        if not self._left:
            try:
                self._left = memoryview(next((chunk for chunk in self._chunks if chunk), b""))
            except OSError as error:
                self.failure = error
                raise
        data = bytes(self._left[:size])
        self._left = self._left[len(data) :]
        self._position += len(data)
        return data

    def tell(self) -> int:
        return self._position

    def drain(self) -> int:
        """Reads to the end, or to where the bytes are damaged; the position there."""
        try:
            while self.read():
                pass
        except DamagedFile:
            pass
        return self._position


def read_warc(chunks: Iterator[bytes], extract: str, limit: int) -> Iterator[WarcRecord]:
    """Every record of a WARC file that is given as its decompressed content. `limit`: bytes of the
    largest that is read; `extract`: what is kept of a page."""
    import fastwarc.warc

    stream = _Stream(chunks)
    at = 0
    # Any: fastwarc's types want a stream that it could seek in, which it does without.
    open_archive = cast(Any, fastwarc.warc.ArchiveIterator)
    try:
        for record in open_archive(stream, parse_http=False, stream_detect=False):
            at = record.stream_pos
            found = _read_record(record, extract, limit)
            at += found.num_bytes
            yield found
    except (DamagedFile, OSError) as error:
        if stream.failure is not None:
            raise stream.failure from error
        reason = str(error) if isinstance(error, DamagedFile) else f"damaged WARC ({error})"
        yield WarcRecord(at, max(0, stream.drain() - at), bad=reason, ends_file=True)


def _read_record(record: Any, extract: str, limit: int) -> WarcRecord:
    """One record, read to its end. Raises DamagedFile where the file ends before it does."""
    offset, kind = record.stream_pos, str(record.record_type)
    length = record.headers.get("Content-Length") or ""
    if not (length.isascii() and length.isdigit() and len(length) < 19):
        raise DamagedFile("a WARC record without its length")
    size = int(length)
    is_page = kind == "response" and record.is_http and size <= limit
    block = record.reader.read() if is_page else b""
    if (len(block) if is_page else record.consume(size)) < size:
        raise DamagedFile("truncated WARC record")
    try:
        if kind != "response":
            raise DroppedPage(_NAMES.get(kind, f"warc_{kind}"))
        if not record.is_http:
            raise DroppedPage("not_http")
        if size > limit:
            raise BadRecord(too_long(limit))
        text = _read_page(block, extract, limit)
    except DroppedPage as error:
        return WarcRecord(offset, size, dropped=str(error))
    except BadRecord as error:
        return WarcRecord(offset, size, bad=str(error))
    url = (record.headers.get("WARC-Target-URI") or "").strip("<> ")
    date = record.headers.get("WARC-Date") or ""
    return WarcRecord(offset, size, {"text": text, "url": url, "date": date})


def _read_page(block: bytes, extract: str, limit: int) -> str:
    """The text of an HTTP response. Raises DroppedPage and BadRecord."""
    try:
        message = _http_message(block, "none")
    except OSError as error:
        raise BadRecord(f"no HTTP response ({error})") from error
    headers = message.http_headers
    if headers is None or headers.status_code is None:
        raise BadRecord("no HTTP response")
    if headers.status_code != 200:
        raise DroppedPage("http_status")
    told = (headers.get("Content-Type") or "").partition(";")[0].strip().lower()
    if told and told not in (*HTML_TYPES, "text/plain"):
        raise DroppedPage("not_html")
    content = _decoded(block, message, limit)
    kind = told or guess_type(content)
    if kind not in (*HTML_TYPES, "text/plain"):
        raise DroppedPage("not_html")
    charset = message.http_charset or ""
    return page_text(content, charset, is_html=kind in HTML_TYPES, extract=extract)


def _http_message(block: bytes, decode: str) -> Any:
    from fastwarc.warc import WarcRecord as Message
    from fastwarc.warc import WarcRecordType

    message: Any = Message()
    message.record_type, message.is_http = WarcRecordType.response, True
    message.set_bytes_content(block)
    message.parse_http(auto_decode=decode, quirks_mode=True)
    return message


def _decoded(block: bytes, message: Any, limit: int) -> bytes:
    """The body of a response without its transfer and content encodings. Raises BadRecord."""
    encoding = (message.http_headers.get("Content-Encoding") or "").strip().lower()
    try:
        if encoding in ("gzip", "x-gzip", "deflate"):
            content = _inflated(_http_message(block, "transfer").reader.read(), limit)
        else:
            content = cast(bytes, _http_message(block, "all").reader.read(limit + 1))
    except (OSError, zlib.error) as error:
        # Crawlers that decode what they keep often leave the headers that say otherwise.
        content = message.reader.read()
        if not begins_with_tag(content):
            raise BadRecord(f"a body that cannot be decoded ({error})") from error
    if len(content) > limit:
        raise BadRecord(too_long(limit))
    return content


def _inflated(data: bytes, limit: int) -> bytes:
    """What gzip or deflate holds, up to a byte over the limit; what lies behind it counts for
    nothing, as in browsers. Raises zlib.error where its end is missing, of which fastwarc says
    nothing."""
    content = b""
    is_first = True
    while is_first or data[:2] == b"\x1f\x8b":
        is_first = False
        # 47: zlib or gzip by their first bytes; -15: neither, as some servers understand deflate.
        is_wrapped = data[:1] in (b"\x1f", b"\x78")
        member = zlib.decompressobj(47 if is_wrapped else -15)
        content += member.decompress(data, limit + 1 - len(content))
        if len(content) > limit:
            break
        if not member.eof:
            raise zlib.error("truncated")
        data = member.unused_data
    return content
