"""Operators on texts: what they change, how much, and what they leave alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dray.corpus.augmenting import (
    LOOKALIKES,
    Augmenter,
    Words,
    delete_words,
    misread_print,
    swap_words,
)
from dray.corpus.rewriting import draw_for, places_to_hide
from dray.corpus.thesaurus import Synonyms
from dray.errors import CorpusError

TEXT = "The film, which I saw twice, isn't good; 12 people left (early)!"
MYTHES = b"""UTF-8
good|2
(adj)|fine|bad (antonym)|quality (generic term)|very nice|sound
(noun)|goodness|fine
film|1
(noun)|movie|picture
lonely|1
(adj)|state (similar term)
"""
KINDS = ("synonyms", "insertion", "swap", "deletion", "keyboard", "ocr")


def thesaurus() -> Synonyms:
    return Synonyms.read("th.dat", MYTHES)


def changed(kind: str, text: str, row: int, strength: float = 0.2) -> str:
    return Augmenter(strength, thesaurus()).change(kind, text, draw_for(0, 0, row))


@given(st.text(max_size=80))
@settings(max_examples=300, deadline=None)
def test_a_text_taken_apart_and_joined_is_the_same(text: str) -> None:
    words = Words.of(text)
    assert str(words) == text
    assert len(words.gaps) == len(words.words) + 1


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=60), row=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_any_text_is_changed_the_same_way_each_time(kind: str, text: str, row: int) -> None:
    once = changed(kind, text, row)
    assert once == changed(kind, text, row)
    assert Words.of(text).words or once == text


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_changed_in_ways_of_their_own(kind: str) -> None:
    found = {changed(kind, TEXT, row) for row in range(40)}
    assert len(found) > 5
    assert TEXT not in found


def test_synonyms_are_those_of_the_file_in_the_case_of_the_word() -> None:
    assert thesaurus()("good") == ("fine", "sound", "goodness")
    assert thesaurus()("Film") == ["Movie", "Picture"]
    assert thesaurus()("FILM") == ["MOVIE", "PICTURE"]
    assert thesaurus()("lonely") == ()
    found = changed("synonyms", TEXT, 1, strength=1.0)
    before, after = Words.of(TEXT), Words.of(found)
    assert after.gaps == before.gaps
    differing = {
        one: other for one, other in zip(before.words, after.words, strict=True) if one != other
    }
    assert differing.keys() == {"film", "good"}
    assert differing["film"] in ("movie", "picture")
    assert differing["good"] in ("fine", "sound", "goodness")


def test_a_thesaurus_is_kept_as_it_was_read() -> None:
    kept = Synonyms.load(thesaurus().dump())
    assert [kept(word) for word in ("good", "film", "lonely")] == [
        ("fine", "sound", "goodness"), ("movie", "picture"), (),
    ]  # fmt: skip
    lines = Synonyms.read("lines", "高兴 开心 愉快\n\nbig large\nalone\n".encode())
    assert lines("开心") == ("高兴", "愉快")
    assert lines("large") == ("big",)
    assert len(lines) == 5


@pytest.mark.parametrize("content", [b"", b"one\ntwo\n", b"\xff\xfe broken words"])
def test_what_is_no_thesaurus_is_refused(content: bytes) -> None:
    with pytest.raises(CorpusError, match=r"th\.dat"):
        Synonyms.read("th.dat", content)


def test_inserted_words_are_synonyms_of_some_and_the_others_stay() -> None:
    found = changed("insertion", TEXT, 3, strength=0.3)
    more = Counter(Words.of(found).words) - Counter(Words.of(TEXT).words)
    assert sum(more.values()) == 4  # 0.3 of 12 words
    assert set(more) <= {"fine", "sound", "goodness", "movie", "picture"}
    assert not Counter(Words.of(TEXT).words) - Counter(Words.of(found).words)


@given(st.integers(0, 10_000), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_swapped_words_are_the_same_words(row: int, number: int) -> None:
    words = Words.of(TEXT)
    found = swap_words(words, number, draw_for(0, 0, row))
    assert Counter(found.words) == Counter(words.words)
    assert found.gaps == words.gaps


@given(st.integers(0, 10_000), st.integers(1, 20))
@settings(max_examples=80, deadline=None)
def test_deleted_words_are_gone_and_one_stays(row: int, number: int) -> None:
    words = Words.of(TEXT)
    found = delete_words(words, number, draw_for(0, 0, row))
    assert len(found.words) == max(1, len(words.words) - number)
    assert Words.of(str(found)).words == found.words  # none has grown together with another
    assert not Counter(found.words) - Counter(words.words)
    assert "  " not in str(found)


def test_slips_of_the_keyboard_change_as_many_words_as_they_should() -> None:
    for row in range(50):
        found = Words.of(changed("keyboard", TEXT, row))
        before = Words.of(TEXT)
        assert found.gaps == before.gaps
        differing = [
            (one, other)
            for one, other in zip(before.words, found.words, strict=True)
            if one != other
        ]
        assert 0 < len(differing) <= 2  # 0.2 of 12; equal letters that change places are the same
        assert all(abs(len(one) - len(other)) <= 1 and other for one, other in differing)


def test_misread_print_goes_by_the_map() -> None:
    for row in range(50):
        found = misread_print(Words.of(TEXT), 2, draw_for(0, 0, row))
        for one, other in zip(Words.of(TEXT).words, found.words, strict=True):
            made = {
                one[:place] + look + one[place + 1 :]
                for place, letter in enumerate(one)
                for look in LOOKALIKES.get(letter, ())
            }
            assert other == one or other in made


def test_chinese_words_are_words() -> None:
    text = "这家酒店的服务非常好，hotel 下次还会来。"
    words = Words.of(text)
    assert "酒店" in words.words
    assert "hotel" in words.words
    assert str(words) == text
    swapped = {str(swap_words(words, 1, draw_for(0, 0, row))) for row in range(20)}
    assert all(sorted(one) == sorted(text) for one in swapped)
    assert len(swapped) > 10
    assert "酒店" in "".join(swapped)


def test_hidden_places_are_as_many_as_asked_for() -> None:
    places = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
    for row in range(30):
        single = places_to_hide(places, 0.3, "token_cutoff", draw_for(0, 0, row))
        assert len(set(single)) == 3
        assert set(single) <= set(places)
        span = places_to_hide(places, 0.3, "span_masking", draw_for(0, 0, row))
        start = places.index(span[0])
        assert span == places[start : start + 3]
    assert places_to_hide([], 0.3, "token_cutoff", draw_for(0, 0, 1)) == []
    assert places_to_hide([4], 0.01, "span_masking", draw_for(0, 0, 1)) == [4]


def test_draws_belong_to_seed_epoch_and_row() -> None:
    drawn = {
        (seed, epoch, row): draw_for(seed, epoch, row).random()
        for seed in (0, 1)
        for epoch in (0, 1)
        for row in (0, 1, 2**40)
    }
    assert len(set(drawn.values())) == len(drawn)
    assert np.isclose(
        np.mean([draw_for(0, 0, row).random() for row in range(2000)]), 0.5, atol=0.03
    )
