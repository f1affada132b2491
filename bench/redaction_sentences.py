"""Sentences with identifiers of every kind in many forms, and with numbers and words that only look
like some, drawn with a seed: what `bench.redaction` measures on.

About one form in eight is one that dray does not look for (digits with dots between groups of a
card, an address spelt without brackets), so that the figures say what is missed.
"""

from __future__ import annotations

import base64
import random
import string
from collections.abc import Callable
from dataclasses import dataclass

import phonenumbers
from phonenumbers import PhoneNumberFormat, PhoneNumberType

Draw = random.Random
REGIONS = ("US", "GB", "CN", "DE", "FR")
SENTENCES = (
    "Please write to us, {} works best, and somebody will answer.",
    "{} is what I was given last week.",
    "Her note said: {}. Nothing else.",
    "请记下{}，谢谢。",
    "资料如下：{}；如有问题请告知。",
    "Bitte notieren Sie {} und melden Sie sich danach.",
    "Unter {} erreichen Sie die Stelle (werktags).",
    "The form has name, town, {} and a date in it.",
)
FIRST = ("anna", "li.wei", "j.smith", "m_mueller", "o'neil", "info", "wang88", "sales+eu", "x")
DOMAINS = ("example.com", "mail.example.co.uk", "example.de", "163.example.cn", "büro.example.de")


@dataclass(frozen=True)
class Sentence:
    """A text, and where in it is what."""

    text: str
    finds: tuple[tuple[str, int, int], ...]


def make_sentences(seed: int, number: int) -> list[Sentence]:
    """`number` sentences with an identifier of each kind, and as many with each look-alike."""
    draw = Draw(seed)
    found = []
    for kind, make in MAKERS.items():
        for _ in range(number):
            value, words = make(draw)
            before, after = draw.choice(SENTENCES).split("{}")
            start = len(before) + len(words)
            text = before + words + value + after
            found.append(Sentence(text, ((kind, start, start + len(value)),)))
    for make_other in LOOKALIKES:
        for _ in range(number // 2):
            text = draw.choice(SENTENCES).format(make_other(draw))
            found.append(Sentence(text, ()))
    draw.shuffle(found)
    return found


def _digits(draw: Draw, number: int) -> str:
    return "".join(draw.choices(string.digits, k=number))


def _email(draw: Draw) -> tuple[str, str]:
    name, domain = draw.choice(FIRST), draw.choice(DOMAINS)
    form = draw.choice(("{}@{}", "{}@{}", "{}@{}", "{}@{}", "{} [at] {}", "{}(at){}", "{} at {}"))
    address = form.format(name, domain)
    if form.endswith("at {}"):
        address = address.replace(".", " dot ")
    return (address.upper() if draw.random() < 0.1 else address), draw.choice(
        ("", "E-Mail: ", "邮箱")
    )


def _phone(draw: Draw) -> tuple[str, str]:
    region = draw.choice(REGIONS)
    while True:
        kind = draw.choice((PhoneNumberType.FIXED_LINE, PhoneNumberType.MOBILE))
        example = phonenumbers.example_number_for_type(region, kind)
        national = str(example.national_number)[:-4] + _digits(draw, 4)
        number = phonenumbers.parse(national, region)
        if phonenumbers.is_valid_number(number):
            break
    form = draw.choice(("e164", "international", "national", "dots", "bare", "wide", "spaced"))
    plain = phonenumbers.format_number(number, PhoneNumberFormat.NATIONAL)
    if form == "e164":
        return phonenumbers.format_number(number, PhoneNumberFormat.E164), ""
    if form == "international":
        return phonenumbers.format_number(number, PhoneNumberFormat.INTERNATIONAL), ""
    if form == "dots":
        return plain.replace(" ", ".").replace("(", "").replace(")", ""), "tel. "
    if form == "bare":
        return "".join(filter(str.isdigit, plain)), draw.choice(("phone ", "手机", "Tel: ", ""))
    if form == "wide":
        return "".join(chr(ord(c) + 0xFEE0) if c.isdigit() else c for c in plain), "电话："
    if form == "spaced":
        return " ".join(filter(str.isdigit, plain)), "call "
    return plain, draw.choice(("", "Tel. ", "电话"))


def luhn(digits: str) -> str:
    """Digits with the one that checks them."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if place % 2 == 0 else 1)
        total += value - 9 if value > 9 else value
    return digits + str(-total % 10)


def _card(draw: Draw) -> tuple[str, str]:
    prefix, size = draw.choice((("4", 16), ("51", 16), ("37", 15), ("6222", 19), ("3530", 16)))
    card = luhn(prefix + _digits(draw, size - len(prefix) - 1))
    groups = [card[:4], card[4:10], card[10:]] if size == 15 else _fours(card)
    return draw.choice(
        (card, " ".join(groups), "-".join(groups), " ".join(groups), ".".join(groups))
    ), ""


def _fours(text: str) -> list[str]:
    return [text[place : place + 4] for place in range(0, len(text), 4)]


def _iban(draw: Draw) -> tuple[str, str]:
    country, size = draw.choice((("DE", 22), ("ES", 24), ("FR", 27), ("PL", 28), ("CH", 21)))
    rest = _digits(draw, size - 4)
    number = int("".join(str(int(mark, 36)) for mark in f"{rest}{country}00"))
    iban = f"{country}{98 - number % 97:02d}{rest}"
    form = draw.choice((iban, " ".join(_fours(iban)), " ".join(_fours(iban)), iban.lower()))
    return (".".join(_fours(iban)) if draw.random() < 0.1 else form), draw.choice(("", "IBAN: "))


def _cn_id(draw: Draw) -> tuple[str, str]:
    area = draw.choice(("110105", "310101", "440305", "510104"))
    born = f"{draw.randint(1950, 2010)}{draw.randint(1, 12):02d}{draw.randint(1, 28):02d}"
    body = area + born + _digits(draw, 3)
    total = sum(int(digit) * (2 ** (17 - place) % 11) for place, digit in enumerate(body))
    last = "10X98765432"[total % 11]
    old = area + born[2:] + body[-3:]  # 15 digits, without one that checks them, until 1999
    forms = (body + last, body + last.lower(), f"{area} {born} {body[-3:]}{last}", body + last, old)
    return draw.choices(forms, (3, 1, 1, 3, 1))[0], draw.choice(("", "身份证号", "ID "))


def _ssn(draw: Draw) -> tuple[str, str]:
    area = draw.choice([*range(1, 666), *range(667, 900)])
    parts = f"{area:03d}", f"{draw.randint(1, 99):02d}", f"{draw.randint(1, 9999):04d}"
    by = draw.choice(("-", "-", "-", " ", " ", ""))
    return by.join(parts), "SSN " if by != "-" or draw.random() < 0.5 else ""


def _ip(draw: Draw) -> tuple[str, str]:
    if draw.random() < 0.3:
        groups = [f"{draw.randrange(1, 65536):x}" for _ in range(6)]
        return ":".join(("2a01", "4f8", *groups)), draw.choice(("", "IPv6 "))
    first = draw.choice((5, 23, 62, 81, 93, 114, 151, 185, 203))
    address = ".".join(map(str, (first, *(draw.randint(1, 254) for _ in range(3)))))
    return address, draw.choice(("", "IP: ", "host ", "来自", "version "))


def _key(draw: Draw) -> tuple[str, str]:
    letters = string.ascii_letters + string.digits
    long = "".join(draw.choices(letters, k=36))
    word = "".join(draw.choices(letters, k=9)) + draw.choice(string.digits)
    jwt = ".".join(base64.urlsafe_b64encode(draw.randbytes(18)).decode() for _ in range(2))
    return draw.choice(
        (
            ("AKIA" + long[:16].upper(), ""),
            ("ghp_" + long, ""),
            ("sk-" + long, ""),
            ("xoxb-" + _digits(draw, 12) + "-" + long[:20], ""),
            ("eyJhbGciOiJIUzI1NiJ9." + jwt, ""),
            (word, "password="),
            (word, "密码："),
            (long, 'api_key: "'),
            (draw.choice(("correct horse", "sunshine", "qwertyuiop")), "password: "),
        )
    )


MAKERS: dict[str, Callable[[Draw], tuple[str, str]]] = {
    "email": _email,
    "phone": _phone,
    "card": _card,
    "iban": _iban,
    "cn_id": _cn_id,
    "us_ssn": _ssn,
    "ip": _ip,
    "key": _key,
}


def _wrong(draw: Draw, make: Callable[[Draw], tuple[str, str]]) -> str:
    """An identifier whose last digit is another one."""
    value = make(draw)[0]
    last = max(place for place, mark in enumerate(value) if mark.isdigit())
    return value[:last] + str((int(value[last]) + draw.randint(1, 8)) % 10) + value[last + 1 :]


def _isbn(draw: Draw) -> str:
    return f"ISBN 978-3-{_digits(draw, 2)}-{_digits(draw, 6)}-{_digits(draw, 1)}"


LOOKALIKES: tuple[Callable[[Draw], str], ...] = (
    lambda draw: f"order {draw.randint(10**9, 10**10 - 1)}",
    lambda draw: f"Bestellnummer {draw.randint(10**11, 10**12 - 1)}",
    lambda draw: f"订单号{draw.randint(2 * 10**15, 3 * 10**15)}",
    lambda draw: _wrong(draw, _card),
    lambda draw: _wrong(draw, _iban),
    _isbn,
    lambda draw: f"version {draw.randint(1, 40)}.{draw.randint(0, 30)}.{draw.randint(0, 99)}.3",
    lambda draw: f"{draw.randint(1990, 2026)}-0{draw.randint(1, 9)}-{draw.randint(10, 28)} 10:30",
    lambda draw: f"{draw.randint(1, 28)}.{draw.randint(1, 12)}.{draw.randint(1990, 2026)}",
    lambda draw: f"{draw.uniform(-90, 90):.6f} {draw.uniform(-180, 180):.6f}",
    lambda draw: str(draw.randint(1_500_000_000_000, 1_800_000_000_000)),
    lambda draw: f"192.168.{draw.randint(0, 255)}.{draw.randint(1, 254)}",
    lambda draw: f"${draw.randint(1, 999)},{_digits(draw, 3)},{_digits(draw, 3)}.00",
    lambda draw: ":".join(f"{draw.randrange(256):02x}" for _ in range(6)),
    lambda draw: f"{draw.randbytes(16).hex()}",
    lambda draw: f"@{draw.choice(FIRST)} und icon@2x.png",
    lambda draw: f"password: {draw.choice(('required', 'optional', 'vergessen'))}",
    lambda draw: " ".join(str(draw.randint(100, 999)) for _ in range(4)),
)  # fmt: skip
"""Numbers of orders, wrong check digits, books, versions, dates, places on earth, times, addresses
that are nobody's, prices, hardware addresses, digests, handles, plain words."""
