"""What goes from a replica to the gateway of a request that writes, as plain values.

`{"begin": tokens of the prompts, "prompts": [[tokens, unknown ones], …]}` once it is taken in;
`{"pieces": [[choice, text, token, finish], …]}` of its answers, a token only where
log-probabilities are told: `[text, logprob, [[text, logprob], …]]`; `{"usage": [tokens of prompts,
tokens written]}` at its end. In the place of any of them `{"refusal": …}`, which is the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Event = dict[str, Any]


def joined(events: Sequence[Event]) -> Event:
    """A request's events as one: `choices` with `text`, `tokens` and `finish`, `prompts` and
    `usage`; or its refusal."""
    choices: dict[int, dict[str, Any]] = {}
    usage, prompts = [0, 0], list[list[int]]()
    for event in events:
        if "refusal" in event:
            return event
        usage, prompts = event.get("usage", usage), event.get("prompts", prompts)
        for place, text, token, finish in event.get("pieces", ()):
            choice = choices.setdefault(place, {"text": "", "tokens": [], "finish": None})
            choice["text"] += text
            choice["finish"] = finish or choice["finish"]
            if token is not None:
                choice["tokens"].append(token)
    ordered = [choices[place] for place in sorted(choices)]
    return {"choices": ordered, "prompts": prompts, "usage": usage}
