"""FineWeb's own rules (Penedo et al. 2024, section 3.6): against lists and what else is made of
short or equal lines."""

from __future__ import annotations

from dray.corpus.filters.measures import lines_of, repeated
from dray.spec import FineWeb

END_MARKS = tuple(".!?。！？…।؟۔։።။។\"'”’»")
"""What a sentence, or its quotation, ends with."""


def broken_by_list(text: str, rules: FineWeb) -> str | None:
    """Which of FineWeb's rules a document breaks, if it breaks one."""
    lines = lines_of(text)
    if not lines:
        return "no lines"
    ended = sum(line.endswith(END_MARKS) for line in lines)
    if ended < rules.min_punctuated_line_share * len(lines):
        return "too few lines with an end mark"
    short = sum(len(line) <= rules.short_line_chars for line in lines)
    if short > rules.max_short_line_share * len(lines):
        return "too many short lines"
    _, chars = repeated(lines)
    if chars > rules.max_duplicate_line_char_share * sum(map(len, lines)):
        return "characters in duplicate lines"
    if text.count("\n") > rules.max_newline_word_ratio * len(text.split()):
        return "too many newlines"
    return None
