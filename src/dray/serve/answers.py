"""The documents of models that write, in OpenAI's forms: whole answers, and their pieces.

`completion_answer` and `chat_answer` know one request each: what is told once, and whether usage
and log-probabilities are wanted.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from dray.serve.events import Event
from dray.serve.schemas import ChatRequest, CompletionRequest, Sampled

Document = dict[str, Any]
Writes = Callable[[Any], "CompletionAnswer | ChatAnswer"]


class _Answer:
    """What both have in common."""

    kind: str
    prefix: str
    whole_object: str
    piece_object: str

    def __init__(self, request: Sampled) -> None:
        self._request = request
        self._told = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": request.model,
        }
        self._num_prompt = 0

    @property
    def _wants_usage(self) -> bool:
        options = self._request.stream_options
        return options is not None and options.include_usage

    def whole(self, found: Event) -> Document:
        """The document of a whole answer."""
        choices = [self._choice(place, choice) for place, choice in enumerate(found["choices"])]
        usage = _usage(*found["usage"])
        return {**self._told, "object": self.whole_object, "choices": choices, "usage": usage}

    def begin(self, event: Event) -> list[Document]:
        """What is given out when an answer is taken in."""
        return self.piece(event)

    def piece(self, event: Event) -> list[Document]:
        """The documents of an event, if it has any."""
        found = [self._choices(self._pieces(*piece)) for piece in event.get("pieces", ())]
        if "usage" in event and self._wants_usage:
            found.append({**self._choices([]), "usage": _usage(*event["usage"])})
        return found

    def _choices(self, choices: list[Document]) -> Document:
        told = {**self._told, "object": self.piece_object, "choices": choices}
        return told | ({"usage": None} if self._wants_usage else {})

    def _choice(self, place: int, choice: Event) -> Document:
        raise NotImplementedError

    def _pieces(self, place: int, text: str, token: Any, finish: str | None) -> list[Document]:
        raise NotImplementedError


class CompletionAnswer(_Answer):
    """Of /v1/completions."""

    kind, prefix = "completions", "cmpl"
    whole_object = piece_object = "text_completion"

    def __init__(self, request: CompletionRequest) -> None:
        super().__init__(request)
        self._logprobs = request.logprobs is not None
        self._lengths: dict[int, int] = {}

    def _choice(self, place: int, choice: Event) -> Document:
        return {
            "index": place,
            "text": choice["text"],
            "logprobs": self._table(place, choice["tokens"]),
            "finish_reason": choice["finish"],
        }

    def _pieces(self, place: int, text: str, token: Any, finish: str | None) -> list[Document]:
        tokens = [] if token is None else [token]
        return [
            {
                "index": place,
                "text": text,
                "logprobs": self._table(place, tokens) if tokens else None,
                "finish_reason": finish,
            }
        ]

    def _table(self, place: int, tokens: Sequence[Any]) -> Document | None:
        if not self._logprobs:
            return None
        offsets = []
        for text, _, _ in tokens:
            offsets.append(self._lengths.get(place, 0))
            self._lengths[place] = offsets[-1] + len(text)
        return {
            "tokens": [text for text, _, _ in tokens],
            "token_logprobs": [logprob for _, logprob, _ in tokens],
            "top_logprobs": [dict(top) for _, _, top in tokens],
            "text_offset": offsets,
        }


class ChatAnswer(_Answer):
    """Of /v1/chat/completions."""

    kind, prefix = "chat", "chatcmpl"
    whole_object, piece_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, request: ChatRequest) -> None:
        super().__init__(request)
        self._num_choices = request.n or 1

    def begin(self, event: Event) -> list[Document]:
        """Who speaks, of each choice, before what is said."""
        speaker = {"role": "assistant", "content": ""}
        first = [
            self._choices(
                [{"index": place, "delta": speaker, "logprobs": None, "finish_reason": None}]
            )
            for place in range(self._num_choices)
        ]
        return [*first, *self.piece(event)]

    def _choice(self, place: int, choice: Event) -> Document:
        return {
            "index": place,
            "message": {"role": "assistant", "content": choice["text"], "refusal": None},
            "logprobs": _chat_table(choice["tokens"]),
            "finish_reason": choice["finish"],
        }

    def _pieces(self, place: int, text: str, token: Any, finish: str | None) -> list[Document]:
        return [
            {
                "index": place,
                "delta": {"content": text} if text or finish is None else {},
                "logprobs": _chat_table([] if token is None else [token]),
                "finish_reason": finish,
            }
        ]


def _chat_table(tokens: Sequence[Any]) -> Document | None:
    if not tokens:
        return None

    def entry(text: str, logprob: float) -> Document:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {
        "content": [
            {**entry(text, logprob), "top_logprobs": [entry(*item) for item in top]}
            for text, logprob, top in tokens
        ],
        "refusal": None,
    }


def _usage(num_prompt: int, num_written: int) -> Document:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_written,
        "total_tokens": num_prompt + num_written,
    }


def completion_answer(request: CompletionRequest) -> CompletionAnswer:
    return CompletionAnswer(request)


def chat_answer(request: ChatRequest) -> ChatAnswer:
    return ChatAnswer(request)
