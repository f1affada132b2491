"""Rules that vote for a label of a text, or keep out: patterns, words and lexicons, as they are
declared, and what asks them.

Refuses rules that say nothing or name labels that are none, patterns that are none, and lexicons of
other labels. What becomes of a pattern that takes longer than a second is its caller's choice.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Annotated, Any, Self

from pydantic import Field as Limits
from pydantic import field_validator, model_validator

from dray.errors import CorpusError, StoreError, one_line
from dray.processes.imports import require_package
from dray.spec.sections import Section, Word

ABSTAINS = -1
PATTERN_SECONDS = 1.0
"""Of the process' own time: one that waits for the machine is not slow."""
MOST_LABELS = 127
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")


class Lexicon(Section):
    """A csv or tsv of words with what each speaks for."""

    path: str
    word: str = "word"
    """The column of words."""
    label: str = "label"
    """The column of labels."""

    @property
    def suffix(self) -> str:
        """Of its file's name: tabs part the columns of .tsv and .tab."""
        return ".tsv" if self.path.partition("?")[0].endswith((".tsv", ".tab")) else ".csv"


class Rule(Section):
    """What speaks for a label of a text: exactly one of `regex`, `words` and `lexicon`."""

    name: Annotated[str, Limits(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """By which messages and tables know it."""
    label: Word | None = None
    """What it votes for; a lexicon says it itself."""
    regex: str | None = None
    """Found anywhere in the text, whatever the case."""
    words: Annotated[tuple[str, ...], Limits(min_length=1)] | None = None
    """Any of these in the text, as whole words, whatever the case."""
    lexicon: Lexicon | None = None
    """The label that most of its words in the text speak for; as many for two keep out."""

    @field_validator("regex")
    @classmethod
    def _is_a_pattern(cls, pattern: str | None) -> str | None:
        if pattern is None or find_spec("regex") is None:  # then nothing asks it either
            return pattern
        import regex

        try:
            regex.compile(pattern, regex.IGNORECASE)
        except regex.error as error:
            raise ValueError(f"the pattern is none ({error})") from error
        return pattern

    @property
    def kinds(self) -> Mapping[str, Any]:
        """What it may be, of which it is one."""
        return {"regex": self.regex, "words": self.words, "lexicon": self.lexicon}

    @property
    def tells_label(self) -> bool:
        """Whether it finds out which label it votes for."""
        return self.lexicon is not None

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        given = [name for name, value in self.kinds.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"{self.name}: exactly one of {', '.join(self.kinds)} is needed")
        if self.tells_label == (self.label is not None):
            raise ValueError(
                f"{self.name}: a {given[0]} says the label itself"
                if self.tells_label
                else f"{self.name}: `label` is needed, what it votes for"
            )
        return self


class RuleSet(Section):
    """Rules, and the labels that they vote for."""

    labels: Annotated[tuple[Word, ...], Limits(min_length=2, max_length=MOST_LABELS)]
    """All that rules may vote for."""
    rules: Annotated[tuple[Rule, ...], Limits(min_length=1)]
    """What they are, each with a name of its own."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels names one twice")
        names = Counter(rule.name for rule in self.rules)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"two rules are called {twice[0]}")
        for rule in self.rules:
            if rule.label is not None and rule.label not in self.labels:
                raise ValueError(
                    f"{rule.name}: {rule.label} is none of the labels {', '.join(self.labels)}"
                )
        return self


class Said:
    """A text, and its words where they are asked for."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """In lower case."""
        return [word.lower() for word in _WORD.findall(self.text)]


Vote = Callable[[Said], int]
"""The place among the labels of what a rule votes for, or ABSTAINS."""
Slow = Callable[[Rule, str], int]
"""What a rule says of a text over which it took too long."""


def make_vote(rule: Rule, labels: Sequence[str], content: bytes | None, slow: Slow) -> Vote:
    """What asks a rule of texts. `content`: its lexicon's file. Raises CorpusError for a lexicon
    that is none of the labels."""
    own = ABSTAINS if rule.label is None else labels.index(rule.label)
    if rule.regex is not None:
        return _by_pattern(rule, rule.regex, own, slow)
    if rule.words is not None:
        wanted = {word.lower() for word in rule.words}
        return lambda said: ABSTAINS if wanted.isdisjoint(said.words) else own
    assert content is not None
    return _by_lexicon(_parse_lexicon(rule, content, labels))


def _by_pattern(rule: Rule, pattern: str, own: int, slow: Slow) -> Vote:
    require_package("regex", "train", "a pattern with a time limit")
    import regex

    found = regex.compile(pattern, regex.IGNORECASE)

    def vote(said: Said) -> int:
        try:
            hit = found.search(said.text, timeout=PATTERN_SECONDS)
        except TimeoutError:
            return slow(rule, said.text)
        return own if hit else ABSTAINS

    return vote


def _by_lexicon(speaks: Mapping[str, int]) -> Vote:
    def vote(said: Said) -> int:
        found = Counter(speaks[word] for word in said.words if word in speaks)
        first = found.most_common(2)
        if not first or (len(first) == 2 and first[0][1] == first[1][1]):
            return ABSTAINS
        return first[0][0]

    return vote


def read_lexicon(rule: Rule) -> bytes:
    """The file of a rule's lexicon. Raises CorpusError where there is none, StoreError."""
    from dray.storage.filesystem import open_filesystem, read_bytes, shown

    assert rule.lexicon is not None
    place = rule.lexicon.path
    filesystem, path = open_filesystem(place)
    try:
        return read_bytes(filesystem, path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CorpusError(
            f"rule {rule.name}", f"{shown(place)} is no file", "a lexicon is read from one"
        ) from error
    except OSError as error:
        raise StoreError(shown(place), f"cannot be read ({one_line(error)})") from error


def _parse_lexicon(rule: Rule, content: bytes, labels: Sequence[str]) -> dict[str, int]:
    """The place among the labels of what each word speaks for."""
    import pyarrow as pa
    from pyarrow import csv

    from dray.storage.filesystem import shown

    assert rule.lexicon is not None
    lexicon, place = rule.lexicon, shown(rule.lexicon.path)
    as_texts = {column: pa.string() for column in (lexicon.word, lexicon.label)}
    try:
        table = csv.read_csv(
            io.BytesIO(content),
            parse_options=csv.ParseOptions(delimiter="\t" if lexicon.suffix == ".tsv" else ","),
            convert_options=csv.ConvertOptions(column_types=as_texts),
        )
    except pa.ArrowException as error:
        raise CorpusError(
            f"rule {rule.name}",
            f"{place} is no table ({one_line(error)})",
            "a lexicon is csv or tsv",
        ) from error
    for column in (lexicon.word, lexicon.label):
        if column not in table.column_names:
            has = f"it has {', '.join(table.column_names)}"
            raise CorpusError(f"rule {rule.name}", f"{place} has no column {column}", has)
    found: dict[str, int] = {}
    for word, label in zip(
        table.column(lexicon.word).to_pylist(), table.column(lexicon.label).to_pylist(), strict=True
    ):
        if label not in labels:
            raise CorpusError(
                f"rule {rule.name}",
                f"{place} has the label {label!r}",
                f"labels are {', '.join(labels)}",
            )
        found[word.lower()] = labels.index(label)
    return found
