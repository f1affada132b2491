"""Prompts and answers as they are kept: a text, one message, or a list of them, as JSON.

A conversation becomes a text by the tokeniser's chat template, where it has one, and an answer to
it what the template writes behind what makes the assistant begin; else what is said stands there
plainly, a line a message. A special token in what somebody says would let a text pretend to be a
turn: with a template such a record is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dray.tasks.parts.chat import (
    Conversation,
    Message,
    NoConversation,
    check_words,
    read_message,
    render,
)

if TYPE_CHECKING:
    from dray.tasks.rows import Tools


class NoAnswer(Exception):
    """A record is no prompt with answers; the message says why in a few words."""


def write_prompt(value: str, answers: Sequence[str], tools: Tools) -> tuple[str, list[str]]:
    """A prompt and its answers, each as JSON, as texts. Raises NoAnswer."""
    prompt, *own = (_read(text) for text in (value, *answers))
    if tools.chat_template is not None:
        _check_words([prompt, *own], tools)
    if isinstance(prompt, str) or tools.chat_template is None:
        plain = [_plain(answer) for answer in own]
        return prompt if isinstance(prompt, str) else _plain(prompt) + "\n", plain
    asked = _render(prompt, tools, asks=True)
    found = []
    for answer in own:
        said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        whole = _render([*prompt, *said], tools)
        if not whole.startswith(asked):
            raise NoAnswer("an answer that the chat template writes otherwise when it asks")
        found.append(_without_end(whole[len(asked) :], tools) if any(map(_says, said)) else "")
    bos = tools.roles.get("bos_token")
    return asked.removeprefix(bos) if bos and tools.prefix else asked, found


def _says(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


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
    try:
        return [read_message(item) for item in listed]
    except NoConversation as error:
        raise NoAnswer(str(error)) from error


def _plain(found: str | list[Message]) -> str:
    if isinstance(found, str):
        return found
    if any(message.get("tool_calls") for message in found):
        raise NoAnswer("a call of a tool where no chat template writes it")
    return "\n".join(message["content"] for message in found)


def _check_words(found: Sequence[str | list[Message]], tools: Tools) -> None:
    for said in found:
        messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
        try:
            check_words(Conversation(tuple(messages)), tools.special)
        except NoConversation as error:
            raise NoAnswer(str(error)) from error


def _render(messages: list[Message], tools: Tools, *, asks: bool = False) -> str:
    try:
        return render(Conversation(tuple(messages)), tools, asks=asks)
    except NoConversation as error:
        raise NoAnswer(str(error)) from error
