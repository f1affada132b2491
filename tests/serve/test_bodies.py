"""Bodies that are long and wrong: refused in one pass, by their first mistake."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from dray.serve.limits import Limits, read_json
from dray.serve.refusals import Refusal
from dray.serve.schemas import ChatRequest, CompletionRequest, PredictRequest


@pytest.mark.parametrize("inside", [b'\\"', b"\\", b'"[', b"\\u12"])
def test_a_text_without_an_end_is_read_once(inside: bytes) -> None:
    """Of a million characters: what looked at each again from each quote took hours."""
    body = b'{"model": "' + inside * (900_000 // len(inside))
    with pytest.raises(Refusal, match=r"no JSON|nested deeper"):
        read_json(body, Limits())


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"model": "m", "prompt": [{}] * 300_000}),
        (CompletionRequest, {"model": "m", "prompt": [[None]] * 200_000}),
        (ChatRequest, {"model": "m", "messages": [0] * 400_000}),
        (PredictRequest, {"records": [0] * 400_000}),
    ],
)
def test_of_many_mistakes_the_first_is_enough(kind: type[BaseModel], body: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() < 10


@pytest.mark.parametrize(
    "wrong", [{"temperature": "0.5"}, {"temperature": True}, {"stream": "yes"}, {"top_p": "1"}]
)
def test_a_number_is_no_text_and_no_truth(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate({"model": "m", "prompt": "x", **wrong})
    whole = CompletionRequest.model_validate({"model": "m", "prompt": "x", "temperature": 1})
    assert whole.temperature == 1.0
