"""Text from tokens, as it can be given out: never half of a character, never a part of what ends
it.

A character may take several tokens, and a stop string may begin in one token and end in another:
what could still become either is held back until it is clear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
BROKEN = "\ufffd"
"""What decoders write for bytes that are no whole character."""
LONGEST_WAIT = 16
"""Tokens after which the end of a character is no longer waited for: bytes that are none."""


class TextStream:
    """The text of one answer, token by token."""

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._begin = 0
        """The first token that is decoded again: some write a space only behind another one."""
        self._known = 0
        """Tokens whose text is known."""
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self.stopped = False
        """Whether a stop string was found; its text, and what is behind it, is not given out."""

    def push(self, token: int) -> str:
        """What can be given out now that this token is there."""
        self._ids.append(token)
        return self._given(self._fresh(is_last=False), is_last=False)

    def finish(self) -> str:
        """What was held back and turned out to be text."""
        return "" if self.stopped else self._given(self._fresh(is_last=True), is_last=True)

    def _fresh(self, *, is_last: bool) -> str:
        """The text of tokens that had none yet."""
        before = self._decode(self._ids[self._begin : self._known])
        whole = self._decode(self._ids[self._begin :])
        waits = whole.endswith(BROKEN) and len(self._ids) - self._known < LONGEST_WAIT
        if len(whole) <= len(before) or (waits and not is_last):
            if not (is_last or waits):  # a token without text, such as a special one
                self._known = len(self._ids)
            return ""
        self._begin, self._known = self._known, len(self._ids)
        return whole[len(before) :]

    def _given(self, fresh: str, *, is_last: bool) -> str:
        text = self._held + fresh
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        held = 0 if is_last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that are the beginning of a stop string."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
