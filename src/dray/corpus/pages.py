"""From the bytes of a web page to its text: decoding, and extraction by resiliparse or trafilatura.

A page without text, or one that a parser would not come to an end with, is told by its reason.
Fetches nothing, and follows no link.
"""

from __future__ import annotations

import codecs
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

from dray.processes.imports import require_package
from dray.spec import Source

PAGE_FORMS = ("html", "warc")
HTML_TYPES = ("text/html", "application/xhtml+xml")
MAX_NO_TEXT = 0.1
"""Share of the characters of a page that are control characters, or that its encoding lacks."""
LOOKED_AT = 1 << 16
_NO_TEXT = re.compile("[\x00-\x08\x0e-\x1f\x7f\ufffd]")
MAX_DEPTH = 512
"""Elements within one another, as browsers have it. The time that extraction takes grows with the
square of it."""
MAX_OPEN = 64
"""Formatting tags that are open at once. A parser repeats all of them in every paragraph, but
those that are written alike three times at most."""
MAX_ATTRIBUTES = 5000
"""Of one element. A parser looks at all of them for each."""
_FORMATTING = re.compile(
    r"<(/?)(big|b|code|em|font|i|small|strike|strong|s|tt|u)(?=[\s/>])([^<>]*)", re.IGNORECASE
)
_LONG_TAG = re.compile(r"<[a-z][^<>]{32768,}", re.IGNORECASE)
_TOO_DEEP = " > ".join("*" * (MAX_DEPTH + 1))
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class DroppedPage(Exception):
    """A page is no document; the message is the reason that it is counted by."""


def require_page_packages(source: Source, forms: set[str], where: str) -> None:
    """Raise SpecError where files of these forms need a package that is not installed."""
    if "warc" in forms:
        require_package("fastwarc", "web", f"{where}, of WARC files,")
    if forms.intersection(PAGE_FORMS):
        for package in _packages(source):
            require_package(package, "web", f"{where}.extract = {source.extract}")


def extraction(source: Source) -> dict[str, str]:
    """What decides over the text of a source's pages: a part of a corpus' key."""
    return {"extract": source.extract, **{name: _version(name) for name in _packages(source)}}


def _packages(source: Source) -> tuple[str, ...]:
    return ("resiliparse", *(("trafilatura",) if source.extract == "trafilatura" else ()))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # reading will say so
        return ""


def page_text(content: bytes, charset: str, *, is_html: bool, extract: str) -> str:
    """The text of a page. Raises DroppedPage."""
    text = decode_page(content, charset, is_html=is_html)
    if len(_NO_TEXT.findall(text[:LOOKED_AT])) > MAX_NO_TEXT * min(len(text), LOOKED_AT):
        raise DroppedPage("binary")
    text = (extract_text(text, extract) if is_html else text).strip()
    if not text:
        raise DroppedPage("no_text")
    return text


def begins_with_tag(content: bytes) -> bool:
    return content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")


def guess_type(content: bytes) -> str:
    """The media type of a body that came without one."""
    from resiliparse.parse.encoding import detect_mime

    return "text/html" if begins_with_tag(content) else detect_mime(content)


def decode_page(content: bytes, charset: str = "", *, is_html: bool = True) -> str:
    """A page as text: by its byte order mark, else the `charset` that came with it, else the one
    that it declares, else by detection. What the encoding lacks becomes U+FFFD, as in browsers."""
    from resiliparse.parse import encoding

    for mark, name in _MARKS:
        if content.startswith(mark):
            return content[len(mark) :].decode(name, "replace")
    chosen = encoding.map_encoding_to_html5(charset.strip("\"' "), False)
    if chosen is None and is_html:
        chosen = _declared(content, encoding)
    if chosen is None:
        try:
            return content.decode()
        except UnicodeDecodeError:
            chosen = _detected(content, encoding)
    return content.decode(chosen, "replace")


def _detected(content: bytes, encoding: Any) -> str:
    """The encoding of bytes that are not UTF-8 throughout, by what they are."""
    chosen: str = encoding.detect_encoding(content) or "utf-8"
    if chosen == "utf-8":
        text = content.decode("utf-8", "replace")
        num_wrong = text.count("\ufffd")
        # More wrong than right beyond ASCII: few letters of a language that has few of them.
        if num_wrong > sum(map(str.__len__, _BEYOND_ASCII.findall(text))) - num_wrong:
            return "cp1252"
    return chosen


_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")


_DECLARED = re.compile(
    rb"""<meta\s[^>]*?charset\s*=\s*["']?\s*([\w.:-]+)|<\?xml\s[^>]*?encoding\s*=\s*["']([\w.:-]+)""",
    re.IGNORECASE,
)


def _declared(content: bytes, encoding: Any) -> str | None:
    """The encoding that a page declares in its first bytes; none where it is unknown."""
    found = _DECLARED.search(content[:8192])
    if found is None:
        return None
    name = (found[1] or found[2]).decode("ascii", "replace")
    chosen = cast("str | None", encoding.map_encoding_to_html5(name, False))
    # A page whose declaration can be read as ASCII is not in UTF-16, whatever it says.
    return "utf-8" if chosen and chosen.startswith("utf-16") else chosen


def extract_text(html: str, extract: str) -> str:
    """The text of HTML: `main`, `all` or by `trafilatura`. Raises DroppedPage for what would take a
    parser minutes, or all memory."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    if leaves_open(html) or most_attributes(html) > MAX_ATTRIBUTES:
        raise DroppedPage("too_complex")
    tree = HTMLTree.parse(html)
    document = tree.document
    if document is None:
        return ""
    if document.query_selector(_TOO_DEEP) is not None:
        raise DroppedPage("too_complex")
    if extract == "trafilatura":
        return _by_trafilatura(html)
    return extract_plain_text(tree, main_content=extract == "main", alt_texts=False)


def _by_trafilatura(html: str) -> str:
    import trafilatura

    # Its own search for duplicates would remember text over pages: what a page gives would hang on
    # those before it.
    found = trafilatura.extract(html, deduplicate=False, with_metadata=False)
    return found or ""


def leaves_open(html: str) -> bool:
    """Whether more than MAX_OPEN formatting tags are open at once."""
    opened: dict[str, list[str]] = {}
    num_open = 0
    for found in _FORMATTING.finditer(html):
        closing, name, attributes = found.groups()
        mine = opened.setdefault(name.lower(), [])
        if closing and mine:
            mine.pop()
            num_open -= 1
        elif not closing and mine.count(attributes) < 3:
            mine.append(attributes)
            num_open += 1
            if num_open > MAX_OPEN:
                return True
    return False


def most_attributes(html: str) -> int:
    """About how many attributes a tag has, of the long ones; 0 without such."""
    return max((len(tag.split()) for tag in _LONG_TAG.findall(html)), default=0)
