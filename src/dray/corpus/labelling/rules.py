"""Rules of records: those of texts, and numbers, other columns, and functions of a file that is
named for it.

A rule that takes longer than a second over a record keeps out, and is counted. Refuses rules that
say nothing, or name labels that are none.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from dray.errors import CorpusError, SpecError, StoreError, one_line
from dray.spec import BadYaml, Float, read_yaml, translate
from dray.tasks.parts.rules import ABSTAINS, Rule, RuleSet, Said, make_vote, read_lexicon

Record = Mapping[str, Any]
Vote = Callable[[Record], int]


class RecordRule(Rule):
    """What speaks for a label: exactly one of `regex`, `words`, `lexicon`, `program`, or numbers of
    a `column`."""

    column: str | None = None
    """Where it looks; the text by itself."""
    at_least: Float | None = None
    at_most: Float | None = None
    """Of the number in `column`."""
    program: str | None = None
    """A function of the file that `--program` gives, called with the record (a dict); it returns a
    label, or None."""

    @property
    def is_of_numbers(self) -> bool:
        return self.at_least is not None or self.at_most is not None

    @property
    def kinds(self) -> Mapping[str, Any]:
        numbers = self.is_of_numbers or None
        return {**super().kinds, "program": self.program, "at_least or at_most": numbers}

    @property
    def tells_label(self) -> bool:
        return super().tells_label or self.program is not None

    @model_validator(mode="after")
    def _says_where(self) -> Self:
        if self.is_of_numbers and self.column is None:
            raise ValueError(f"{self.name}: `column` is needed, where its number is")
        return self


class Rules(RuleSet):
    """A file of rules."""

    text: str = "text"
    """The column of the text."""
    balance: Annotated[dict[str, Annotated[Float, Field(gt=0)]], Field(default_factory=dict)]
    """How frequent each label is, relative to the others; empty: all alike."""
    rules: Annotated[tuple[RecordRule, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _balances(self) -> Self:
        if self.balance and set(self.balance) != set(self.labels):
            raise ValueError(f"balance is of each label once: {', '.join(self.labels)}")
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


def _voter(
    rule: RecordRule, rules: Rules, functions: Mapping[str, Any], slow: Counter[str]
) -> Vote:
    column = rule.column or rules.text
    if rule.program is not None:
        return _by_function(rule, functions[rule.program], rules.labels)
    if rule.is_of_numbers:
        return _by_number(rule, column, rules.labels.index(str(rule.label)))

    def keep_out(rule: Rule, text: str) -> int:
        slow[rule.name] += 1
        return ABSTAINS

    content = None if rule.lexicon is None else read_lexicon(rule)
    ask = make_vote(rule, rules.labels, content, keep_out)
    return lambda record: ask(Said(_text(record, column)))


def _by_number(rule: RecordRule, column: str, own: int) -> Vote:
    least = float("-inf") if rule.at_least is None else rule.at_least
    most = float("inf") if rule.at_most is None else rule.at_most

    def vote(record: Record) -> int:
        number = _number(record.get(column))
        return own if number is not None and least <= number <= most else ABSTAINS

    return vote


def _by_function(rule: RecordRule, function: Any, labels: Sequence[str]) -> Vote:
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


def _number(value: Any) -> float | None:
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
