"""Empirical laws of language models that are trained from scratch: rate and batch for a size.

The Step Law (Li et al. 2025, Predictable Scale: Part I, arXiv 2503.04715), fitted on 3,700 models:
peak learning rate = 1.79 · N^-0.713 · D^0.307 and global batch = 0.58 · D^0.571 tokens, with N
parameters without the vocabulary's and D training tokens. It is AdamW's, and of decoders. What it
says of a laptop's models, which are far smaller than those, is a place to begin.
"""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict

from dray.spec import Spec

BATCH_TOKENS_EXPONENT = 0.571
"""Of tokens in the batch."""


LAWFUL = ("optimizer.learning_rate", "batch.global_rows")
"""What the Step Law gives."""


class Law(BaseModel):
    """What the Step Law says of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: float
    global_rows: int
    num_parameters: int
    """N: without the vocabulary's."""
    num_tokens: int
    """D."""

    def numbers(self) -> dict[str, float]:
        """What it gives, by the spec's dotted paths."""
        return dict(zip(LAWFUL, (self.learning_rate, self.global_rows), strict=True))


def step_law_rate(num_parameters: float, num_tokens: float) -> float:
    """The peak learning rate."""
    return float(1.79 * num_parameters**-0.713 * num_tokens**0.307)


def step_law_batch_tokens(num_tokens: float) -> float:
    """Tokens of the global batch."""
    return float(0.58 * num_tokens**BATCH_TOKENS_EXPONENT)


def find_law(spec: Spec, num_parameters: int, num_rows: int | None) -> Law | None:
    """The law's rate and batch for a spec whose model has so many parameters without the
    vocabulary's; none where its training tokens are not known yet. A batch of the spec that is a
    number stays as it is."""
    row, given = spec.data.sequence_tokens, spec.batch.global_rows
    duration = spec.duration
    if duration.tokens is not None:
        tokens = float(duration.tokens)
    elif duration.epochs is not None:
        if num_rows is None:
            return None
        tokens = duration.epochs * num_rows * row
    elif given:
        tokens = float((duration.steps or 1) * given * row)
    else:  # both follow from the steps: B = 0.58 · (steps · B)^0.571
        steps = duration.steps or 1
        tokens = steps * step_law_batch_tokens(steps) ** (1 / (1 - BATCH_TOKENS_EXPONENT))
    rows = given or round_rows(step_law_batch_tokens(tokens) / row)
    if duration.steps is not None:
        tokens = float(duration.steps * rows * row)
    rate = float(f"{min(10.0, step_law_rate(num_parameters, tokens)):.3g}")
    return Law(
        learning_rate=rate,
        global_rows=rows,
        num_parameters=num_parameters,
        num_tokens=round(tokens),
    )


def round_rows(rows: float) -> int:
    """The nearest of 1, 2, 3, 4, 6, 8, 12, 16, …: what many numbers of ranks divide."""
    power = 2 ** math.floor(math.log2(max(1.0, rows)))
    nearby = (power, power * 3 // 2 if power > 1 else 1, power * 2)
    return int(min(nearby, key=lambda number: abs(number - rows)))


def describe_law(law: Law) -> str:
    """The law's numbers in a line."""
    return (
        f"the Step Law for {law.num_parameters:,} parameters without the vocabulary and "
        f"{law.num_tokens:,} tokens: learning rate {law.learning_rate:.3g}, {law.global_rows} rows"
    )


def with_numbers(spec: Spec, learning_rate: float, global_rows: int) -> Spec:
    """The spec with these where it says `auto`."""
    if not spec.optimizer.learning_rate:
        optimizer = spec.optimizer.model_copy(update={"learning_rate": learning_rate})
        spec = spec.model_copy(update={"optimizer": optimizer})
    if not spec.batch.global_rows:
        batch = spec.batch.model_copy(update={"global_rows": global_rows})
        spec = spec.model_copy(update={"batch": batch})
    return spec
