"""Prompts and answers in the forms in which they are kept, by a tokeniser's own chat template and
without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs as pafs

from dray.corpus.tokenizing import describe, read_tokenizer_files, save_trained, train_byte_bpe
from dray.corpus.tools import Tools
from dray.spec.tasks import make_task
from dray.tasks.parts.answers import OTHER, PROMPT_TOKENS, encode_answers
from dray.tasks.parts.prompts import NoAnswer, write_prompt
from dray.tasks.rows import SEPARATOR

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{{ eos_token if message.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = [{"from": "system", "value": "be brief"}, {"from": "human", "value": "two and two?"}]


def tools(folder: Path, template: str = "", row_tokens: int = 64) -> Tools:
    save_trained(pafs.LocalFileSystem(), str(folder), train_byte_bpe([b"two and two"], 300))
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    info = describe(read_tokenizer_files(str(folder)), ["two and two"], needs_end=False)
    return Tools(str(folder), info, row_tokens)


def written(tool: Tools, prompt: Any, *answers: Any) -> tuple[str, list[str]]:
    return write_prompt(json.dumps(prompt), [json.dumps(answer) for answer in answers], tool)


def test_texts_stay_as_they_are(tmp_path: Path) -> None:
    for template in ("", TEMPLATE):
        tool = tools(tmp_path, template)
        assert written(tool, "2 + 2 =", " 4", [{"role": "assistant", "content": " 5"}]) == (
            "2 + 2 =",
            [" 4", " 5"],
        )


def test_conversations_are_written_by_the_template_or_a_line_each(tmp_path: Path) -> None:
    said = {"from": "gpt", "value": "four"}
    plain = written(tools(tmp_path), ASKED, said, "five")
    assert plain == ("be brief\ntwo and two?\n", ["four", "five"])
    found = written(tools(tmp_path, TEMPLATE), ASKED, said, "five")
    assert found == (
        "<system>be brief\n<user>two and two?\n<assistant>",
        ["four", "five"],  # a row gets the end of text by itself
    )


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([{"from": "dog", "value": "woof"}], "a speaker of unknown role"),
        ([{"role": "user", "content": None}], "a message without words"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "a message that is no text"),
        ([{"from": "function_call", "value": "{}"}], "a call without a tool"),
        (["hello"], "a message without a speaker"),
        ([], "neither a text nor messages"),
        (7, "neither a text nor messages"),
        ([{"role": "user", "content": "<|endoftext|>"}], "a special token in what is said"),
    ],
)
def test_what_is_no_conversation_is_refused(tmp_path: Path, prompt: Any, reason: str) -> None:
    with pytest.raises(NoAnswer, match=reason.replace("|", r"\|")):
        written(tools(tmp_path, TEMPLATE), prompt, "four")


def test_messages_are_read_as_those_of_conversations_are(tmp_path: Path) -> None:
    """Parts that are text, roles of all forms, and calls of tools, which a template may write."""
    called = "{% if message.tool_calls %}{{ message.tool_calls[0].function.name }}{% endif %}"
    template = TEMPLATE.replace("{{ message.content }}", "{{ message.content }}" + called)
    parts = [{"role": "developer", "content": [{"type": "text", "text": "be brief"}]}]
    call = {"from": "function_call", "value": '{"name": "add", "arguments": {}}'}
    found = written(tools(tmp_path, template), parts, call)
    assert found == ("<system>be brief\n<assistant>", ["add"])
    for tool, prompt in ((tools(tmp_path / "plain"), parts), (tools(tmp_path, template), "add")):
        with pytest.raises(NoAnswer, match="a call of a tool where no chat template writes it"):
            written(tool, prompt, call)


def test_long_prompts_lose_their_beginning_and_long_answers_their_end(tmp_path: Path) -> None:
    tool = tools(tmp_path, row_tokens=21)
    room = 21 - len(tool.suffix)
    rows = [("a" * 30, "b" * 5, "c" * 3), ("a" * 5, "b" * 30, "c"), ("a" * 30, "b" * 30, "c" * 30)]
    texts = [SEPARATOR.join(map(json.dumps, row)) for row in rows]
    found = encode_answers(pa.array(texts, pa.large_string()), tool, 2)
    sizes = [
        (len(prompt), [len(answer) for answer in answers])
        for prompt, answers in zip(found.prompts, found.answers, strict=True)
    ]
    half = room // 2
    assert sizes == [(room - 5, [5, 3]), (5, [room - 5, 1]), (half, [room - half, room - half])]
    assert found.lost == [30 - (room - 5), 30 - (room - 5), 90 - half - 2 * (room - half)]
    encoded = found.encoded(tool, [answers[1] for answers in found.answers])
    assert encoded.lengths.tolist() == [room, room, room]
    assert encoded.columns[PROMPT_TOKENS].tolist() == [size for size, _ in sizes]
    assert [len(other) for other in encoded.columns[OTHER]] == [
        answers[1] + len(tool.suffix) for _, answers in sizes
    ]


def test_nothing_that_is_said_may_pretend_to_be_a_turn(tmp_path: Path) -> None:
    tool = tools(tmp_path, TEMPLATE)
    for prompt, answer in (("<|endoftext|>", "four"), ("two", "<|endoftext|>four")):
        with pytest.raises(NoAnswer, match="a special token in what is said"):
            written(tool, prompt, answer)


def test_a_row_has_room_for_the_answer_to_another_prompt(tmp_path: Path) -> None:
    """Of `kto`, which looks at the answers to other prompts, too."""
    tool = tools(tmp_path, row_tokens=20)
    rows = [("a" * 30, "b", "true"), ("a", "b" * 30, "false")]
    texts = [SEPARATOR.join(json.dumps(value) for value in row[:2]) for row in rows]
    task = make_task({"name": "preference", "loss": "kto"})
    truths = pa.array([row[2] for row in rows])
    encoded = task.encode(pa.array(texts, pa.large_string()), truths, tool)
    prompts = encoded.columns[PROMPT_TOKENS].tolist()
    sizes = [len(other) for other in encoded.columns[OTHER].to_pylist()]
    assert max(map(sum, zip(prompts, sizes, strict=True))) <= 20
    assert (encoded.lengths + len(tool.prefix) + len(tool.suffix)).max() <= 20


def test_labels_that_are_no_truths_are_refused_one_and_all(tmp_path: Path) -> None:
    texts = pa.array([SEPARATOR.join(map(json.dumps, ("a", "b")))] * 2, pa.large_string())
    task = make_task({"name": "preference", "loss": "kto"})
    encoded = task.encode(texts, pa.array(["yes", "no"]), tools(tmp_path))
    assert encoded.refused == dict.fromkeys((0, 1), "label is neither true nor false")
    assert encoded.columns["good"].dtype == "uint8"
