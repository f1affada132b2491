"""Published rules for documents of the web, by name: what of a document is kept, or which rule it
breaks.

A document is judged by itself, in pure functions of its text; `spec.filtering` has the thresholds
and their sources.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from dray.corpus.filters.c4 import without_lines
from dray.corpus.filters.fineweb import broken_by_list
from dray.corpus.filters.gopher import broken_by_prose, broken_by_repetition
from dray.spec import Filters

Judge = Callable[[str, Any, Counter[str]], tuple[str, str | None]]
"""Of a document, a filter's thresholds and the lines that were taken out: what is kept of it, and
the rule that it breaks."""


def _leaving(broken_by: Callable[[str, Any], str | None]) -> Judge:
    """A filter that takes nothing out."""
    return lambda text, rules, removed: (text, broken_by(text, rules))


_FILTERS: Mapping[str, Judge] = {
    "gopher_repetition": _leaving(broken_by_repetition),
    "gopher_quality": _leaving(broken_by_prose),
    "c4": without_lines,
    "fineweb": _leaving(broken_by_list),
}


def judge(text: str, filters: Filters, lines: Counter[str]) -> tuple[str, str | None]:
    """The document as it is kept, and the first rule that it breaks, if it breaks one, such as
    `gopher_quality: too few words`. Lines that C4's rules take out of a document that is kept are
    added to `lines` by reason."""
    removed: Counter[str] = Counter()
    for name, by in _FILTERS.items():
        rules = getattr(filters, name)
        if rules is None:
            continue
        text, broken = by(text, rules, removed)
        if broken is not None:
            return text, f"{name}: {broken}"
    lines.update(removed)
    return text, None
