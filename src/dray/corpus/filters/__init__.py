"""Published rules for documents of the web, by name: what of a document is kept, or which rule it
breaks.

A document is judged by itself, in pure functions of its text; `spec.filtering` has the thresholds
and their sources.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from dray.corpus.filters.c4 import without_lines
from dray.corpus.filters.fineweb import broken_by_list
from dray.corpus.filters.gopher import broken_by_prose, broken_by_repetition
from dray.spec import Filters

_RULES: tuple[tuple[str, Callable[[str, Any], str | None]], ...] = (
    ("gopher_repetition", broken_by_repetition),
    ("gopher_quality", broken_by_prose),
    ("c4", lambda text, rules: None),
    ("fineweb", broken_by_list),
)


def judge(text: str, filters: Filters, lines: Counter[str]) -> tuple[str, str | None]:
    """The document as it is kept, and the first rule that it breaks, if it breaks one, as `gopher:
    too few words`. Lines that C4's rules take out of a document that is kept are added to `lines`
    by reason."""
    removed: Counter[str] = Counter()
    for name, broken_by in _RULES:
        rules = getattr(filters, name)
        if rules is None:
            continue
        if name == "c4":
            text, broken = without_lines(text, rules, removed)
        else:
            broken = broken_by(text, rules)
        if broken is not None:
            return text, f"{name}: {broken}"
    lines.update(removed)
    return text, None
