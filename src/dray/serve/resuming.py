"""A stream that goes on where its replica was lost: another one writes the answer again, and what
has been given out is left out of it.

That can be, since an answer is the same wherever it is written: a greedy one by itself, a drawn one
by its seed, which each stream has. What is written again is held against what was given; where it
differs, the stream ends with an error instead.
"""

from __future__ import annotations

import secrets
from typing import Any

from dray.serve.events import Event

SEED_BITS = 62


class Differs(Exception):
    """What is written again is another answer."""


def with_seed(body: dict[str, Any]) -> dict[str, Any]:
    """A request whose answer is drawn the same every time; nobody can tell which seed it got."""
    if body.get("seed") is not None:
        return body
    return {**body, "seed": secrets.randbits(SEED_BITS)}


class Given:
    """What of an answer has been given out."""

    def __init__(self) -> None:
        self._pieces: dict[int, list[tuple[str, str | None]]] = {}
        """By choice: text, and why it ended."""
        self._places: dict[int, int] = {}
        """How many of each the present replica has told."""
        self._has_begun = False

    @property
    def is_any(self) -> bool:
        """Whether anything has been given out."""
        return bool(self._pieces)

    def begin(self) -> None:
        """A replica writes from the start."""
        self._places = {}

    def fresh(self, event: Event) -> Event | None:
        """What of an event has not been given out; none where all has. Raises Differs."""
        if "begin" in event:
            is_first, self._has_begun = not self._has_begun, True
            return event if is_first else None
        if "pieces" not in event:
            return event
        fresh = [piece for piece in event["pieces"] if self._is_fresh(*piece)]
        return {**event, "pieces": fresh} if fresh else None

    def _is_fresh(self, choice: int, text: str, token: Any, finish: str | None) -> bool:
        told = self._pieces.setdefault(choice, [])
        place = self._places.get(choice, 0)
        self._places[choice] = place + 1
        if place == len(told):
            told.append((text, finish))
            return True
        if told[place] != (text, finish):
            raise Differs
        return False
