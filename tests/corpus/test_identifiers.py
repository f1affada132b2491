"""Identifiers and what only looks like one, kind by kind."""

from __future__ import annotations

import pytest

from dray.corpus.identifiers import (
    FINDERS,
    fold,
    fulfils_gb11643,
    fulfils_luhn,
    fulfils_mod97,
)
from dray.corpus.phones import find_phones
from dray.corpus.redacting import SPECIFIC
from dray.spec import Redaction
from dray.spec.data import PATTERNED

PEM = "-----BEGIN PRIVATE KEY-----\nabc\n-----END PRIVATE KEY-----"
REGIONS = ("US", "GB", "CN", "DE", "FR")
FOUND = {
    "email": {
        "write to Anna.Schmidt+news@mail.example.co.uk.": "anna.schmidt+news@mail.example.co.uk",
        "请联系anna@example.com谢谢": "anna@example.com",
        "'o'neil@example.org'": "o'neil@example.org",
        "müller@büro.example.de": "müller@büro.example.de",
        "anna [at] example [dot] org": "anna@example.org",
        "anna(at)example.org": "anna@example.org",
        "ａｎｎａ＠ｅｘａｍｐｌｅ．ｃｏｍ": "anna@example.com",
        "mailto:a@example.org?subject=hi": "a@example.org",
    },
    "phone": {
        "call (212) 555-0123 now": "+12125550123",
        "phone: 2125550123": "+12125550123",
        "+44 20 7946 0958": "+442079460958",
        "Tel. 030/123456": "+4930123456",
        "06 12 34 56 78": "+33612345678",
        "手机13800138000，谢谢": "+8613800138000",
        "電話：０１０－６２３４５６７８": "+861062345678",
        "١٣٨٠٠١٣٨٠٠٠": "+8613800138000",
    },
    "card": {
        "4111 1111 1111 1111": "4111111111111111",
        "5500-0000-0000-0004 12/27": "5500000000000004",
        "4111 1111 1111 1111 127": "4111111111111111",
        "3782 822463 10005": "378282246310005",
        "４１１１　１１１１　１１１１　１１１１": "4111111111111111",
        "card 378282246310005.": "378282246310005",
    },
    "iban": {
        "IBAN: DE89 3704 0044 0532 0130 00 bei": "DE89370400440532013000",
        "gb82west12345698765432": "GB82WEST12345698765432",
        "FR14 2004 1010 0505 0001 3M02 606": "FR1420041010050500013M02606",
    },
    "cn_id": {
        "身份证11010519491231002X。": "11010519491231002X",
        "110105 19491231 002x": "11010519491231002X",
    },
    "us_ssn": {"SSN 219-09-9998": "219-09-9998", "social security no. 219 09 9998": "219-09-9998"},
    "ip": {
        "from 93.184.216.34:443": "93.184.216.34",
        "ip 8.8.8.8": "8.8.8.8",
        "地址：2a01:4f8:9c71:1dda:afa6:d644:b694:b3d5。": "2a01:4f8:9c71:1dda:afa6:d644:b694:b3d5",
        "2606:2800:0220:0001:0248:1893:25C8:1946": "2606:2800:220:1:248:1893:25c8:1946",
    },
    "key": {
        "请记下AKIAIOSFODNN7EXAMPLE，谢谢": "AKIAIOSFODNN7EXAMPLE",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789": "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        "db_password = 'hunter22x'": "hunter22x",
        '"api_key": "a8f5f167f44f4964e6c998dee827110c",': "a8f5f167f44f4964e6c998dee827110c",
        "密码：abc12345xyz": "abc12345xyz",
        "postgres://joe:pa55word@db/x": "pa55word",
        PEM: PEM,
    },
}
"""By kind, texts and the one value in each."""
NONE = {
    "email": ("icon@2x.png", "@handle", "a @ b", "amig@s!", "user@localhost", "[email protected]"),
    "phone": (
        "order 2012345678",
        "ISBN 978-3-16-148410-0",
        "2012-11-29 10:22",
        "1999-2003",
        "192.168.100.200",
        "44.552778 -0.868056",
        "£1,234,567.89",
        "1700000000",
        "example.org/13800138000.html",
        "10 8 8 11 10 8 12 12 11 13 16 16",
    ),
    "card": ("4111 1111 1111 1112", "1234567812345670", "x4111111111111111", "/378282246310005"),
    "iban": ("DE89 3704 0044 0532 0130 01", "XX89370400440532013000", "GB82WEST1234569876543"),
    "cn_id": ("110105194912310021", "11010519491331002X", "99010519491231002X"),
    "us_ssn": ("000-12-3456", "666-12-3456", "912-12-3456", "123-00-4567", "219 09 9998"),
    "ip": (
        "10.0.0.1",
        "127.0.0.1",
        "192.0.2.7",
        "version 41.0.22.8",
        "1.2.3.4",
        "300.1.1.1",
        "2001:db8::1",
        "12:30:45",
        "std::abs",
        "Chrome/41.0.222.8",
    ),
    "key": ("password: required", "token=17", "secret: something", "api_key = $API_KEY_2024_PROD"),
}


def values(kind: str, text: str) -> list[str]:
    folded = fold(text)
    found = find_phones(folded, REGIONS) if kind == "phone" else FINDERS[kind](folded)
    return [one.value for one in found]


@pytest.mark.parametrize("kind", sorted(FOUND))
def test_an_identifier_is_found_in_all_ways_of_writing_it(kind: str) -> None:
    for text, value in FOUND[kind].items():
        assert values(kind, text) == [value], text


@pytest.mark.parametrize("kind", sorted(NONE))
def test_what_only_looks_like_one_is_left(kind: str) -> None:
    for text in NONE[kind]:
        assert not values(kind, text), text


def test_every_kind_has_a_finder_and_texts() -> None:
    assert {*FINDERS, "phone"} == set(FOUND) == set(NONE) == set(PATTERNED)
    assert set(SPECIFIC) == {*PATTERNED, "name"}
    assert Redaction().kinds == PATTERNED


def test_one_wrong_digit_fails_every_checksum() -> None:
    for whole, check in (
        ("4111111111111111", fulfils_luhn),
        ("11010519491231002X", fulfils_gb11643),
        ("DE89370400440532013000", fulfils_mod97),
    ):
        assert check(whole)
        for place in range(4, len(whole) - 1):
            other = str((int(whole[place]) + 1) % 10)
            assert not check(whole[:place] + other + whole[place + 1 :])


def test_folding_keeps_every_place() -> None:
    text = "ｔｅｌ：＋４４ ２０－٧٩٤٦ ০९૫８　漢字𝟘"
    assert fold(text) == "tel:+44 20-7946 0958 漢字0"
    assert len(fold(text)) == len(text)
