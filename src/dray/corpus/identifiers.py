"""Identifiers in a text that are told by their form: addresses, numbers with a check digit, keys.

Whatever has a checksum must fulfil it, and a date in it must be one. Each finder looks first for
what its kind cannot do without, so that a text without that costs next to nothing. Texts come
folded (`fold`): digits of all scripts and full-width letters are ASCII there, each in its place.
"""

from __future__ import annotations

import ipaddress
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from functools import cache

from dray.redaction import PRIVATE_KEY, TOKEN_FORMATS


@dataclass(frozen=True)
class Find:
    """Something that was found, at text[start:end]."""

    start: int
    end: int
    kind: str
    value: str
    """The same for all ways of writing it."""


@cache
def _foldings() -> Mapping[int, str]:
    """What stands for another mark, one for one: full-width forms, decimal digits of any script,
    dashes, spaces."""
    found = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
    for code in range(0x80, sys.maxunicode + 1):
        digit = unicodedata.decimal(chr(code), None)
        if digit is not None:
            found[code] = str(digit)
    found |= dict.fromkeys(range(0x2010, 0x2016), "-") | {0x2212: "-"}
    return found | dict.fromkeys((0xA0, 0x3000, 0x202F, *range(0x2000, 0x200B)), " ")


def fold(text: str) -> str:
    """A text of the same length in which what looks like ASCII's digits, letters, dashes and spaces
    is."""
    return text if text.isascii() else text.translate(_foldings())


# ---- e-mail addresses ---------------------------------------------------------------------------

_LETTERS = "A-Za-z0-9\u00c0-\u024f\u0370-\u03ff\u0400-\u04ff"
"""Of scripts that put spaces between words: a Chinese word before an address is none of it."""
_LOCAL = rf"[{_LETTERS}_](?:[{_LETTERS}._%+'-]{{0,62}}[{_LETTERS}_+-])?"
_LABEL = rf"[{_LETTERS}](?:[{_LETTERS}-]{{0,61}}[{_LETTERS}])?"
_TOP = rf"(?:xn--[a-z0-9-]{{2,59}}|(?:(?![0-9])[{_LETTERS}]){{2,24}})(?![{_LETTERS}_])"
_EMAIL = re.compile(rf"(?<![{_LETTERS}._%+'-])['.]*(?P<at>{_LOCAL}@(?:{_LABEL}\.){{1,8}}{_TOP})")
_SPELT = re.compile(
    rf"(?<![{_LETTERS}._%+-])(?P<at>{_LOCAL} ?[\[({{<] ?(?:at|@|ät) ?[\])}}>] ?"
    rf"(?:{_LABEL} ?(?:\.|[\[({{<] ?(?:dot|punkt|\.) ?[\])}}>]| dot ) ?){{1,8}}{_TOP})",
    re.I,
)
_FILES = frozenset(("png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "html", "php"))
"""An icon@2x.png is a file."""


def find_emails(text: str) -> Iterator[Find]:
    """Addresses, also those that are spelt `anna [at] example [dot] org`."""
    if "@" in text:
        for match in _EMAIL.finditer(text):
            address = match["at"].lower()
            if address.rpartition(".")[2] not in _FILES:
                yield Find(*match.span("at"), "email", address)
    if _BRACKETED_AT.search(text):
        for match in _SPELT.finditer(text):
            address = re.sub(
                r" ?[\[({<] ?(?:at|@|ät) ?[\])}>] ?", "@", match["at"].lower(), count=1
            )
            address = re.sub(r" ?(?:[\[({<] ?(?:dot|punkt|\.) ?[\])}>]| dot ) ?", ".", address)
            yield Find(*match.span("at"), "email", address.replace(" ", ""))


_BRACKETED_AT = re.compile(r"[\[({<] ?(?:[aä]t|@) ?[\])}>]", re.I)

# ---- payment cards ------------------------------------------------------------------------------

_CARD = re.compile(
    r"(?<![0-9A-Za-z/=_.])(?:[0-9]{13,19}"
    r"|[0-9]{4}(?P<a>[ -])[0-9]{4}(?P=a)[0-9]{4}(?P=a)[0-9]{4}(?:(?P=a)[0-9]{1,3})?"
    r"|[0-9]{4}(?P<b>[ -])[0-9]{6}(?P=b)[0-9]{4,5}"
    r"|[0-9]{4}(?P<c>[ -])[0-9]{3}(?P=c)[0-9]{3}(?P=c)[0-9]{3}"
    r"|[0-9]{6}(?P<d>[ -])[0-9]{10,13})(?![0-9A-Za-z])"
)
_CARD_WITHOUT_LAST = re.compile(r"(?:[0-9]{4}[ -]){3}[0-9]{4}")
_SCHEMES: tuple[tuple[str, tuple[int, ...]], ...] = (
    (r"4", (16, 19)),
    (r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720", (16,)),
    (r"3[47]", (15,)),
    (r"6011|64[4-9]|65", (16, 17, 18, 19)),
    (r"352[89]|35[3-8]", (16, 17, 18, 19)),
    (r"30[0-5]|36|3[89]", (14, 16)),
    (r"62", (16, 17, 18, 19)),
    (r"220[0-4]", (16, 17, 18, 19)),
    (r"5018|5020|5038|5893|6304|6759|676[1-3]", (13, 14, 15, 16, 17, 18, 19)),
)
"""Prefixes and lengths of Visa, Mastercard, American Express, Discover, JCB, Diners Club, UnionPay,
Mir and Maestro (ISO/IEC 7812; Visa's 13 digits are out of use, and those of goods in Germany)."""
_SCHEMES_COMPILED = tuple((re.compile(prefix), lengths) for prefix, lengths in _SCHEMES)


def fulfils_luhn(digits: str) -> bool:
    """Whether the last digit checks the others (ISO/IEC 7812-1, annex B)."""
    doubled = "0246813579"
    turned = digits[::-1]
    total = sum(map(int, turned[::2])) + sum(int(doubled[int(digit)]) for digit in turned[1::2])
    return total % 10 == 0


def is_card(digits: str) -> bool:
    """Whether digits are the number of a card of a known scheme."""
    return any(
        len(digits) in lengths and prefix.match(digits) for prefix, lengths in _SCHEMES_COMPILED
    ) and fulfils_luhn(digits)


def find_cards(text: str) -> Iterator[Find]:
    """Card numbers: unbroken, or in the groups that are printed on cards."""
    for match in _CARD.finditer(text):
        digits = re.sub("[ -]", "", match[0])
        if is_card(digits):
            yield Find(*match.span(), "card", digits)
        elif (first := _CARD_WITHOUT_LAST.match(match[0])) and len(digits) > 16:
            # What stands behind may be a date.
            digits = digits[:16]
            if is_card(digits):
                yield Find(match.start(), match.start() + first.end(), "card", digits)


# ---- bank accounts ------------------------------------------------------------------------------

_IBAN = re.compile(r"(?<![0-9A-Za-z])[A-Za-z]{2}[0-9]{2}(?:[ -]?[0-9A-Za-z]){11,30}")
_IBAN_LENGTHS = {
    name: int(length)
    for length, names in {
        "15": "NO", "16": "BE", "18": "DK FO FI GL NL SD FK", "19": "MK SI",
        "20": "AT BA EE KZ LT LU XK MN",
        "21": "CH HR LI LV", "22": "BG BH CR DE GB GE IE ME RS VA", "23": "AE GI IL IQ OM TL SO",
        "24": "AD CZ ES MD PK RO SA SE SK TN VG", "25": "PT ST LY", "26": "IS TR",
        "27": "BI DJ FR GR IT MC MR SM", "28": "AL AZ BY CY DO GT HU LB PL SV NI",
        "29": "BR EG PS QA UA",
        "30": "JO KW MU YE", "31": "MT SC", "32": "LC", "33": "RU",
    }.items()
    for name in names.split()
}  # fmt: skip
"""Characters by country (SWIFT's registry of IBANs)."""


def fulfils_mod97(iban: str) -> bool:
    """Whether its check digits are right (ISO 7064, MOD 97-10)."""
    return int("".join(str(int(mark, 36)) for mark in iban[4:] + iban[:4])) % 97 == 1


def find_ibans(text: str) -> Iterator[Find]:
    """IBANs of a known country, of its length, with right check digits; in groups or not."""
    for match in _IBAN.finditer(text):
        wanted = _IBAN_LENGTHS.get(match[0][:2].upper(), 0)
        places = [place for place in range(*match.span()) if text[place].isalnum()]
        if not wanted or len(places) < wanted:
            continue
        end = places[wanted - 1] + 1
        if text[end : end + 1].isalnum() and text[end].isascii():
            continue
        iban = "".join(text[place] for place in places[:wanted]).upper()
        if fulfils_mod97(iban):
            yield Find(match.start(), end, "iban", iban)


# ---- persons' numbers ---------------------------------------------------------------------------

_CN_ID = re.compile(
    r"(?<![0-9A-Za-z])"
    r"(?P<area>(?:1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[1-3])[0-9]{4})(?P<by>[ -]?)"
    r"(?P<born>(?:18|19|20)[0-9]{2}[01][0-9][0-3][0-9])(?P=by)(?P<rest>[0-9]{3}[0-9Xx])"
    r"(?![0-9A-Za-z])"
)
_SSN = re.compile(
    r"(?<![0-9A-Za-z])(?<![0-9A-Za-z][-.])"
    r"(?!000|666|9)[0-9]{3}(?P<by>[ -])(?!00)[0-9]{2}(?P=by)(?!0000)[0-9]{4}"
    r"(?![0-9A-Za-z]|[-.][0-9A-Za-z])"
)
_SSN_WORDS = re.compile(r"ssn|social|soc\.? sec|sozialvers|社会安全", re.I)


def fulfils_gb11643(number: str) -> bool:
    """Whether the 18th character of a resident id checks the others (GB 11643-1999, ISO 7064
    MOD 11-2)."""
    total = sum(int(digit) * (2 ** (17 - place) % 11) for place, digit in enumerate(number[:17]))
    return "10X98765432"[total % 11] == number[17].upper()


def find_cn_ids(text: str) -> Iterator[Find]:
    """Chinese resident ids of 18 characters, with a date of birth that is one."""
    for match in _CN_ID.finditer(text):
        born, number = match["born"], match["area"] + match["born"] + match["rest"].upper()
        try:
            date(int(born[:4]), int(born[4:6]), int(born[6:]))
        except ValueError:
            continue
        if fulfils_gb11643(number):
            yield Find(*match.span(), "cn_id", number)


def find_ssns(text: str) -> Iterator[Find]:
    """US social security numbers with hyphens; with spaces only where a word before says so. They
    have no check digit: areas 000, 666 and 9xx, group 00 and serial 0000 are never given out."""
    for match in _SSN.finditer(text):
        before = text[max(0, match.start() - 30) : match.start()]
        if match["by"] == "-" or _SSN_WORDS.search(before):
            yield Find(*match.span(), "us_ssn", match[0].replace(" ", "-"))


# ---- IP addresses -------------------------------------------------------------------------------

_IPV4 = re.compile(
    r"(?<![0-9A-Za-z])(?<![0-9A-Za-z][.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9A-Za-z]|\.[0-9])"
)
_IPV6 = re.compile(
    r"(?<![0-9A-Za-z.])(?<![0-9A-Za-z:]:)[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}"
    r"(?![0-9A-Za-z:])"
)
_VERSION_WORDS = re.compile(
    r"(?:\bv|version|\bver|release|build|revision|\brev|chapter|section|kapitel|版本|[A-Za-z]/)"
    r"[ .:]{0,2}$",
    re.I,
)
_IP_WORDS = re.compile(r"\b(?:ip|ipv4|addr|address|host|server|dns|ping|adresse)\b|地址", re.I)


def find_ips(text: str) -> Iterator[Find]:
    """IP addresses that are reached from everywhere. Private, loopback, link-local, documentation
    and other special ones (RFC 6890) are nobody's. What stands behind `version`, or has single
    digits alone where no word says that it is an address, is a version or a section."""
    for match in _IPV4.finditer(text):
        before = text[max(0, match.start() - 20) : match.start()]
        if _VERSION_WORDS.search(before):
            continue
        if len(match[0]) == 7 and not _IP_WORDS.search(before):
            continue
        if found := _public(match[0]):
            yield Find(*match.span(), "ip", found)
    for match in _IPV6.finditer(text):
        if found := _public(match[0]):
            yield Find(*match.span(), "ip", found)


def _public(address: str) -> str:
    """The address in its one form; empty where it is none, or nobody's."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return ""
    is_special = found.is_multicast or not found.is_global
    return "" if is_special else found.compressed


# ---- keys and tokens ----------------------------------------------------------------------------

_KEY_STARTS = (
    "hf_", "AKIA", "ASIA", "gh", "glpat-", "sk-", "xox", "AIza", "ya29.", "eyJ", "npm_", "pypi-",
)  # fmt: skip
_NAMED = re.compile(
    r"(?<![A-Za-z0-9])(?P<name>pass(?:word|wd|phrase|wort)?|pwd|secret|token|apikey|密码|口令"
    r"|(?:api|access|secret|auth|private|account|encryption|signing)[-_ ]?(?:access[-_ ]?)?"
    r"(?:key|token))[\"']?\s{0,3}(?:=>|=|:|是|is\b)\s{0,3}[\"']?"
    r"(?P<value>[^\s\"',;&<>(){}\[\]，。；]{8,200})",
    re.I,
)
_NAMED_STARTS = ("pass", "pwd", "secret", "token", "key", "密码", "口令")
_IN_URI = re.compile(r"://[^\s/@:\"'<>]{1,64}:(?P<value>[^\s/@\"'<>]{3,200})@")


def is_random_looking(value: str, name: str = "") -> bool:
    """Whether a value that is called a password or a key may be one: letters and digits mixed, and
    not the same few. What is called a key or token is longer than what is called a password."""
    least = 8 if re.search(r"pass|pwd|secret$|密码|口令", name, re.I) else 16
    return (
        len(value) >= least
        and len(set(value)) >= min(len(value), 16) // 2
        and any(mark.isdigit() for mark in value)
        and any(mark.isalpha() for mark in value)
        and "://" not in value
        and not value.startswith(("$", "%", "/", "./"))
        and value.isascii()
    )


def find_keys(text: str) -> Iterator[Find]:
    """Private keys, tokens of well-known services by their formats, passwords in URIs, and what
    is assigned to a password's or a key's name and looks random."""
    if "-----BEGIN" in text:
        for match in PRIVATE_KEY.finditer(text):
            yield Find(*match.span(), "key", match[0])
    if any(start in text for start in _KEY_STARTS):
        for match in TOKEN_FORMATS.finditer(text):
            yield Find(*match.span(), "key", match[0])
    if "://" in text and "@" in text:
        for match in _IN_URI.finditer(text):
            yield Find(*match.span("value"), "key", match["value"])
    lower = text.lower()
    if any(start in lower for start in _NAMED_STARTS):
        for match in _NAMED.finditer(text):
            value = match["value"].rstrip(".:!?")
            if is_random_looking(value, match["name"]):
                start = match.start("value")
                yield Find(start, start + len(value), "key", value)


FINDERS: Mapping[str, Callable[[str], Iterator[Find]]] = {
    "key": find_keys,
    "iban": find_ibans,
    "cn_id": find_cn_ids,
    "card": find_cards,
    "email": find_emails,
    "us_ssn": find_ssns,
    "ip": find_ips,
}
"""By kind, the most specific first."""
