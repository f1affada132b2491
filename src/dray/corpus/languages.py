"""In which language a document is written, as py3langid tells it (Lui, Baldwin 2012): by n-grams of
bytes, for some 140 languages, with a model that comes with the package.

Texts of a few words, of several languages and of code are told apart badly: their probability is
low, and they count as of no clear language.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Any

from dray.errors import SpecError
from dray.spec import Languages

CHARS = 2000
"""Of a document that are looked at."""
UNCLEAR = "of no clear language"
OF_LANGUAGE = "of language "


@cache
def _identifier() -> Any:
    """The model, read once a process."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_of(text: str) -> tuple[str, float]:
    """The most probable language of a text, as its code of ISO 639-1, and its probability."""
    code, score = _identifier().classify(text[:CHARS])
    return str(code), float(score)


def refused_by(text: str, languages: Languages) -> tuple[str, str | None]:
    """The language of a text, and why it is left out, if it is."""
    code, score = language_of(text)
    if score < languages.min_score:
        return code, UNCLEAR
    return code, None if code in languages.keep else f"{OF_LANGUAGE}{code}"


def check_languages(languages: Languages) -> None:
    """Raise SpecError for a language that cannot be told."""
    known = sorted(_identifier().labels)
    if unknown := sorted({*languages.keep} - {*known}):
        raise SpecError(
            f"data.cleaning.languages.keep = {unknown[0]}",
            "is no language that can be told",
            f"one of {', '.join(known)}",
        )


def language_version() -> str:
    """What tells languages: another version may tell them otherwise."""
    return f"py3langid {version('py3langid')}"
