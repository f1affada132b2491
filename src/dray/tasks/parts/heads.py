"""How a language model makes its logits, found out by asking it: the fused loss takes the head's
place only where that is known to change nothing.

The model's own forward pass is run once with numbers of ours in place of its body's and its head's.
What comes out as logits tells what the architecture does to the head's product: nothing, a scale
(Cohere, Granite) or a cap (Gemma 2). Everything else (transforms before the projection, as in BERT;
heads that are no plain projection) is left to the model.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dray.errors import caught
from dray.tasks.parts.losses import LogitRule

logger = logging.getLogger("dray.tasks")

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Fields of a configuration that may hold the cap."""


@dataclass(frozen=True)
class Head:
    """A language model as a body and a plain projection of what that gives out."""

    body: nn.Module
    """Takes `input_ids`; the first of what it gives out are the hidden states."""
    projection: nn.Linear
    rule: LogitRule


def find_head(model: Any) -> Head | None:
    """A transformers language model's parts, if that is all there is to its logits; None: use its
    own logits."""
    projection = model.get_output_embeddings()
    if type(projection) is not nn.Linear:
        return None
    bodies = [
        body
        for body in dict.fromkeys((model.base_model, model.get_decoder()))
        if isinstance(body, nn.Module)
    ]
    rules = ((body, _find_rule(model, body, projection)) for body in bodies if body is not model)
    return next((Head(body, projection, rule) for body, rule in rules if rule is not None), None)


def _find_rule(model: Any, body: nn.Module, projection: nn.Linear) -> LogitRule | None:
    hidden = torch.zeros(1, 2, projection.in_features)
    product = torch.linspace(-40.0, 40.0, 2 * projection.out_features).reshape(1, 2, -1)
    read: list[Tensor] = []

    def answer_body(*inputs: Any, **named: Any) -> _Given:
        named.pop("input_ids", None)
        if any(isinstance(value, Tensor) for value in (*inputs[1:], *named.values())):
            raise ValueError("its body takes more than tokens")
        return _Given(hidden)

    def answer_head(given: Tensor) -> Tensor:
        read.append(given)
        return product.clone()

    def ask() -> Tensor:
        with torch.no_grad(), _answering(body, answer_body), _answering(projection, answer_head):
            ids = torch.zeros(1, 2, dtype=torch.int64)
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
            return logits

    # Any architecture's code runs here, and what lies between may be partitioned.
    logits, error = caught(ask)
    if logits is None:
        logger.info("%s: what it does to its logits is unknown (%s)", type(model).__name__, error)
        return None
    if len(read) != 1 or not _are_one(hidden, read[0]) or logits.shape != product.shape:
        return None
    return next(
        (
            rule
            for rule in _candidates(model.config, product, logits)
            if torch.allclose(rule.logits(product), logits.float(), rtol=1e-5, atol=1e-5)
        ),
        None,
    )


def heeds_tokens_by_themselves(model: Any) -> bool:
    """Whether what follows a model's body makes each token's logits of that token alone: found out
    on a copy of it with random weights, since the model's may not be there yet. False where ZeRO-3
    has parted them."""
    found, error = caught(lambda: _gives_the_same_for_some(model))
    if found is None:
        logger.info("%s: what its head heeds is unknown (%s)", type(model).__name__, error)
    return bool(found)


@torch.no_grad()
def _gives_the_same_for_some(model: Any) -> bool:
    if model.base_model is model:
        return False
    body = _Answer()
    head = copy.deepcopy(model, {id(model.base_model): body}).float().eval()
    generator = torch.Generator().manual_seed(0)

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=generator)

    for parameter in head.parameters():
        parameter.copy_(draw(parameter.shape))

    def ask(hidden: Tensor) -> Tensor:
        body.given = hidden.to(next(head.parameters()).device)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=body.given.device)
        logits: Tensor = head(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits

    hidden, chosen = draw((2, 6, model.config.hidden_size)), torch.tensor([9, 4, 5])
    expected = ask(hidden).flatten(0, 1)[chosen]
    found = ask(hidden.flatten(0, 1)[chosen][None])
    return found.shape == (1, *expected.shape) and torch.allclose(
        found[0], expected, rtol=1e-4, atol=1e-4
    )


class _Answer(nn.Module):
    """A body that gives out what it is told to."""

    given: Tensor

    def forward(self, *inputs: Any, **named: Any) -> _Given:
        return _Given(self.given)


class _Given:
    """A body's output in which there is nothing but the hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Any:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _answering(module: nn.Module, answer: Callable[..., Any]) -> Iterator[None]:
    """The module answers so, instead of computing."""
    module.forward = answer
    try:
        yield
    finally:
        del module.forward


def _are_one(given: Tensor, taken: Tensor) -> bool:
    """Whether the head read what the body gave out, unchanged: the same memory, of the same
    shape."""
    return (
        given.shape == taken.shape and given._version == 0 and given.data_ptr() == taken.data_ptr()
    )


def _candidates(config: Any, product: Tensor, logits: Tensor) -> list[LogitRule]:
    scale = float(logits.flatten()[0]) / float(product.flatten()[0])
    caps = [float(cap) for name in _CAPS if (cap := getattr(config, name, None))]
    return [LogitRule(), *(LogitRule(cap=cap) for cap in caps), LogitRule(scale=scale)]
