"""From a request's body to the answers that are wanted of a model, within the service's limits.

What is too much, contradicts itself or is no text of the model's is refused with the field's name.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from dray.serve.generation import Ask
from dray.serve.limits import Limits
from dray.serve.loading import Writer
from dray.serve.refusals import Refusal
from dray.serve.sampling import Sampling
from dray.serve.schemas import ChatRequest, CompletionRequest, Sampled

COMPLETION_TOKENS = 16
"""New tokens of a completion that says nothing, as in OpenAI's API."""


def make_asks(writer: Writer, request: Sampled, limits: Limits, row_tokens: int) -> list[Ask]:
    """What is wanted: `n` answers to each prompt, one prompt's after another's. Raises Refusal
    400."""
    chat = request if isinstance(request, ChatRequest) else None
    prompts = (
        _completion_prompts(writer, request, limits)
        if isinstance(request, CompletionRequest)
        else [_chat_prompt(writer, chat)]
        if chat is not None
        else []
    )
    num_choices = request.n or 1
    most_answers = max(limits.choices, limits.prompts)
    if num_choices * len(prompts) > most_answers:
        raise _over("n", f"{num_choices * len(prompts):,} answers are asked for", most_answers)
    if num_choices > limits.choices:
        raise _over("n", f"n is {num_choices:,}", limits.choices)
    _check_stops(request.stops, limits)
    _check_streaming(request)
    sampling = _make_sampling(writer, request)
    deadline = time.monotonic() + limits.request_seconds
    asks = []
    for ids in prompts:
        if len(ids) > limits.prompt_tokens:
            raise _over("prompt", f"the prompt is {len(ids):,} tokens", limits.prompt_tokens)
        most = _max_tokens(request, len(ids), limits, row_tokens)
        asks += [
            Ask(ids, most, sampling, place, request.stops, writer.ends, deadline)
            for place in range(num_choices)
        ]
    return asks


def _max_tokens(request: Sampled, num_prompt: int, limits: Limits, row_tokens: int) -> int:
    """New tokens at most. A number that is given is kept or refused; without one a chat goes on to
    the end of the row."""
    given, param = request.max_tokens, "max_tokens"
    room = row_tokens - num_prompt
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        given, param = request.max_completion_tokens, "max_completion_tokens"
    if room < 1 or (given is not None and given > room):
        raise Refusal(
            400,
            f"this model takes {row_tokens:,} tokens in all; the prompt is {num_prompt:,}"
            + (f" and {given:,} new ones are asked for" if given is not None else ""),
            param=param if room >= 1 else "prompt",
            code="context_length_exceeded",
        )
    if given is None:
        wanted = limits.max_tokens if isinstance(request, ChatRequest) else COMPLETION_TOKENS
        return min(wanted, room, limits.max_tokens)
    if given > limits.max_tokens:
        raise _over(param, f"{param} is {given:,}", limits.max_tokens)
    return given


def _make_sampling(writer: Writer, request: Sampled) -> Sampling:
    if isinstance(request, ChatRequest):
        if request.top_logprobs is not None and not request.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        told = (request.top_logprobs or 0) if request.logprobs else None
    else:
        told = request.logprobs if isinstance(request, CompletionRequest) else None
    return Sampling(
        1.0 if request.temperature is None else request.temperature,
        1.0 if request.top_p is None else request.top_p,
        request.seed,
        request.presence_penalty or 0.0,
        request.frequency_penalty or 0.0,
        _read_bias(request.logit_bias or {}, writer.vocab_size),
        None if told is None else min(told, writer.vocab_size),
    )


def _read_bias(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    if len(given) > 1_024:
        raise _over("logit_bias", f"logit_bias has {len(given):,} tokens", 1_024)
    for name in given:
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocab_size):
            raise Refusal(
                400,
                f"logit_bias names {name[:40]!r}: ids of tokens are 0 to {vocab_size - 1:,}",
                param="logit_bias",
            )
    return {int(name): bias for name, bias in given.items()}


def _check_stops(stops: Sequence[str], limits: Limits) -> None:
    if len(stops) > limits.stops:
        raise _over("stop", f"stop has {len(stops):,} strings", limits.stops)
    if any(not stop for stop in stops):
        raise Refusal(400, "a stop string is empty", param="stop")
    if any(len(stop) > limits.stop_characters for stop in stops):
        longest = max(map(len, stops))
        raise _over("stop", f"a stop string has {longest:,} characters", limits.stop_characters)


def _check_streaming(request: Sampled) -> None:
    if request.stream_options is not None and not request.stream:
        raise Refusal(400, "stream_options needs stream: true", param="stream_options")


# --- prompts -------------------------------------------------------------------------------------


def _completion_prompts(
    writer: Writer, request: CompletionRequest, limits: Limits
) -> list[list[int]]:
    given = request.prompt
    prompts: list[Any] = [given] if isinstance(given, str) else list(given)
    if given and all(isinstance(item, int) for item in given):
        prompts = [list(given)]
    if not 0 < len(prompts) <= limits.prompts:
        raise _over("prompt", f"{len(prompts):,} prompts are given", limits.prompts)
    return [
        _encoded(writer, prompt, limits) if isinstance(prompt, str) else _given(writer, prompt)
        for prompt in prompts
    ]


def _encoded(writer: Writer, text: str, limits: Limits) -> list[int]:
    """A text as training gave it to the model. Raises Refusal for one with a special token in it:
    whoever means one gives ids."""
    from dray.tasks.parts.chat import holds_special

    if holds_special(text, writer.tools.special):
        raise Refusal(
            400,
            "the prompt has a special token in it; who means one gives the ids of tokens",
            param="prompt",
            code="special_token",
        )
    ids, _ = writer.tools.encode(pa.array([writer.normal(text)], pa.large_string()))
    found = [*writer.tools.prefix, *ids.tolist()]
    return found or [min(writer.ends, default=0)]  # where documents begin


def _given(writer: Writer, ids: Sequence[int]) -> list[int]:
    if not ids:
        raise Refusal(400, "a prompt without tokens", param="prompt")
    if max(ids) >= writer.vocab_size:
        raise Refusal(
            400,
            f"{max(ids):,} is no token: they are 0 to {writer.vocab_size - 1:,}",
            param="prompt",
        )
    return list(ids)


def _chat_prompt(writer: Writer, request: ChatRequest | None) -> list[int]:
    """By the tokeniser's chat template, up to where the assistant begins."""
    from dray.tasks.parts.chat import NoConversation, encode_conversation

    assert request is not None
    messages = []
    for message in request.messages:
        kept = message.model_dump(exclude_none=True, exclude={"refusal"})
        if isinstance(message.content, list):
            kept["content"] = "".join(part.text for part in message.content)
        messages.append({"content": "", **kept} if message.tool_calls else kept)
    if request.messages[-1].role == "assistant":
        raise Refusal(400, "the last message is the assistant's", param="messages")
    try:
        tools = {} if request.tool_choice == "none" else {"tools": request.tools}
        return encode_conversation({"messages": messages, **tools}, writer.tools)
    except NoConversation as error:
        raise Refusal(400, f"messages cannot be asked: {error}", param="messages") from error


def _over(param: str, what: str, limit: int) -> Refusal:
    return Refusal(400, f"{what}; at most {limit:,} here", param=param, code="limit_exceeded")
