"""Conversations: read from the forms in which they are kept, written as text by a chat template,
and encoded with a mark at each token of an answer.

Three forms are known by their keys: OpenAI's (`messages`), ShareGPT's (`conversations` of `from`
and `value`) and Alpaca's (`instruction`, `input`, `output`, `history`). What is no conversation is
refused by reason, as is one with a special token in what somebody says: a template's own marks
would let a text pretend to be a turn. A template is never cut open: of a conversation that is
longer than a row whole exchanges are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from dray.errors import caught
from dray.tasks.rows import Encoded

if TYPE_CHECKING:
    from dray.tasks.rows import Tools

Message = dict[str, Any]
Drop = Literal["end", "middle"]
Span = tuple[int, int]

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""What speakers are called elsewhere."""
_CALLS = ("function_call", "tool_call")
"""Speakers of ShareGPT's whose words are a call of a tool."""
_KEPT = ("name", "tool_call_id", "reasoning_content")


class NoConversation(Exception):
    """A record is none, or none that can be learnt; the message says why in a few words."""


@dataclass(frozen=True)
class Conversation:
    """What was said, in OpenAI's form."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of what the assistant may call."""

    @property
    def prompt(self) -> Conversation:
        """Up to where the assistant answers last."""
        end = len(self.messages)
        while end and self.messages[end - 1]["role"] == "assistant":
            end -= 1
        return Conversation(self.messages[:end], self.tools)

    def shortened(self, drop: Drop | Literal["start"]) -> list[Conversation]:
        """The same with one exchange less, then two less and so on. An exchange is what a user says
        with all that follows it. `end`: the last ones go; `start`: the first ones; `middle`: those
        after the first, the oldest first. What stands before the first user stays."""
        begins = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if len(begins) < 2:
            return []
        bounds = [*begins, len(self.messages)]
        head = self.messages[: begins[0]]
        parts = [self.messages[bounds[i] : bounds[i + 1]] for i in range(len(begins))]
        found = []
        for left in range(len(parts) - 1, 0, -1):
            last = {"end": 0, "middle": left - 1, "start": left}[drop]
            kept = [*parts[: left - last], *parts[len(parts) - last :]]
            found.append(Conversation(tuple(m for part in (head, *kept) for m in part), self.tools))
        return found


# --- forms ---------------------------------------------------------------------------------------


def read_conversation(record: Any) -> Conversation:
    """The conversation of a record, or of a bare list of messages. Raises NoConversation."""
    if isinstance(record, Sequence) and not isinstance(record, str):
        record = {"messages": record}
    if not isinstance(record, Mapping):
        raise NoConversation("no conversation")
    # Columns of a corpus of several forms are null where a record is of another one.
    if record.get("messages") is not None:
        found = [read_message(item, "role", "content") for item in _listed(record["messages"])]
    elif record.get("conversations") is not None:
        found = [read_message(item, "from", "value") for item in _listed(record["conversations"])]
    elif record.get("instruction") is not None:
        found = _read_alpaca(record)
    else:
        raise NoConversation("no conversation")
    system = record.get("system")
    if system and all(message["role"] != "system" for message in found):
        found.insert(0, {"role": "system", "content": _read_content(system)})
    if all(message["role"] != "user" for message in found):
        raise NoConversation("nobody asks")
    return Conversation(tuple(found), tuple(_read_tools(record.get("tools"))))


def _listed(value: Any) -> Sequence[Any]:
    if isinstance(value, str):  # as a column of csv has them
        value = _parsed(value)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise NoConversation("no conversation")
    return value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise NoConversation("broken JSON in a conversation") from error


def read_message(item: Any, speaker: str = "role", said: str = "content") -> Message:
    """A message in OpenAI's form, from that or from ShareGPT's. Raises NoConversation."""
    if not isinstance(item, Mapping):
        raise NoConversation("a message without a speaker")
    if speaker not in item:  # the two forms are mixed up now and then
        speaker, said = ("role", "content") if "role" in item else ("from", "value")
    role = str(item.get(speaker)).strip().lower()
    if role in _CALLS:
        calls = item.get(said)
        return {"role": "assistant", "content": "", "tool_calls": _read_calls(calls)}
    if role not in _ROLES:
        raise NoConversation("a speaker of unknown role")
    message: Message = {"role": _ROLES[role], "content": _read_content(item.get(said))}
    if calls := item.get("tool_calls"):
        message["tool_calls"] = _read_calls(calls)
    elif item.get(said) is None:
        raise NoConversation("a message without words")
    message |= {name: item[name] for name in _KEPT if item.get(name) is not None}
    return message


def _read_content(value: Any) -> str:
    """Words; of several parts those that are text. Raises NoConversation."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        parts = [part if isinstance(part, Mapping) else {} for part in value]
        if all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
            return "".join(part["text"] for part in parts)
    raise NoConversation("a message that is no text")


def _read_calls(value: Any) -> list[dict[str, Any]]:
    """Calls of tools with their arguments as mappings."""
    calls = _parsed(value) if isinstance(value, str) else value
    found = []
    for call in calls if isinstance(calls, Sequence) else [calls]:
        if not isinstance(call, Mapping):
            raise NoConversation("a call without a tool")
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise NoConversation("a call without a tool")
        arguments = function.get("arguments", {})
        arguments = _parsed(arguments) if isinstance(arguments, str) else arguments
        own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        called = {"name": function["name"], "arguments": arguments}
        found.append({**own, "type": "function", "function": called})
    return found


def _read_tools(value: Any) -> list[Mapping[str, Any]]:
    if not value:
        return []
    tools = _parsed(value) if isinstance(value, str) else value
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise NoConversation("tools that are no schemas")
    return list(tools)


def _read_alpaca(record: Mapping[str, Any]) -> list[Message]:
    found: list[Message] = []
    history = record.get("history") or ()
    history = _parsed(history) if isinstance(history, str) else history
    if not isinstance(history, Sequence):
        raise NoConversation("a history that is no pairs")
    for pair in history:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise NoConversation("a history that is no pairs")
        found += [_said("user", pair[0]), _said("assistant", pair[1])]
    asked = [_read_content(record.get(name)) for name in ("instruction", "input")]
    found.append(_said("user", "\n".join(text for text in asked if text.strip())))
    if record.get("output") is not None:
        found.append(_said("assistant", record["output"]))
    return found


def _said(role: str, content: Any) -> Message:
    return {"role": role, "content": _read_content(content)}


def said(record: Any) -> str:
    """All words of a conversation, without a template; none of what is no conversation."""
    try:
        messages = read_conversation(record).messages
    except NoConversation:
        return ""
    return "\n".join(message["content"] for message in messages)


# --- text ----------------------------------------------------------------------------------------


def render(conversation: Conversation, tools: Tools, *, asks: bool = False) -> str:
    """A conversation as text by the tokeniser's chat template, as transformers'
    `apply_chat_template` writes it; `asks`: with what makes the assistant begin. Raises
    NoConversation where the template refuses it."""
    return _render(conversation, tools, asks=asks)[0]


def _render(
    conversation: Conversation, tools: Tools, *, asks: bool = False, marks: bool = False
) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    found, error = caught(  # a template is a program, and may end in any way
        lambda: render_jinja_template(
            [list(conversation.messages)],
            tools=list(conversation.tools) or None,
            chat_template=tools.chat_template,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=asks,
            **tools.roles,
        )
    )
    if found is None:
        raise NoConversation("refused by the chat template") from error
    texts, spans = found
    return texts[0], [(start, stop) for start, stop in (spans[0] if marks else ())]


def find_answers(conversation: Conversation, text: str, tools: Tools) -> list[Span]:
    """Where the assistant's answers lie in the text of a conversation (characters), each with what
    ends it. The template's own `generation` marks say so; without them an answer is what it writes
    behind what makes the assistant begin. Raises NoConversation where it is not."""
    if "generation" in _statements(str(tools.chat_template)):
        return _render(conversation, tools, marks=True)[1]
    spans: list[Span] = []
    for place, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        before, after = (
            Conversation(conversation.messages[:end], conversation.tools)
            for end in (place, place + 1)
        )
        asked, answered = render(before, tools, asks=True), render(after, tools)
        if not (text.startswith(answered) and answered.startswith(asked)):
            raise NoConversation("an answer that the template writes otherwise when it asks")
        # The newline behind a special token that ends a turn belongs to none.
        trimmed = answered.rstrip()
        ends = any(trimmed.endswith(mark) for mark in tools.special if mark)
        spans.append((len(asked), max(len(asked), len(trimmed if ends else answered))))
    return spans


def _statements(template: str) -> list[str]:
    """The first words of a template's statements."""
    pieces = template.split("{%")[1:]
    words = (piece.split("%}")[0].strip("-+ \n").split() for piece in pieces)
    return [word[0] for word in words if word]


def check_words(conversation: Conversation, special: frozenset[str]) -> None:
    """Raises NoConversation for a special token in what somebody says or in a tool's schema."""
    schemas = json.dumps(conversation.tools, ensure_ascii=False)
    if holds_special(schemas, special):
        raise NoConversation("a special token in a tool")
    for message in conversation.messages:
        calls = json.dumps(message.get("tool_calls", ""), ensure_ascii=False)
        words = message["content"] + calls + str(message.get("reasoning_content", ""))
        if holds_special(words, special):
            raise NoConversation("a special token in what is said")


def holds_special(text: str, special: frozenset[str]) -> bool:
    """Whether a text has one of the special tokens in it, by which it could pretend to be a
    turn."""
    return any(mark in text for mark in special if mark)


# --- tokens --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """The tokens of a conversation, and which of them are answers."""

    ids: list[int]
    taught: list[bool]


def encode_conversations(
    texts: pa.Array, tools: Tools, *, drop: Drop, answers: bool, room: int
) -> Encoded:
    """Conversations, as JSON, as tokens of at most `room` each: `begins` is 1 at the first token of
    each, `taught` at those of an answer. Without `answers` they end where the assistant is to
    begin."""
    pieces: list[_Piece] = []
    lost: list[int] = []
    records: list[int] = []
    refused: dict[int, str] = {}
    for place, text in enumerate(texts.to_pylist()):
        try:
            piece, num_lost = _encode(
                read_conversation(json.loads(text)), tools, drop=drop, answers=answers, room=room
            )
        except NoConversation as error:
            refused[place] = str(error)
            continue
        pieces.append(piece)
        lost.append(num_lost)
        records.append(place)
    lengths = np.array([len(piece.ids) for piece in pieces], np.int64)
    begins = np.zeros(int(lengths.sum()), np.uint8)
    begins[(np.cumsum(lengths) - lengths)[lengths > 0]] = 1
    return Encoded(
        np.array([token for piece in pieces for token in piece.ids], tools.dtype),
        lengths,
        {
            "begins": begins,
            "taught": np.array([mark for piece in pieces for mark in piece.taught], np.uint8),
        },
        records=np.array(records, np.int64),
        num_lost=np.array(lost, np.int64),
        refused=refused,
    )


def _encode(
    conversation: Conversation, tools: Tools, *, drop: Drop, answers: bool, room: int
) -> tuple[_Piece, int]:
    """A conversation's tokens, and how many were lost with exchanges that there was no room for.
    Raises NoConversation."""
    check_words(conversation, tools.special)
    if not answers:
        conversation = conversation.prompt
    whole = _encode_whole(conversation, tools, answers=answers)
    if len(whole.ids) <= room:
        return whole, 0
    for shorter in conversation.shortened(drop if answers else "start"):
        piece = _encode_whole(shorter, tools, answers=answers)
        if len(piece.ids) <= room:
            return piece, len(whole.ids) - len(piece.ids)
    raise NoConversation("longer than a row")


def _encode_whole(conversation: Conversation, tools: Tools, *, answers: bool) -> _Piece:
    text = render(conversation, tools, asks=not answers)
    spans = find_answers(conversation, text, tools) if answers else []
    if answers and not spans:
        raise NoConversation("nobody answers")
    if answers and any(_is_empty(message) for message in conversation.messages):
        raise NoConversation("empty answer")
    ((ids, starts),) = tools.encode_words([text])
    taught = np.zeros(len(ids), bool)
    places = np.array(starts, np.int64)
    for start, stop in spans:
        taught |= (places >= start) & (places < stop)
    if answers and not taught.any():
        raise NoConversation("no answer that the chat template writes")
    return _Piece(ids, taught.tolist())


def _is_empty(message: Message) -> bool:
    """Whether it is an answer without words and without calls."""
    said = message["content"].strip() or message.get("tool_calls")
    return message["role"] == "assistant" and not said


def encode_prompt(text: str, tools: Tools) -> list[int]:
    """The ids by which an assistant is asked: a text is what a user says, a JSON object or list a
    conversation. Raises NoConversation."""
    conversation = Conversation(({"role": "user", "content": text},))
    if text.lstrip()[:1] in ("{", "["):
        given: Any = None
        with suppress(ValueError):  # words that begin with a bracket
            given = json.loads(text)
        if isinstance(given, Mapping) or (
            isinstance(given, Sequence) and any(isinstance(item, Mapping) for item in given)
        ):
            return encode_conversation(given, tools)
    return _encode_asked(conversation, tools)


def encode_conversation(given: Any, tools: Tools) -> list[int]:
    """The ids by which an assistant is asked to go on with a conversation, in any of the known
    forms. Raises NoConversation."""
    return _encode_asked(read_conversation(given).prompt, tools)


def _encode_asked(conversation: Conversation, tools: Tools) -> list[int]:
    check_words(conversation, tools.special)
    return _encode_whole(conversation, tools, answers=False).ids
