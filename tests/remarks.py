"""A display that keeps what a person would have read."""

from __future__ import annotations

from dray.show.progress import Display


class Remarks(Display):
    """Keeps its remarks, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)
