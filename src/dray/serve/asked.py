"""What is known of the request that is under way: who asks, which version answers, and what its
log line and metrics are made of. Nothing of what it says.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from dray.serve.drift import Look, look_at_prediction, look_at_prompt
from dray.serve.events import Event
from dray.serve.refusals import Refusal

LOOKED_AT = 32
"""Records of a request that are looked at for drift, so that none of them is a window by itself."""
LEFT = 499
"""The status of a request whose asker went away before the answer was whole (nginx's number)."""


@dataclass
class Asked:
    """What of a request decides who answers it, who did, and what came of it."""

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    key: str | None = None
    """The key's name, where it has one of its own."""
    caller: str = "anyone"
    """Who asks, as far as it is known: whoever has the same key is the same."""
    wanted: int | None = None
    """The version that it names."""
    user: str | None = None
    """Whose it says that it is."""
    model: str | None = None
    """That is to answer it: one that is served."""
    version: int | None = None
    """That answers it."""
    resumes: int | None = None
    """The version that has begun a stream which another of its replicas is to go on with."""
    records: list[dict[str, Any]] | None = None
    """What is asked, an item for each answer, where it may be needed again (`recalling.py`)."""
    answers: dict[int, Any] = field(default_factory=dict)
    """What was answered to each of them, where `records` are kept."""
    classes: frozenset[str] | None = None
    """Those that the model tells apart, where it does."""
    lost: set[int] = field(default_factory=set)
    """Versions whose replicas were lost under it."""
    status: int | None = None
    """Of the answer's headers, once they are out."""
    is_whole: bool = False
    """Whether the end of the answer is out."""
    refusal: Refusal | None = None
    """With which it was refused, or its stream broke off."""
    redacted: Counter[str] = field(default_factory=Counter)
    """Personal data that was taken out of it, by kind."""
    num_bytes: int = 0
    """Of its body, as far as it was read."""
    tokens_in: int | None = None
    tokens_out: int | None = None
    looks: list[Look] = field(default_factory=list)
    finishes: list[str] = field(default_factory=list)
    """Why each of its answers ended."""
    streams: bool = False
    began: float = field(default_factory=time.perf_counter)
    first: float | None = None
    """When the first of its answer went out: of a stream, its first token."""

    @property
    def outcome(self) -> int:
        """The status that it comes to: of a stream that broke off, what it broke off with."""
        if self.refusal is not None:
            return self.refusal.status
        return self.status if self.status is not None and self.is_whole else LEFT

    @property
    def seconds(self) -> float:
        """Since it came."""
        return time.perf_counter() - self.began

    def note_first(self) -> None:
        """Something of the answer goes out."""
        if self.first is None:
            self.first = time.perf_counter()

    def note_event(self, event: Event) -> None:
        """Something of an answer that is written, or all of it (`events.joined`)."""
        if "begin" in event:
            self.tokens_in = int(event["begin"])
        self.looks += [look_at_prompt(size) for size in event.get("prompts", ())[:LOOKED_AT]]
        if self.records is not None:
            for place, text, *_ in event.get("pieces", ()):
                self.answers[place] = self.answers.get(place, "") + text
            for place, choice in enumerate(event.get("choices", ())):
                self.answers[place] = choice["text"]
        if "pieces" in event:
            self.note_first()
            self.finishes += [finish for *_, finish in event["pieces"] if finish]
        self.finishes += [choice["finish"] for choice in event.get("choices", ())]
        if "usage" in event:
            self.tokens_in, self.tokens_out = event["usage"]
            self.looks += [{"finish": finish} for finish in self.finishes[:LOOKED_AT]]
            if self.finishes:
                self.looks.append({"written_length": self.tokens_out / len(self.finishes)})

    def note_predictions(
        self, predictions: Sequence[Mapping[str, Any]], sizes: Sequence[Sequence[int]]
    ) -> None:
        """What was predicted, of records of so many tokens and unknown ones."""
        self.tokens_in = sum(size[0] for size in sizes)
        if self.records is not None:
            found = (item.get("prediction") for item in predictions)
            self.answers = {place: one for place, one in enumerate(found) if one is not None}
            scores = next((one["scores"] for one in predictions if "scores" in one), None)
            self.classes = frozenset(scores) if isinstance(scores, Mapping) else None
        pairs = list(zip(predictions, sizes, strict=True))[:LOOKED_AT]
        self.looks += [look_at_prediction(*pair) for pair in pairs]


asked: ContextVar[Asked] = ContextVar("asked")
"""Of the request that is under way: set before its route is called."""


def now_asked() -> Asked:
    """The request that is under way; one of nobody's, where there is none."""
    return asked.get(None) or Asked()
