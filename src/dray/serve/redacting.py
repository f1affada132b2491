"""Personal data in what is asked, before a model sees it, and in the bodies that a log keeps.

A log's bodies are JSON that is taken apart, since escapes hide an address and the pieces of a
stream have parts of one each. What cannot be taken apart is not kept at all.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

from dray.corpus.redacting import Redactor, told_counts
from dray.processes.streams import make_json
from dray.serve.refusals import Refusal

SEEN = ("prompt", "messages", "input", "records", "tools", "stop", "text", "comment")
"""Fields of bodies that a model sees something of, or that feedback keeps."""
UNSEEN = "[withheld: no JSON, or too long]"
"""In the place of a body that cannot be looked through."""


async def redact_asked(tree: dict[str, Any], redactor: Redactor) -> Counter[str]:
    """Take personal data out of a body, in place, and tell how much of each kind there was. Raises
    Refusal where the service wants such requests refused, and for a prompt of ids, which nobody
    can look through."""
    given = {name: tree[name] for name in SEEN if name in tree}
    if _is_ids(given.get("prompt")):
        what = "a prompt of token ids cannot be looked through for personal data; send it as text"
        raise Refusal(400, what, param="prompt", code="not_redactable")
    found, counts = await asyncio.to_thread(redactor.redact_tree, given)
    if counts and redactor.drops:
        what = f"the request holds {told_counts(counts)}; leave them out"
        raise Refusal(400, what, code="personal_data")
    tree |= found
    return counts


def redact_bodies(line: dict[str, Any], redactor: Redactor) -> dict[str, Any]:
    """A line of the log whose bodies, where it has some, are without personal data: masked, or
    pseudonyms, also where a service refuses requests that hold some."""
    there = [name for name in ("request", "answer") if name in line]
    return line | {name: _redact_body(line[name], redactor) for name in there}


def _redact_body(text: str, redactor: Redactor) -> str:
    if not text:
        return text
    try:
        tree = _streamed(text) if text.startswith("data:") else json.loads(text)
        found, _ = redactor.redact_tree(_without_pieces(tree))
        return make_json(found)
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
        return UNSEEN


def _streamed(text: str) -> dict[str, Any]:
    """What a stream's pieces say together, of each choice."""
    said: dict[int, str] = {}
    others: list[Any] = []
    for line in text.splitlines():
        content = line.removeprefix("data:").strip()
        if not content or content == "[DONE]":
            continue
        piece = json.loads(content)
        if "choices" not in piece:
            others.append(piece)
        for choice in piece.get("choices", ()):
            words = choice.get("text") or choice.get("delta", {}).get("content") or ""
            said[choice["index"]] = said.get(choice["index"], "") + words
    streamed = [{"index": index, "text": words} for index, words in sorted(said.items())]
    return {"streamed": streamed, **({"others": others} if others else {})}


def _without_pieces(value: Any) -> Any:
    """Without what tells a text in pieces: tokens beside their log-probabilities, and their ids."""
    if isinstance(value, dict):
        return {
            name: f"[withheld: {len(item)} ids]"
            if name == "prompt" and _is_ids(item)
            else _without_pieces(item)
            for name, item in value.items()
            if name != "logprobs" or isinstance(item, (int, bool))
        }
    return [_without_pieces(item) for item in value] if isinstance(value, list) else value


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and any(not isinstance(item, str) for item in prompt)
