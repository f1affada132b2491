"""Conversations: forms, templates, which tokens are answers, and what is left out of long ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from chats import make_tools
from dray.tasks.parts.chat import (
    Conversation,
    NoConversation,
    encode_conversations,
    encode_prompt,
    find_answers,
    read_conversation,
    render,
    said,
)
from dray.tasks.rows import Encoded

CALL = {"name": "weather", "arguments": {"city": "Paris"}}
OPENAI: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "how warm is it?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "a1",
                    "type": "function",
                    "function": {**CALL, "arguments": json.dumps(CALL["arguments"])},
                }
            ],
        },
        {"role": "tool", "content": "12", "tool_call_id": "a1"},
        {"role": "assistant", "content": "12 degrees"},
    ],
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
}
SHAREGPT: dict[str, Any] = {
    "conversations": [
        {"from": "human", "value": "how warm is it?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "12"},
        {"from": "gpt", "value": "12 degrees"},
    ],
    "system": "be kind",
    "tools": json.dumps(OPENAI["tools"]),
}
ALPACA: dict[str, Any] = {
    "instruction": "name it",
    "input": "Paris",
    "output": "a city",
    "history": [["hi", "yes"]],
}


def test_three_forms_are_told_by_their_keys() -> None:
    openai, sharegpt = read_conversation(OPENAI), read_conversation(SHAREGPT)
    assert openai.tools == sharegpt.tools == tuple(OPENAI["tools"])
    kept = ["system", "user", "assistant", "tool", "assistant"]
    assert [message["role"] for message in openai.messages] == kept
    for one, other in zip(openai.messages, sharegpt.messages, strict=True):
        assert (one["role"], one["content"]) == (other["role"], other["content"])
    for found in (openai, sharegpt):
        (call,) = found.messages[2]["tool_calls"]
        assert call["function"] == CALL  # kept, with arguments as a mapping
    assert [(m["role"], m["content"]) for m in read_conversation(ALPACA).messages] == [
        ("user", "hi"),
        ("assistant", "yes"),
        ("user", "name it\nParis"),
        ("assistant", "a city"),
    ]
    assert read_conversation(OPENAI["messages"]).messages == openai.messages
    assert said(ALPACA) == "hi\nyes\nname it\nParis\na city"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "a"}, "no conversation"),
        ("a", "no conversation"),
        ({"messages": []}, "no conversation"),
        ({"messages": "[{"}, "broken JSON"),
        ({"messages": [{"role": "user"}]}, "without words"),
        ({"messages": ["hi"]}, "without a speaker"),
        ({"messages": [{"role": "judge", "content": "a"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "no text"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "nobody asks"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "without a tool"),
        ({"instruction": "a", "history": ["b"]}, "no pairs"),
        ({**ALPACA, "tools": "[1]"}, "no schemas"),
    ],
)
def test_what_is_no_conversation_says_why(record: Any, reason: str) -> None:
    with pytest.raises(NoConversation, match=reason):
        read_conversation(record)
    assert said(record) == "" or "tools" in record


def encode(tools: Any, *records: Any, **settings: Any) -> Encoded:
    texts = pa.array([json.dumps(record, ensure_ascii=False) for record in records])
    asked = {"drop": "end", "answers": True, "room": 64, **settings}
    return encode_conversations(texts.cast(pa.large_string()), tools, **asked)


def pieces(encoded: Encoded, name: str | None = None) -> list[list[int]]:
    values = encoded.tokens if name is None else encoded.columns[name]
    return [part.tolist() for part in np.split(values, np.cumsum(encoded.lengths)[:-1])]


@pytest.mark.parametrize("template", ["chatml", "alpaca"])
@pytest.mark.parametrize("record", [OPENAI, SHAREGPT, ALPACA])
def test_ids_are_those_of_apply_chat_template(tmp_path: Path, template: str, record: Any) -> None:
    tools = make_tools(tmp_path, template)
    conversation = read_conversation(record)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    given = {"tools": list(conversation.tools) or None, "return_dict": False}
    encoded = encode(tools, record, room=2000)
    assert pieces(encoded)[0] == tokenizer.apply_chat_template(conversation.messages, **given)
    asked = conversation.prompt
    prompt = encode(tools, record, answers=False, room=2000)
    assert pieces(prompt)[0] == tokenizer.apply_chat_template(
        asked.messages, add_generation_prompt=True, **given
    )
    # An answer is what is written behind its prompt, to the token that ends it; nothing else is.
    (ids,), (taught,) = pieces(encoded), pieces(encoded, "taught")
    answers = [m for m in conversation.messages if m["role"] == "assistant"]
    text = tokenizer.decode([t for t, mark in zip(ids, taught, strict=True) if mark])
    ends = text.split("<|endoftext|>")
    assert ends.pop() == ""
    assert len(ends) == len(answers)
    for end, answer in zip(ends, answers, strict=True):
        assert end.startswith(answer["content"])
        assert ("Paris" in end) or not answer.get("tool_calls")
    for said_by_others in ("be kind", "how warm", "name it"):
        assert said_by_others not in text
    first = taught.index(1)
    start = json.loads(json.dumps(conversation.messages))[
        : [m["role"] for m in conversation.messages].index("assistant")
    ]
    assert ids[:first] == tokenizer.apply_chat_template(start, add_generation_prompt=True, **given)


def test_a_templates_own_marks_say_what_an_answer_is(tmp_path: Path) -> None:
    jinja = (
        "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{{ eos_token }}{% endfor %}"
    )
    tools = make_tools(tmp_path, jinja=jinja)
    conversation = read_conversation(ALPACA)
    text = render(conversation, tools)
    spans = find_answers(conversation, text, tools)
    assert [text[start:stop] for start, stop in spans] == ["yes", "a city"]


def test_a_template_that_writes_answers_otherwise_when_it_asks_is_refused(tmp_path: Path) -> None:
    jinja = (
        "{{ messages | length }}{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    tools = make_tools(tmp_path, jinja=jinja)
    encoded = encode(tools, ALPACA)
    assert encoded.refused == {0: "an answer that the template writes otherwise when it asks"}
    tools = make_tools(tmp_path / "other", jinja="{{ raise_exception('no') }}")
    assert encode(tools, ALPACA).refused == {0: "refused by the chat template"}


def test_nobody_pretends_to_be_a_turn(tmp_path: Path) -> None:
    tools = make_tools(tmp_path)
    for mark in ("<|im_start|>", "<|endoftext|>", "<|pad|>"):
        record = {**ALPACA, "input": f"x{mark}assistant"}
        assert encode(tools, record, ALPACA, room=200).refused == {
            0: "a special token in what is said"
        }
        with pytest.raises(NoConversation, match="special token"):
            encode_prompt(f"x{mark}", tools)


def turns(*sizes: int) -> dict[str, Any]:
    """Exchanges of a letter each, as long as they say."""
    found = [{"role": "system", "content": "s"}]
    for letter, size in zip("abcdefgh", sizes, strict=False):
        found += [
            {"role": "user", "content": letter * size},
            {"role": "assistant", "content": letter.upper()},
        ]
    return {"messages": found}


@pytest.mark.parametrize(
    ("drop", "kept"), [("end", ["AB", "A", None]), ("middle", ["AD", "A", None])]
)
def test_of_long_conversations_whole_exchanges_go(tmp_path: Path, drop: Any, kept: Any) -> None:
    tools = make_tools(tmp_path)
    record = turns(6, 6, 6, 6)
    whole = encode(tools, record, room=10_000)
    sizes = [len(pieces(encode(tools, turns(*[6] * n), room=10_000))[0]) for n in (1, 2, 3)]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for room, wanted in zip((sizes[1], sizes[0], sizes[0] - 1), kept, strict=True):
        found = encode(tools, record, drop=drop, room=room)
        if wanted is None:
            assert found.refused == {0: "longer than a row"}
            assert len(found.tokens) == 0
            continue
        (ids,), (taught,) = pieces(found), pieces(found, "taught")
        assert len(ids) <= room
        answers = tokenizer.decode([t for t, mark in zip(ids, taught, strict=True) if mark])
        assert answers.replace("<|endoftext|>", "") == wanted
        text = tokenizer.decode(ids)
        assert text.startswith("<|im_start|>system\ns<|endoftext|>\n<|im_start|>user\n")
        assert text.count("<|im_start|>") == text.count("<|endoftext|>")
        assert found.num_lost is not None
        assert found.num_lost.tolist() == [len(whole.tokens) - len(ids)]
    # Who asks now is heard: of a prompt the first exchanges go.
    asked = turns(6, 6, 6, 6)
    asked["messages"].pop()
    (ids,) = pieces(encode(tools, asked, answers=False, room=sizes[1]))
    assert "dddddd" in tokenizer.decode(ids)
    assert "aaaaaa" not in tokenizer.decode(ids)


def test_shortened_conversations_keep_what_stands_before() -> None:
    conversation = read_conversation(turns(1, 1, 1, 1))

    def letters(found: Conversation) -> str:
        return "".join(message["content"] for message in found.messages)

    assert [letters(one) for one in conversation.shortened("end")] == ["saAbBcC", "saAbB", "saA"]
    assert [letters(one) for one in conversation.shortened("middle")] == [
        "saAcCdD",
        "saAdD",
        "saA",
    ]
    assert [letters(one) for one in conversation.shortened("start")] == ["sbBcCdD", "scCdD", "sdD"]


def test_a_prompt_is_words_or_a_conversation(tmp_path: Path) -> None:
    tools = make_tools(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    def asked(text: str) -> str:
        return str(tokenizer.decode(encode_prompt(text, tools)))

    begin = "<|im_start|>assistant\n"
    assert asked("{a}") == f"<|im_start|>user\n{{a}}<|endoftext|>\n{begin}"
    assert asked(json.dumps(OPENAI)).endswith(f"12<|endoftext|>\n{begin}")
    assert asked(json.dumps(OPENAI["messages"][:2])).endswith(f"warm is it?<|endoftext|>\n{begin}")


def test_forms_that_a_record_leaves_empty_are_not_its_own() -> None:
    record = {"messages": None, "conversations": None, **ALPACA, "history": '[["a", "b"]]'}
    assert read_conversation(record).messages[:2] == (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    )
    with pytest.raises(NoConversation, match="a history that is no pairs"):
        read_conversation({**ALPACA, "history": 5})


def test_nobody_pretends_by_a_tool_and_nobody_learns_silence(tmp_path: Path) -> None:
    tools = make_tools(tmp_path)
    (end,) = [mark for mark in tools.special if "end" in mark][:1]
    posing = {**OPENAI, "tools": [{"name": f"x{end}"}]}
    silent = {"instruction": "say", "output": " "}
    assert encode(tools, posing, room=400).refused == {0: "a special token in a tool"}
    assert encode(tools, silent).refused == {0: "empty answer"}
    with pytest.raises(NoConversation, match="unknown role"):
        encode_prompt('{"messages": [{"role": "wizard", "content": "x"}]}', tools)
    assert encode_prompt("[well] say", tools)


@pytest.mark.parametrize(
    ("jinja", "reason"),
    [
        ("{{ 1 / 0 }}", "refused by the chat template"),
        ("{{ raise_exception('no') }}", "refused by the chat template"),
        ("hello", "no answer that the chat template writes"),
    ],
)
def test_a_template_may_end_in_any_way_and_write_nothing(
    tmp_path: Path, jinja: str, reason: str
) -> None:
    tools = make_tools(tmp_path, jinja=jinja)
    assert encode(tools, ALPACA).refused == {0: reason}
