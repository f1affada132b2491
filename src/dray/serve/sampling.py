"""Which token comes next: temperature, nucleus, penalties and biases of one request, by random
numbers of its own.

A token is drawn by inverting the cumulative distribution in the order of ids, not of
probabilities: numerical noise of other rows in a batch moves a boundary by as little, and swaps no
two tokens. So a request with a seed gets the same text whatever is computed beside it.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

NUCLEUS_TOKENS = 1_024
"""Of which a nucleus is looked for first: to sort a whole vocabulary takes milliseconds."""


@dataclass(frozen=True)
class Sampling:
    """How a request wants its tokens drawn."""

    temperature: float = 1.0
    """0: the likeliest one."""
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of tokens, by id."""
    top_logprobs: int | None = None
    """How many of the likeliest tokens are told beside each; None: not even its own."""

    @property
    def is_plain(self) -> bool:
        """Whether the token is the logits' argmax."""
        return self.temperature == 0 and not self._changes and self.top_logprobs is None

    @property
    def _changes(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.bias)


@dataclass(frozen=True)
class Drawn:
    """A token, with the log of its probability and the likeliest ones', where they were asked
    for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


COLDEST = 1e-6
"""Below it a temperature is this one: fp32 has no smaller quotients."""


class Sampler:
    """Draws the tokens of one answer. `place` is its number among the answers to a prompt."""

    def __init__(self, sampling: Sampling, place: int = 0) -> None:
        self.sampling = sampling
        self._counts: Counter[int] = Counter()
        if sampling.seed is None:
            self._random = random.Random()
        else:
            digest = hashlib.blake2b(f"{sampling.seed} {place}".encode(), digest_size=16).digest()
            self._random = random.Random(int.from_bytes(digest, "little"))

    def draw(self, logits: Tensor) -> Drawn:
        """The next token by logits of fp32, [vocabulary]; they are not changed. Log-probabilities
        are those of temperature 1, with what the request adds to logits."""
        sampling = self.sampling
        if sampling.is_plain:
            return Drawn(int(logits.argmax()))
        logits = self._changed(logits)
        token = int(logits.argmax()) if sampling.temperature == 0 else self._drawn(logits)
        self._counts[token] += 1
        if sampling.top_logprobs is None:
            return Drawn(token)
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(sampling.top_logprobs) if sampling.top_logprobs else ((), ())
        top = tuple((int(i), float(v)) for i, v in zip(ids, values, strict=True))
        return Drawn(token, float(logprobs[token]), top)

    def _changed(self, logits: Tensor) -> Tensor:
        sampling = self.sampling
        if not (sampling.presence_penalty or sampling.frequency_penalty or sampling.bias):
            return logits
        logits = logits.clone()
        for token, bias in sampling.bias.items():
            logits[token] += bias
        for token, count in self._counts.items():
            logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
        return logits

    def _drawn(self, logits: Tensor) -> int:
        # From the greatest on, so that a temperature near 0 leaves that one, not infinities.
        shifted = (logits - logits.max()) / max(self.sampling.temperature, COLDEST)
        probabilities = shifted.softmax(-1)
        if self.sampling.top_p < 1:
            probabilities = in_nucleus(probabilities, self.sampling.top_p)
        sums = probabilities.double().cumsum(-1)
        wanted = self._random.random() * float(sums[-1])
        place = int(torch.searchsorted(sums, wanted, right=True))
        return min(place, len(sums) - 1)


def in_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities [vocabulary] without those outside of the smallest set of the likeliest ones
    that has at least `top_p` together (Holtzman et al. 2020); the likeliest one stays."""
    size = min(NUCLEUS_TOKENS, len(probabilities))
    values, ids = probabilities.topk(size)
    if float(values.sum()) < top_p:
        values, ids = probabilities.sort(descending=True)
    before = values.cumsum(-1) - values
    kept = before < top_p
    kept[0] = True
    found = torch.zeros_like(probabilities)
    found[ids[kept]] = values[kept]
    return found
