"""What a document of the web must be like to be kept: named rules with the thresholds that were
published, languages, and no part of an evaluation set.

A class is a set of rules, a field with its sentence is a threshold. What they measure is
`corpus/filters` and `corpus/contamination.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from dray.spec.sections import Float, Int, OneOrMore, Section, Share, as_several
from dray.spec.sources import Sources


class GopherRepetition(Section):
    """Repetition within a document (Rae et al. 2021, table A1). Lines and paragraphs that are blank
    do not count; words are what stands between white space."""

    max_duplicate_line_share: Share = 0.3
    """Greatest share of lines that an earlier line equals."""
    max_duplicate_paragraph_share: Share = 0.3
    """Greatest share of paragraphs that an earlier one equals."""
    max_duplicate_line_char_share: Share = 0.2
    """Greatest share of characters in such lines."""
    max_duplicate_paragraph_char_share: Share = 0.2
    """Greatest share of characters in such paragraphs."""
    max_top_ngram_char_shares: tuple[Share, Share, Share] = (0.2, 0.18, 0.16)
    """Greatest share of characters in the most frequent run of 2, 3 and 4 words."""
    max_duplicate_ngram_char_shares: tuple[Share, Share, Share, Share, Share, Share] = (
        0.15,
        0.14,
        0.13,
        0.12,
        0.11,
        0.10,
    )
    """Greatest share of characters in runs of 5, 6, … 10 words that were there before; a character
    counts once."""


class GopherQuality(Section):
    """What prose is like (Rae et al. 2021, A.1.1). Its stop words are English: be, have, of, that,
    the, to, and, with."""

    min_words: Annotated[Int, Field(ge=0)] = 50
    """Fewest words, as white space parts them."""
    max_words: Annotated[Int, Field(ge=1)] = 100_000
    """Most words."""
    min_mean_word_chars: Annotated[Float, Field(ge=0)] = 3.0
    """Least mean length of a word."""
    max_mean_word_chars: Annotated[Float, Field(gt=0)] = 10.0
    """Greatest mean length of a word."""
    max_symbol_word_ratio: Annotated[Float, Field(ge=0)] = 0.1
    """Most `#`, and most ellipses, for each word."""
    max_bullet_line_share: Share = 0.9
    """Greatest share of lines that begin with a bullet."""
    max_ellipsis_line_share: Share = 0.3
    """Greatest share of lines that end with an ellipsis."""
    min_alphabetic_word_share: Share = 0.8
    """Least share of words with a letter."""
    min_stop_words: Annotated[Int, Field(ge=0, le=8)] = 2
    """Fewest different stop words; 0 where documents are not English."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for least, most in (
            ("min_words", "max_words"), ("min_mean_word_chars", "max_mean_word_chars")
        ):  # fmt: skip
            if getattr(self, least) > getattr(self, most):
                raise ValueError(f"{least} is above {most}: no document keeps both")
        return self


class C4(Section):
    """The rules of C4 (Raffel et al. 2020, 2.2): lines that are no sentences are taken out, and
    documents left out of which too little stays. C4's list of bad words is not part of it."""

    terminal_punctuation: bool = True
    """Take out lines that end with none of `.`, `!`, `?` and a quotation mark, or with an
    ellipsis."""
    min_line_words: Annotated[Int, Field(ge=0)] = 3
    """Take out lines of fewer words."""
    max_word_chars: Annotated[Int, Field(ge=1)] = 1000
    """Take out lines with a longer word."""
    javascript: bool = True
    """Take out lines that speak of JavaScript."""
    policies: bool = True
    """Take out lines that speak of cookies, terms of use or a privacy policy."""
    citations: bool = True
    """Take `[1]`, `[edit]` and `[citation needed]` out of lines."""
    lorem_ipsum: bool = True
    """Leave out documents with that filler text."""
    curly_brackets: bool = True
    """Leave out documents with a `{`, which are mostly code."""
    min_sentences: Annotated[Int, Field(ge=0)] = 5
    """Fewest sentences in what stays: ends of sentences before white space or the end of a
    line."""


class FineWeb(Section):
    """What FineWeb adds to these (Penedo et al. 2024, 3.6)."""

    min_punctuated_line_share: Share = 0.12
    """Least share of lines that end with an end mark of any script."""
    max_short_line_share: Share = 0.67
    """Greatest share of lines of up to `short_line_chars` characters."""
    short_line_chars: Annotated[Int, Field(ge=0)] = 30
    """What makes a line a short one."""
    max_duplicate_line_char_share: Share = 0.01
    """Greatest share of characters in lines that an earlier line equals."""
    max_newline_word_ratio: Annotated[Float, Field(ge=0)] = 0.3
    """Most newlines for each word."""


def _as_filters(value: Any) -> Any:
    """One name or a list of them stands for rules with the published thresholds."""
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, Sequence):
        if twice := next((name for name in value if value.count(name) > 1), None):
            raise ValueError(f"{twice} is there twice")
        if bad := [name for name in value if not isinstance(name, str)]:
            raise ValueError(f"{bad[0]!r}: filters in a list are names; thresholds need a mapping")
        return {name: {} for name in value}
    if isinstance(value, Mapping):  # `c4:` alone is c4 as published
        return {name: {} if rules is None else rules for name, rules in value.items()}
    return value


class Filters(Section):
    """Rules that a document must keep, in this order; the first that it breaks is counted. They are
    made for prose in scripts that put spaces between words."""

    gopher_repetition: GopherRepetition | None = None
    """Gopher's rules against repetition."""
    gopher_quality: GopherQuality | None = None
    """Gopher's rules for prose."""
    c4: C4 | None = None
    """C4's rules for lines and documents."""
    fineweb: FineWeb | None = None
    """FineWeb's own rules, for lists and lines."""


FiltersChoice = Annotated[Filters, BeforeValidator(_as_filters)]


def _as_languages(value: Any) -> Any:
    return {"keep": value} if isinstance(value, (str, bool, Sequence)) else value


def _as_codes(value: Any) -> Any:
    """One code or several. YAML reads the code of Norwegian as false."""
    found = (value,) if isinstance(value, bool) else as_several(value)
    return tuple("no" if code is False else code for code in found)


class Languages(Section):
    """In which languages documents are written, as py3langid tells it of their first 2,000
    characters."""

    keep: Annotated[
        tuple[Annotated[str, Field(pattern="^[a-z]{2,3}$")], ...],
        BeforeValidator(_as_codes),
        OneOrMore,
        Field(min_length=1),
    ]
    """Languages to keep, by their codes of ISO 639-1; others are left out."""
    min_score: Share = 0.65
    """Least probability of the language; a document below it is left out as one of no clear
    language."""


LanguagesChoice = Annotated[Languages | None, BeforeValidator(_as_languages)]


class Decontamination(Section):
    """Training documents that share text with an evaluation set are left out (Brown et al. 2020,
    appendix C)."""

    against: Sources
    """The evaluation sets, as sources; of a record all of `text` or `template` is looked for."""
    ngram_words: Annotated[Int, Field(ge=1, le=1000)] = 13
    """Words in a run that is looked for, in lower case, without punctuation; in scripts without
    spaces a character is a word. A shorter evaluation text is found only where it is a whole
    document."""
    max_ngrams: Annotated[Int, Field(ge=0)] = 0
    """Runs that a document may have in common with the evaluation sets."""
