"""Phone numbers in a text, by Google's rules of every country (phonenumbers).

Its matcher tries a millisecond on whatever has some digits, so it is shown nothing but runs of as
many digits as a number has, with a little of what stands around them. Digits without a sign among
them are an order's number as often as a phone's: there it takes a word before them, or the form of
a Chinese mobile number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from dray.corpus.identifiers import Find
from dray.errors import SpecError

_RUN = re.compile(r"(?:\+ ?|\()?\(?[0-9](?:[ ().\-/\t]{0,4}[0-9]){6,}")
"""At least seven digits, no more than four signs between two of them."""
_MOST_DIGITS = 200
"""Of a run: a table of numbers is no list of phones."""
_EXTENSION = re.compile(
    r"[ ,;]{0,3}(?:ext(?:ension)?|x|转|分机|durchwahl)[ .:#]{0,3}[0-9]{1,7}(?![0-9])", re.I
)
_AROUND = 12
_WORDS = re.compile(
    r"(?:\b(?:tel|tél|phone|telephone|fon|call|fax|mob|mobile?|mobil|cell|cellphone|handy|rufnummer|whatsapp|sms"
    r"|text|contact|hotline|helpline|toll[- ]free|portable|téléphone|telefono|telefoon|telefon)\b"
    r"|电话|手机|電話|手機|联系|热线|传真|微信|致电|拨打)[^0-9\n]{0,24}$",
    re.I,
)
_CHINESE_MOBILE = re.compile(r"1[3-9][0-9]{9}")
_NUMBER = re.compile(
    r"(?<![0-9])(?:(?:19|20)[0-9]{2}[-./](?:0?[1-9]|1[0-2])[-./](?:0?[1-9]|[12][0-9]|3[01])"
    r"|(?:0?[1-9]|[12][0-9]|3[01])[-./](?:0?[1-9]|1[0-2])[-./](?:19|20)[0-9]{2}"
    r"|(?:0?[1-9]|1[0-2])/(?:0?[1-9]|[12][0-9]|3[01])/(?:19|20)[0-9]{2}"
    r"|(?:19|20)[0-9]{2} ?[-/] ?(?:19|20)[0-9]{2})(?![0-9])"
    # Degrees of latitude and longitude; four small numbers, as of IP addresses and versions.
    r"|(?<![0-9.])(?:0|[1-9][0-9]?|1[0-7][0-9]|180)\.[0-9]{4,}(?![0-9]|\.[0-9])"
    r"|(?<![0-9A-Za-z.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9A-Za-z]|\.[0-9])"
)
"""What is no phone number though it has as many digits: dates, years, and the like."""
_GOODS = re.compile(r"(?:isbn|issn|ean|gtin|upc|asin|doi|sku)[-: 013]{0,8}$", re.I)
_INSIDE_BEFORE, _INSIDE_AFTER = frozenset("/=_#&?-."), frozenset("/_-=&%")
"""Marks beside digits that are a part of an address or a name."""


def check_regions(regions: Sequence[str], where: str) -> None:
    """Raise SpecError for a region that has no phone numbers."""
    from phonenumbers import SUPPORTED_REGIONS

    if unknown := sorted({*regions} - SUPPORTED_REGIONS):
        raise SpecError(
            f"{where}.regions = {unknown[0]}",
            "has no phone numbers",
            "a region is a country's code of ISO 3166, such as US",
        )


def find_phones(text: str, regions: Sequence[str]) -> Iterator[Find]:
    """Numbers that are valid somewhere: with a country code, or of one of the regions, of which
    the first wins. The value is E.164's. `text`: folded (`identifiers.fold`)."""
    if not _RUN.search(text):
        return
    text = _NUMBER.sub(_blanked, text)
    for run in _RUN.finditer(text):
        begin, end = run.span()
        num_digits = sum(map(str.isdigit, run[0]))
        if num_digits > _MOST_DIGITS or _GOODS.search(text, max(0, begin - 16), begin):
            continue
        if more := _EXTENSION.match(text, end):
            end = more.end()
        yield from _match(text, begin, end, regions)


def _blanked(found: re.Match[str]) -> str:
    return "|" * len(found[0])


def _match(text: str, begin: int, end: int, regions: Sequence[str]) -> list[Find]:
    """The numbers of a run."""
    import phonenumbers

    first = _edge(text, begin, -1)
    window = text[first : _edge(text, end, 1)]
    is_named = bool(_WORDS.search(text, max(0, begin - 40), begin))
    has_code = "+" in window
    found: list[Find] = []
    for place, region in enumerate(regions):
        for match in phonenumbers.PhoneNumberMatcher(window, region):  # what is valid there
            start, stop = first + match.start, first + match.end
            if any(one.start < stop and start < one.end for one in found):
                continue
            if is_named or _is_likely(text, start, match.raw_string, region):
                value = phonenumbers.format_number(
                    match.number, phonenumbers.PhoneNumberFormat.E164
                )
                found.append(Find(start, stop, "phone", value))
        if has_code and found and place == 0:
            break
    return found


def _is_likely(text: str, start: int, raw: str, region: str) -> bool:
    """Whether a valid number is a phone's rather than another one's, by how it is written."""
    import phonenumbers

    if raw.startswith("+"):
        return True
    if raw.isdigit():
        before, after = text[max(0, start - 1) : start], text[start + len(raw) :][:1]
        is_inside = before in _INSIDE_BEFORE or after in _INSIDE_AFTER
        return bool(_CHINESE_MOBILE.fullmatch(raw)) and not is_inside
    # In groups: those that the country writes.
    return any(
        phonenumbers.PhoneNumberMatcher(raw, region, leniency=phonenumbers.Leniency.STRICT_GROUPING)
    )


def _edge(text: str, place: int, step: int) -> int:
    """Some marks on from a place, up to the next digit."""
    for _ in range(_AROUND):
        beside = place - 1 if step < 0 else place
        if not 0 <= beside < len(text) or text[beside].isdigit():
            break
        place += step
    return place
