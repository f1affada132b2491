"""A release as text: each stage, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dray.plan import format_seconds


class Stage(Protocol):
    """What is shown of a stage."""

    @property
    def stage(self) -> str: ...
    @property
    def was_there(self) -> bool: ...
    @property
    def what(self) -> str: ...
    @property
    def seconds(self) -> float: ...


def format_stages_done(stages: Sequence[Stage], missed: str = "") -> str:
    """Lines for people: a stage each, and the gate that does not hold."""
    lines = [
        f"{one.stage:<10}{'there' if one.was_there else format_seconds(one.seconds):>8}  {one.what}"
        for one in stages
    ]
    return "\n".join([*lines, *([f"ended: {missed}"] if missed else [])])
