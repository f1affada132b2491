"""Rewards that a program gives for answers, by name: dray's own, and those of installed packages
(entry points of the group `dray.tasks.rewards`).

A spec is data, so it names no code: a module or a file beside it is never run. A reward is called
with an answer, what was wanted and the prompt, and gives a finite number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from dray.errors import SpecError, one_line, translated
from dray.spec.tasks import GROUP as TASKS

GROUP = f"{TASKS}.rewards"
Reward = Callable[[str, str, str], float]
"""What an answer is worth, of the answer, what was wanted, and the prompt."""
_NUMBER = re.compile(
    r"(?:(?<![\w.])[-+])?(?:\d(?:[\d,]*\d)?(?:\.\d+)?|(?<![\d.])\.\d+)(?:[eE][-+]?\d{1,3}\b)?"
)
"""A sign behind a letter or a digit is a dash: 10-3 ends with 3."""


def exact(answer: str, wanted: str, prompt: str) -> float:
    """1 for what was wanted, white space around it aside; else 0."""
    return float(answer.strip() == wanted.strip())


def numeric(answer: str, wanted: str, prompt: str) -> float:
    """1 where the last number of the answer is the last one that was wanted, however it is written;
    else 0."""
    found, right = (_NUMBER.findall(text) for text in (answer, wanted))
    return float(bool(found and right) and _value(found[-1]) == _value(right[-1]))


def numeric_within(answer: str, wanted: str, tolerance: float) -> bool:
    """Whether the last number of the answer is at most so far from the last one that was wanted.
    Raises ValueError where no number was wanted."""
    found, right = (_NUMBER.findall(text) for text in (answer, wanted))
    if not right:
        raise ValueError(f"{wanted!r} holds no number")
    return bool(found) and abs(_value(found[-1]) - _value(right[-1])) <= Decimal(str(tolerance))


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def pattern_reward(pattern: str) -> Reward:
    """1 where a regular expression matches the whole answer, white space around it aside; else
    0."""
    compiled = re.compile(pattern)
    return lambda answer, wanted, prompt: float(compiled.fullmatch(answer.strip()) is not None)


OWN: Mapping[str, Reward] = {"exact": exact, "numeric": numeric}


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def reward_names() -> list[str]:
    """All that a spec may name besides `regex`."""
    return sorted({*OWN, *_installed()})


def find_reward(name: str) -> Reward:
    """A reward by name; dray's own come first. Raises SpecError for one that is not installed, or
    cannot be loaded."""
    if name in OWN:
        return OWN[name]
    point = _installed().get(name)
    if point is None:
        raise SpecError(
            f"task: reward {name}", "is not installed", f"there are {', '.join(reward_names())}"
        )
    with translated(
        lambda error: SpecError(
            f"task: reward {name}",
            f"{point.value} cannot be loaded ({type(error).__name__}: {one_line(error)})",
            "its entry point names a function",
            "mend that package, or uninstall it",
        )
    ):
        found: Any = point.load()
    return finite(name, found)


def finite(name: str, reward: Reward) -> Reward:
    """The same, held to finite numbers: one that is not would end in the weights. Raises ValueError
    when it gives another."""

    def checked(answer: str, wanted: str, prompt: str) -> float:
        value = float(reward(answer, wanted, prompt))
        if not math.isfinite(value):
            raise ValueError(f"reward {name} is {value} for {answer[:80]!r}")
        return value

    return checked
