"""C4's rules (Raffel et al. 2020, section 2.2): lines that are no sentences go, and documents of
which too little stays."""

from __future__ import annotations

import re
from collections import Counter

from dray.spec import C4

_ENDS = (".", "!", "?", '"', "”")
_CITATIONS = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_SENTENCES = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)")


def without_lines(text: str, rules: C4, removed: Counter[str]) -> tuple[str, str | None]:
    """The document without the lines that are taken out, which are added to `removed` by reason,
    and which rule it breaks, if it breaks one."""
    if rules.lorem_ipsum and "lorem ipsum" in text.lower():
        return text, "lorem ipsum"
    if rules.curly_brackets and "{" in text:
        return text, "curly bracket"
    kept: list[str] = []
    num_sentences = 0
    for given in text.split("\n"):
        line = given.strip()
        if rules.citations:
            line, count = _CITATIONS.subn("", line)
            if count:
                removed["c4: citation marks"] += count
        reason = _reason(line, rules)
        if reason is None:
            kept.append(line)
            num_sentences += max(bool(line), len(_SENTENCES.findall(line)))
        elif line:
            removed[f"c4: {reason}"] += 1
    if num_sentences < rules.min_sentences:
        return text, "too few sentences"
    if not any(kept):
        return text, "no line left"
    return "\n".join(kept), None


def _reason(line: str, rules: C4) -> str | None:
    """Why a line is taken out, if it is."""
    words = line.split()
    lower = line.lower()
    if len(words) < rules.min_line_words:
        return "lines of too few words"
    if any(len(word) > rules.max_word_chars for word in words):
        return "lines with a long word"
    if rules.terminal_punctuation and (not line.endswith(_ENDS) or line.endswith("...")):
        return "lines without an end mark"
    if rules.javascript and "javascript" in lower:
        return "lines about JavaScript"
    if rules.policies and any(policy in lower for policy in _POLICIES):
        return "lines about policies"
    return None
