"""Normalisation, filters and hashes of documents."""

from __future__ import annotations

import unicodedata

import numpy as np
import pyarrow as pa
import pytest

from dray.corpus.cleaning import clean, hash_texts, held_out, normalize, repeated_line_share
from dray.spec import Cleaning


def strings(*texts: str) -> pa.Array:
    return pa.array(texts, pa.large_string())


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_normalisation_equals_unicodedata(form: str) -> None:
    texts = ["plain", "e\u0301 A\u030a", "\ufb01 \u2460", "", "漢字 ①"]
    assert normalize(strings(*texts), form).to_pylist() == [
        unicodedata.normalize(form, text) for text in texts
    ]  # type: ignore[arg-type]


def test_none_leaves_text_alone() -> None:
    assert normalize(strings("e\u0301"), "none").to_pylist() == ["e\u0301"]


def test_each_filter_counts_what_it_drops() -> None:
    texts = strings("ab", "fine text", "x" * 50, "!!! ??? a", "same\nsame\nsame\nother")
    labels = pa.array(["0", "1", "2", "3", "4"])
    rules = Cleaning(
        min_chars=3, max_chars=40, min_alphanumeric_share=0.5, max_repeated_line_share=0.4
    )
    cleaned = clean(texts, labels, rules)
    assert cleaned.texts.to_pylist() == ["fine text"]
    assert cleaned.labels.to_pylist() == ["1"]
    assert cleaned.dropped == {"too_short": 1, "too_long": 1, "few_letters": 1, "repeated_lines": 1}


def test_a_document_is_counted_for_its_first_reason_only() -> None:
    assert clean(strings("!"), None, Cleaning(min_chars=2, min_alphanumeric_share=1)).dropped == {
        "too_short": 1
    }


def test_lengths_are_characters_not_bytes() -> None:
    rules = Cleaning(min_chars=2, max_chars=2)
    assert clean(strings("漢字", "漢", "漢字漢"), None, rules).texts.to_pylist() == ["漢字"]


def test_empty_documents_go_by_default() -> None:
    assert clean(strings("", "a"), None, Cleaning()).dropped == {"too_short": 1}
    assert clean(strings("", "a"), None, Cleaning(min_chars=0)).dropped == {}


def test_alphanumeric_share_knows_all_scripts() -> None:
    rules = Cleaning(min_alphanumeric_share=0.9)
    texts = ["漢字かな", "привет мир", "١٢٣", "--- ---"]
    assert clean(strings(*texts), None, rules).texts.to_pylist() == texts[:3]


def test_repeated_line_share_ignores_blank_lines() -> None:
    assert repeated_line_share("a\n\n\n\nb") == 0
    assert repeated_line_share("ab\nab\n") == 0.5
    assert repeated_line_share("") == 0


def test_hashes_go_by_content_whatever_the_slice() -> None:
    whole = strings("a", "b", "a", "c" * 1000)
    high, low = hash_texts(whole)
    assert high[0] == high[2]
    assert low[0] == low[2]
    assert len(set(low.tolist())) == 3
    sliced_high, sliced_low = hash_texts(whole.slice(1, 2))
    assert sliced_high.tolist() == high[1:3].tolist()
    assert sliced_low.tolist() == low[1:3].tolist()
    assert len(hash_texts(strings())[0]) == 0


def test_held_out_share_is_about_right_and_nested() -> None:
    _, low = hash_texts(strings(*(f"document {i}" for i in range(20_000))))
    small, large = held_out(low, 0.05), held_out(low, 0.2)
    assert 0.04 < small.mean() < 0.06
    assert not np.any(small & ~large)
