"""Prompts and answers as they are kept: a text, one message, or a list of them, as JSON.

A conversation becomes a text by the tokeniser's chat template, where it has one, and an answer to
it what the template writes behind what makes the assistant begin; else what is said stands there
plainly, a line a message. A special token in what somebody says would let a text pretend to be a
turn: with a template such a record is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dray.tasks.parts.chat import Conversation, NoConversation, holds_special, render

if TYPE_CHECKING:
    from dray.tasks.rows import Tools

Message = dict[str, str]
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""What speakers are called, in OpenAI's form and in ShareGPT's."""


class NoAnswer(Exception):
    """A record is no prompt with answers; the message says why in a few words."""


def write_prompt(value: str, answers: Sequence[str], tools: Tools) -> tuple[str, list[str]]:
    """A prompt and its answers, each as JSON, as texts. Raises NoAnswer."""
    prompt, own = _read(value), [_read(answer) for answer in answers]
    if tools.chat_template is not None:
        _check_words([_plain(found) for found in (prompt, *own)], tools)
    if isinstance(prompt, str):
        return prompt, [_plain(answer) for answer in own]
    if tools.chat_template is None:
        return _plain(prompt) + "\n", [_plain(answer) for answer in own]
    asked = _render(prompt, tools, asks=True)
    found = []
    for answer in own:
        said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        whole = _render([*prompt, *said], tools)
        if not whole.startswith(asked):
            raise NoAnswer("an answer that the chat template writes otherwise when it asks")
        found.append(_without_end(whole[len(asked) :], tools) if any(map(_words, said)) else "")
    bos = tools.roles.get("bos_token")
    return asked.removeprefix(bos) if bos and tools.prefix else asked, found


def _words(message: Message) -> str:
    return message["content"].strip()


def _without_end(answer: str, tools: Tools) -> str:
    """An answer as a template writes it, without what a row gets behind it in any case, and without
    the newline behind a special token that ends a turn."""
    trimmed = answer.rstrip()
    if not any(trimmed.endswith(mark) for mark in tools.special if mark):
        return answer
    end = tools.roles.get("eos_token")
    return trimmed.removesuffix(end) if end and tools.suffix else trimmed


def _read(value: str) -> str | list[Message]:
    found = json.loads(value)
    if isinstance(found, str):
        return found
    listed = [found] if isinstance(found, Mapping) else found
    if not isinstance(listed, Sequence) or not listed:
        raise NoAnswer("neither a text nor messages")
    return [_read_message(item) for item in listed]


def _read_message(item: Any) -> Message:
    if not isinstance(item, Mapping):
        raise NoAnswer("a message without a speaker")
    speaker, said = ("role", "content") if "role" in item else ("from", "value")
    role, content = _ROLES.get(str(item.get(speaker)).strip().lower()), item.get(said)
    if role is None:
        raise NoAnswer("a speaker of unknown role")
    if not isinstance(content, str):
        raise NoAnswer("a message that is no text")
    return {"role": role, "content": content}


def _plain(found: str | list[Message]) -> str:
    return found if isinstance(found, str) else "\n".join(m["content"] for m in found)


def _check_words(texts: Sequence[str], tools: Tools) -> None:
    if any(holds_special(text, tools.special) for text in texts):
        raise NoAnswer("a special token in what is said")


def _render(messages: list[Message], tools: Tools, *, asks: bool = False) -> str:
    try:
        return render(Conversation(tuple(messages)), tools, asks=asks)
    except NoConversation as error:
        raise NoAnswer(str(error)) from error
