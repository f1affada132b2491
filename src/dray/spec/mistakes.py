"""A mistake in a spec as one line: where it was given, the dotted path, what was given, the rule,
the way out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from dray.errors import SpecError
from dray.redaction import redact
from dray.spec.sections import NAME_RULE
from dray.spec.sources import Source
from dray.spec.spec import Spec

ALIKE = 0.8
"""So much alike, a sibling of a key is what was meant, not one elsewhere whose name is a part of
it."""


_PATTERNS = {
    "^[a-z]{2,3}$": "a code of two or three small letters, such as en",
    "^[A-Z]{2}$": "a code of two capital letters, such as US",
    "^[A-Za-z_][A-Za-z0-9_]*$": "letters, digits and _, as names of environment variables have",
    "^[0-9a-f]{32}$": "32 hexadecimal digits, as dray forget tells them",
}
"""What values are like that are no names of runs."""


def shown_words(text: str, width: int = 200) -> str:
    """A user's own words, without secrets, fit for a line."""
    text = redact(text)
    printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:width])
    return printable + ("…" if len(text) > width else "")


def _known_keys(section: type[BaseModel], tags: Collection[str], prefix: str = "") -> Iterator[str]:
    """The keys of a section and of those in it; of a section of several kinds the one that `tags`
    names, if any."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        sections = list(_kinds(field.annotation))
        for kind in [kind for kind in sections if kind.__name__ in tags] or sections:
            yield from _known_keys(kind, tags, f"{prefix}{name}.")


def _kinds(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a value may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


def translate(
    error: ValidationError,
    where: str,
    overrides: Sequence[str],
    model: type[BaseModel] = Spec,
) -> SpecError:
    """The first of pydantic's findings on a `model` as one line; `where`: the tree's origin, if no
    override brought the value."""
    details = error.errors(include_url=False)
    # Of a union's findings the deepest is about what the user wrote; unknown keys are clearest of
    # all.
    first = next(
        (item for item in details if item["type"] in ("extra_forbidden", "invalid_key")), details[0]
    )
    # Among the parts of a place pydantic also names the members of unions that it tried.
    parts = [str(part) for part in first["loc"]]
    path = ".".join(part for part in parts if "[" not in part and not part[:1].isupper())
    if path and any(
        f"{path}.".startswith(f"{override.partition('=')[0]}.") for override in overrides
    ):
        where = "the command line"
    if (
        first["type"] == "extra_forbidden" and parts[-1].isdigit()
    ):  # of what may be a list, and is none
        section = re.sub(r"(\.\d+)+$", "", path)
        way_out = f"name its keys without a number: {section}.KEY"
        if any(override.startswith(f"{section}.{parts[-1]}") for override in overrides):
            where = "the command line"
        return SpecError(
            where, f"{section} is no list, it has no item {parts[-1]}", way_out=way_out
        )
    if first["type"] == "extra_forbidden":
        return SpecError(where, f"unknown key {path}", way_out=_suggest(model, path, parts))
    if first["type"] == "invalid_key":
        return SpecError(
            where, f"the key {path} is a {type(first['loc'][-1]).__name__}", "keys are words"
        )
    if first["type"] == "missing":
        return SpecError(where, f"{path} is missing", "it has no default")
    message = redact(str(first["msg"]).removeprefix("Value error, "))
    if first["type"] == "string_pattern_mismatch":
        message = _PATTERNS.get(first["ctx"]["pattern"], NAME_RULE)
    if first["type"] == "too_short":
        message = f"at least {first['ctx']['min_length']} of them"
    if first["type"] == "model_type":
        message = _wanted_mapping(model, first)
    if not path:
        return SpecError(where, message)
    given = (
        ""
        if isinstance(first["input"], (Mapping, BaseModel))
        else f" = {shown_words(repr(first['input']))}"
    )
    return SpecError(where, f"{path}{given}: {message[:1].lower()}{message[1:]}")


def _sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The sections of a section, and those in them."""
    for field in model.model_fields.values():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield kind
                yield from _sections(kind)


def _wanted_mapping(model: type[BaseModel], finding: Mapping[str, Any]) -> str:
    """What belongs where something else than a section stands; one value is taken for that of its
    first key."""
    name, given = finding["ctx"]["class_name"], finding["input"]
    keys = next(
        (list(kind.model_fields) for kind in _sections(model) if kind.__name__ == name), ["keys"]
    )
    if isinstance(given, str | int | float):
        return f"a mapping such as {{{keys[0]}: {shown_words(str(given))}}} is wanted"
    return f"a mapping of {', '.join(keys)} is wanted"


def _suggest(model: type[BaseModel], unknown: str, tags: Collection[str]) -> str:
    """What the person may have meant by a key: one of its section with a like name, else one of
    another section."""
    known = list(_known_keys(model, tags))
    if model is Spec:
        known += [f"data.train.{name}" for name in Source.model_fields]
    section, _, word = re.sub(r"\.\d+", "", unknown).rpartition(".")
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    names = [key.rpartition(".")[2] for key in siblings]
    near = difflib.get_close_matches(
        word, names or [key.rpartition(".")[2] for key in known], n=1, cutoff=0.5
    )
    part = next(
        (key for key in known if key.rpartition(".")[2] in word.split("_") and key not in siblings),
        None,
    )
    if part and not (near and difflib.SequenceMatcher(None, word, near[0]).ratio() > ALIKE):
        return f"did you mean {part}?"
    if near and names:
        return f"did you mean {near[0]}?" if not section else f"did you mean {section}.{near[0]}?"
    elsewhere = near or [key for key in known if key.rpartition(".")[2] == word]
    return f"did you mean {elsewhere[0]}?" if elsewhere else f"known here: {', '.join(names)}"
