"""Rules as constraints of what a classifier of texts learns: how a spec says them, and the votes
that rows have of them. The loss is in `rule_loss.py`.

Refuses rules that look at anything but a document's text, and patterns that take longer than a
second over one: a corpus must not hang on how fast a machine is.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field as Limits
from pydantic import model_validator

from dray.errors import CorpusError
from dray.spec.sections import Float
from dray.tasks.parts.rules import (
    ABSTAINS,
    PATTERN_SECONDS,
    Rule,
    RuleSet,
    Said,
    Vote,
    make_vote,
    read_lexicon,
)
from dray.tasks.rows import SEPARATOR

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    from dray.tasks.rows import Tools

OF_RECORDS = ("column", "at_least", "at_most", "program")
"""What rules of `dray label` may be besides."""


class Constraint(Rule):
    """A rule that a model is to keep to, more or less: exactly one of `regex`, `words` and
    `lexicon`."""

    weight: Annotated[Float, Limits(gt=0)] = 1.0
    """How much it counts beside the others."""

    @model_validator(mode="before")
    @classmethod
    def _is_of_texts(cls, given: Any) -> Any:
        others = [key for key in OF_RECORDS if isinstance(given, Mapping) and key in given]
        if others:
            raise ValueError(
                f"{given.get('name', 'a rule')}: {', '.join(others)} is a matter of `dray label`; "
                "here a rule is asked of a document's text (a source's `template` puts other "
                "columns into it), and no code runs that a spec names"
            )
        return given

    def with_lexicon_in(self, place: str) -> Self:
        """The same with its lexicon in another place."""
        assert self.lexicon is not None
        lexicon = self.lexicon.model_copy(update={"path": place})
        return self.model_copy(update={"lexicon": lexicon})


class Constraints(RuleSet):
    """Rules as constraints of what is learnt: beside its label a document teaches the model's own
    distribution, drawn towards what the rules say of its text."""

    rules: Annotated[tuple[Constraint, ...], Limits(min_length=1)]
    """What they are, each with a name of its own."""
    share: Annotated[Float, Limits(ge=0, le=1)] = 0.3
    """Of a document's loss: how much is imitation of the corrected distribution; 0: rules are
    measured alone."""
    strength: Annotated[Float, Limits(gt=0)] = 1.0
    """How far a rule of weight 1 corrects: labels that it does not vote for become exp(strength)
    times less likely beside the one that it does."""

    @property
    def row_settings(self) -> dict[str, Any]:
        """What of them decides over votes."""
        without: Any = {"weight": True, "lexicon": {"path"}}
        return {
            "labels": self.labels,
            "rules": [rule.model_dump(mode="json", exclude=without) for rule in self.rules],
        }

    @property
    def files(self) -> dict[str, str]:
        """The places of lexicons, by the names under which a corpus keeps them."""
        return {_kept_name(rule): rule.lexicon.path for rule in self.rules if rule.lexicon}

    def reading(self, files: Mapping[str, str]) -> Self:
        """The same with its lexicons in other places, by name."""
        rules = tuple(
            rule.with_lexicon_in(files[_kept_name(rule)]) if rule.lexicon else rule
            for rule in self.rules
        )
        return self.model_copy(update={"rules": rules})

    def read_files(self) -> dict[str, bytes]:
        """The lexicons by name. Raises UserError for rules that no text can be asked by."""
        found = {_kept_name(rule): read_lexicon(rule) for rule in self.rules if rule.lexicon}
        for rule in self.rules:
            make_vote(rule, self.labels, found.get(_kept_name(rule)), _refuse)
        return found


def _kept_name(rule: Rule) -> str:
    return rule.name + (rule.lexicon.suffix if rule.lexicon else "")


def _refuse(rule: Rule, text: str) -> int:
    """Rows that hang on how fast a machine is would be others each time."""
    raise CorpusError(
        f"rule {rule.name}",
        f"took longer than {PATTERN_SECONDS:g} s over the document that begins {text[:60]!r}",
        "a pattern that repeats what repeats itself may take for ever",
        "mend its regex, or leave such documents out (data.cleaning)",
    )


@lru_cache(maxsize=2)
def _make_votes(constraints: Constraints, contents: tuple[bytes | None, ...]) -> list[Vote]:
    """What asks each rule, once a process."""
    return [
        make_vote(rule, constraints.labels, content, _refuse)
        for rule, content in zip(constraints.rules, contents, strict=True)
    ]


def find_votes(constraints: Constraints, texts: pa.Array, tools: Tools) -> npt.NDArray[np.uint8]:
    """The column VOTES of texts, [texts, rules]. Of a pair rules see both texts, a line each.
    Raises CorpusError for a rule that takes too long."""
    import numpy as np

    contents = [
        tools.file(_kept_name(rule)) if rule.lexicon else None for rule in constraints.rules
    ]
    votes = _make_votes(constraints, tuple(contents))
    found = np.empty((len(texts), len(votes)), np.uint8)
    for row, text in enumerate(texts.to_pylist()):
        said = Said(text.replace(SEPARATOR, "\n"))
        found[row] = [vote(said) - ABSTAINS for vote in votes]
    return found
