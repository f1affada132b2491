"""The bodies of requests and answers: OpenAI's, as far as they are served here, and dray's own.

A field of OpenAI's that would change the answer and is not served here is refused by name, not
passed over; fields that change nothing (`user`, `metadata`, `store`) are taken. Numbers are
bounded here once; what depends on the service's limits is checked in `checking.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Item = TypeVar("Item")
Many = Annotated[list[Item], Field(fail_fast=True)]
"""A list that is refused at the first item that does not fit: a long one has as many mistakes."""
Text = Annotated[str, Field(strict=True)]
Model = Annotated[str, Field(strict=True, min_length=1, max_length=200)]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Whole = Annotated[int, Field(strict=True)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Metadata = dict[str, Any] | None


class Request(BaseModel):
    """What every request may have."""

    model_config = ConfigDict(extra="forbid")

    model: Model
    """As `/v1/models` names it."""
    user: Text | None = None
    metadata: Metadata = None
    store: Flag | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: Flag = False
    """Whether a last piece tells the tokens of all."""
    include_obfuscation: Flag | None = None


class Sampled(Request):
    """What completions and chats have in common."""

    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    """0 takes the likeliest token each time; without one it is 1."""
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    n: Annotated[Whole, Field(ge=1)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Many[Text] | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[Text, Annotated[Number, Field(ge=-100, le=100)]] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def _no_number(value: Any) -> Any:
    """0 is no truth value, though it equals one."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError("a truth value is wanted")
    return value


class CompletionRequest(Sampled):
    prompt: Text | Many[Text] | Many[TokenId] | Many[Many[TokenId]]
    """Texts, or ids of tokens."""
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    """How many of the likeliest tokens are told beside each."""
    echo: Annotated[Literal[False], BeforeValidator(_no_number)] | None = None
    best_of: Annotated[Whole, Field(ge=1, le=1)] | None = None
    suffix: None = None


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Many[Part] | None = None
    name: Text | None = None
    tool_calls: Many[dict[str, Any]] | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    refusal: Text | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class ChatRequest(Sampled):
    messages: Annotated[Many[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    logprobs: Flag | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    tools: Many[dict[str, Any]] | None = None
    """JSON schemas, which the chat template writes; what a model makes of them is its text."""
    tool_choice: Literal["auto", "none"] | None = None
    response_format: ResponseFormat | None = None


class EmbeddingRequest(Request):
    input: Text | Many[Text]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = None


Input = Text | Many[Text] | Many[dict[str, Any]]


class ClassifyRequest(Request):
    input: Input
    """A text, texts, or records with the model's fields."""


class ExtractRequest(Request):
    input: Text | Many[Text] | Many[Many[Text]] | Many[dict[str, Any]]
    """A text, texts, lists of words, or records with the model's fields. A text is split into words
    and signs."""


class PredictRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: Model | None = None
    """May be left out where one model predicts."""
    user: Text | None = None
    records: Annotated[Many[dict[str, Any]], Field(min_length=1)]


class FeedbackRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: Annotated[str, Field(pattern="^[0-9a-f]{16}$", strict=True)]
    """The answer's header `x-request-id`."""
    index: Annotated[Whole, Field(ge=0, lt=1_000_000)] = 0
    """Which of its answers, where it has several."""
    rating: Literal["up", "down"] | None = None
    """A thumb."""
    label: Text | Flag | int | float | Many[Text] | None = None
    """What should have been predicted: a class, a number, or a list."""
    text: Text | None = None
    """What should have been written."""
    comment: Annotated[Text, Field(max_length=2_000)] | None = None


# --- answers -------------------------------------------------------------------------------------


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """What every answer is that is no success."""

    error: ErrorBody


class VersionCard(BaseModel):
    version: int
    """Asked for as `NAME@VERSION`."""
    role: Literal["promoted", "canary", "shadow"]


class Card(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dray"
    routes: list[str]
    """What it answers to."""
    fields: list[str]
    """Of a record that it predicts."""
    row_tokens: int | None
    """Tokens of a prompt and its answer together, or of a text."""
    run: str | None
    step: int | None
    feedback: bool = False
    """Whether something may be said of its answers."""
    versions: list[VersionCard] = []
    """Those that may be asked by their number."""


class Cards(BaseModel):
    object: Literal["list"] = "list"
    data: list[Card]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: str | None


class Chat(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class Predictions(BaseModel):
    object: Literal["list"] = "list"
    model: str
    predictions: list[dict[str, Any]]
    """For each record in its order: `prediction` with what goes with it, or `error`."""


class FeedbackKept(BaseModel):
    object: Literal["feedback"] = "feedback"
    id: str
    """Of the entry."""
    dataset: str


class Status(BaseModel):
    status: str
