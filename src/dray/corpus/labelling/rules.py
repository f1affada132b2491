"""Rules that vote for a label of a record, or keep out: patterns, words, lexicons, numbers, and
functions of a file that is named for it.

A rule that takes longer than a second over a record keeps out, and is counted. Refuses rules that
say nothing, or name labels that are none.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import pyarrow as pa
import pyarrow.csv
from pydantic import Field, ValidationError, model_validator

from dray.errors import CorpusError, SpecError, StoreError, one_line
from dray.processes.imports import require_package
from dray.spec import BadYaml, Float, Section, read_yaml, translate

ABSTAINS = -1
PATTERN_SECONDS = 1.0
Record = Mapping[str, Any]
Vote = Callable[[Record], int]
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")


class Lexicon(Section):
    """A csv or tsv of words with what each speaks for."""

    path: str
    word: str = "word"
    """The column of words."""
    label: str = "label"
    """The column of labels."""


class Rule(Section):
    """What speaks for a label: exactly one of `regex`, `words`, `lexicon`, `program`, or numbers of
    a `column`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    label: str | None = None
    """What it votes for; a lexicon and a program say it themselves."""
    column: str | None = None
    """Where it looks; the text by itself."""
    regex: str | None = None
    """Found anywhere in the text, whatever the case."""
    words: tuple[str, ...] | None = None
    """Any of these in the text, as whole words, whatever the case."""
    lexicon: Lexicon | None = None
    """The label that most of its words in the text speak for; as many for two keep out."""
    at_least: Float | None = None
    at_most: Float | None = None
    """Of the number in `column`."""
    program: str | None = None
    """A function of the file that `--program` gives, called with the record (a dict); it returns a
    label, or None."""

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        numbers = self.at_least is not None or self.at_most is not None
        kinds = {
            "regex": self.regex, "words": self.words, "lexicon": self.lexicon,
            "program": self.program, "at_least or at_most": numbers or None,
        }  # fmt: skip
        given = [name for name, value in kinds.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"{self.name}: exactly one of {', '.join(kinds)} is needed")
        tells = self.lexicon is not None or self.program is not None
        if tells == (self.label is not None):
            raise ValueError(
                f"{self.name}: a {given[0]} says the label itself"
                if tells
                else f"{self.name}: `label` is needed, what it votes for"
            )
        if numbers and self.column is None:
            raise ValueError(f"{self.name}: `column` is needed, where its number is")
        return self


class Rules(Section):
    """A file of rules."""

    labels: Annotated[tuple[str, ...], Field(min_length=2)]
    """All that there are."""
    text: str = "text"
    """The column of the text."""
    balance: Annotated[dict[str, Annotated[Float, Field(gt=0)]], Field(default_factory=dict)]
    """How frequent each label is, relative to the others; empty: all alike."""
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels names one twice")
        if self.balance and set(self.balance) != set(self.labels):
            raise ValueError(f"balance is of each label once: {', '.join(self.labels)}")
        names = Counter(rule.name for rule in self.rules)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"two rules are called {twice[0]}")
        for rule in self.rules:
            if rule.label is not None and rule.label not in self.labels:
                raise ValueError(
                    f"{rule.name}: {rule.label} is none of the labels {', '.join(self.labels)}"
                )
        return self


def read_rules(path: str) -> Rules:
    """The rules of a YAML file. Raises SpecError, StoreError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(path, f"cannot be read ({one_line(error)})") from error
    try:
        tree = read_yaml(text)
    except BadYaml as error:
        raise SpecError(path, str(error), "rules are YAML: labels, and a list of rules") from error
    if not isinstance(tree, dict):
        raise SpecError(path, "is no mapping", "rules are YAML: labels, and a list of rules")
    try:
        return Rules.model_validate(tree)
    except ValidationError as error:
        raise translate(error, path, (), Rules) from error


def make_voters(rules: Rules, program: str | None, slow: Counter[str]) -> list[Vote]:
    """What asks each rule, in their order. `slow` counts the records over which a rule took too
    long. Raises SpecError, StoreError, CorpusError for what no record could be asked by."""
    functions = _load(program, [rule.program for rule in rules.rules if rule.program])
    return [_voter(rule, rules, functions, slow) for rule in rules.rules]


def _voter(rule: Rule, rules: Rules, functions: Mapping[str, Any], slow: Counter[str]) -> Vote:
    column = rule.column or rules.text
    own = ABSTAINS if rule.label is None else rules.labels.index(rule.label)
    if rule.regex is not None:
        return _by_pattern(rule.name, rule.regex, column, own, slow)
    if rule.words is not None:
        wanted = {word.lower() for word in rule.words}
        return lambda record: own if wanted & set(_words(_text(record, column))) else ABSTAINS
    if rule.lexicon is not None:
        return _by_lexicon(rule, column, rules.labels)
    if rule.program is not None:
        return _by_function(rule, functions[rule.program], rules.labels)
    least = float("-inf") if rule.at_least is None else rule.at_least
    most = float("inf") if rule.at_most is None else rule.at_most

    def vote(record: Record) -> int:
        number = _number(record.get(column))
        return own if number is not None and least <= number <= most else ABSTAINS

    return vote


def _by_pattern(name: str, pattern: str, column: str, own: int, slow: Counter[str]) -> Vote:
    require_package("regex", "train", "a pattern with a time limit")
    import regex

    try:
        found = regex.compile(pattern, regex.IGNORECASE)
    except regex.error as error:
        raise SpecError(f"rule {name}", f"its regex is none ({error})") from error

    def vote(record: Record) -> int:
        try:
            hit = found.search(_text(record, column), timeout=PATTERN_SECONDS)
        except TimeoutError:
            slow[name] += 1
            return ABSTAINS
        return own if hit else ABSTAINS

    return vote


def _by_lexicon(rule: Rule, column: str, labels: Sequence[str]) -> Vote:
    assert rule.lexicon is not None
    speaks = _read_lexicon(rule.name, rule.lexicon, labels)

    def vote(record: Record) -> int:
        found = Counter(speaks[word] for word in _words(_text(record, column)) if word in speaks)
        first = found.most_common(2)
        if not first or (len(first) == 2 and first[0][1] == first[1][1]):
            return ABSTAINS
        return first[0][0]

    return vote


def _read_lexicon(name: str, lexicon: Lexicon, labels: Sequence[str]) -> dict[str, int]:
    tab = lexicon.path.endswith((".tsv", ".tab"))
    options = pa.csv.ParseOptions(delimiter="\t" if tab else ",")
    try:
        table = pa.csv.read_csv(lexicon.path, parse_options=options)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(lexicon.path, f"cannot be read ({one_line(error)})") from error
    for column in (lexicon.word, lexicon.label):
        if column not in table.column_names:
            raise CorpusError(
                lexicon.path, f"has no column {column}", f"it has {', '.join(table.column_names)}"
            )
    found: dict[str, int] = {}
    for word, label in zip(
        table.column(lexicon.word).to_pylist(), table.column(lexicon.label).to_pylist(), strict=True
    ):
        if str(label) not in labels:
            raise CorpusError(
                f"rule {name}",
                f"{lexicon.path} has the label {label!r}",
                f"labels are {', '.join(labels)}",
            )
        found[str(word).lower()] = labels.index(str(label))
    return found


def _by_function(rule: Rule, function: Any, labels: Sequence[str]) -> Vote:
    def vote(record: Record) -> int:
        try:
            found = function(dict(record))
        except Exception as error:  # somebody's own code
            raise CorpusError(
                f"rule {rule.name}",
                f"{rule.program} failed ({type(error).__name__}: {one_line(error)})",
                "a function returns a label, or None to keep out",
            ) from error
        if found is None:
            return ABSTAINS
        if found not in labels:
            raise CorpusError(
                f"rule {rule.name}",
                f"{rule.program} returned {found!r}",
                f"labels are {', '.join(labels)}; None keeps out",
            )
        return labels.index(found)

    return vote


def _load(path: str | None, wanted: Sequence[str]) -> dict[str, Any]:
    """Functions of a file, which runs. Raises SpecError, StoreError."""
    if not wanted:
        return {}
    if path is None:
        raise SpecError(
            f"rules: program {wanted[0]}",
            "no file is given",
            "code runs only from a file that you name",
            "give --program FILE.py",
        )
    spec = importlib.util.spec_from_file_location("labelling_program", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise StoreError(path, "is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # somebody's own code
        raise SpecError(path, f"failed ({type(error).__name__}: {one_line(error)})") from error
    if missing := [name for name in wanted if not callable(getattr(module, name, None))]:
        raise SpecError(path, f"has no function {missing[0]}")
    return {name: getattr(module, name) for name in wanted}


def _text(record: Record, column: str) -> str:
    value = record.get(column)
    return "" if value is None else str(value)


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _number(value: Any) -> float | None:
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
