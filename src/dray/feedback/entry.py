"""One answer of a served model with what somebody said of it, and the record that is learnt from
that.

It holds what was asked and answered as they were: personal data, if there was any. Refuses an entry
that says nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Rating = Literal["up", "down"]
Label = str | bool | int | float | tuple[str, ...]
ID = r"^[0-9a-f]{16}-[0-9]{1,6}$"
CHAT, COMPLETIONS = "chat", "completions"


class Entry(BaseModel):
    """What was said of an answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, Field(pattern=ID)]
    """Of the request, and the place of the answer in it: `0123456789abcdef-0`."""
    at: float
    """When it was said, in seconds since 1970."""
    model: str
    """That was asked, by the name it is served by."""
    version: int | None = None
    """That answered."""
    key: str | None = None
    """The name of the key that asked, where it has one of its own."""
    route: str
    """`chat`, `completions`, or that of a prediction: `classify`, `extract`, `predict`."""
    asked: dict[str, Any]
    """A record with the model's fields; `messages` of a chat, `prompt` of a completion."""
    answered: Any
    """The prediction, or the text."""
    rating: Rating | None = None
    label: Label | None = None
    """What the prediction should have been."""
    text: str | None = None
    """What should have been written."""
    comment: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.rating is None and self.label is None and self.text is None:
            raise ValueError("a rating, a label or a text is wanted")
        writes = self.route in (CHAT, COMPLETIONS)
        if writes and self.label is not None:
            raise ValueError("a label is of a prediction, and this is a text that was written")
        if not writes and self.text is not None:
            raise ValueError("a text is of what was written, and this is a prediction")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of what was asked: the same question is on one side of a split."""
        return hashlib.sha256(_json(self.asked).encode()).hexdigest()

    @property
    def is_right(self) -> bool:
        """Whether the answer was right: a thumb up, and nothing else in its place."""
        right = self.label if self.text is None else self.text
        if right is None:
            return self.rating == "up"
        return bool(right == (tuple(self.answered) if isinstance(right, tuple) else self.answered))

    def record(self) -> dict[str, Any] | None:
        """What is learnt of it: what was asked with the answer that is right. None where nobody
        said which that is: it was found wrong, and no other one was given."""
        right = self.label if self.text is None else self.text
        if right is None and self.rating == "up":
            right = self.answered
        if right is None or right == "":
            return None
        if self.route == CHAT:
            answer = {"role": "assistant", "content": right}
            return {"messages": [*self.asked["messages"], answer]}
        if self.route == COMPLETIONS:
            return {"text": f"{self.asked['prompt']}{right}"}
        return {**self.asked, "label": right}

    def judgement(self) -> dict[str, Any] | None:
        """It as a record of `preference` with loss: kto: a prompt, a completion, and whether that
        was good. None for predictions, and without a rating."""
        if self.route not in (CHAT, COMPLETIONS) or self.rating is None:
            return None
        prompt = self.asked["messages"] if self.route == CHAT else self.asked["prompt"]
        return {"prompt": prompt, "completion": self.answered, "label": self.rating == "up"}


def make_line(entry: Entry, record: Mapping[str, Any]) -> str:
    """A line of training data: the record, and whose it is."""
    return _json({"feedback": entry.id, **record}) + "\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
