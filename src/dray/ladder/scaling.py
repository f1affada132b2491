"""The law of a ladder's losses, L(N, D) = E + A / N^α + B / D^β, fitted and drawn again.

Hoffmann et al. 2022 (arXiv 2203.15556, approach 3): the Huber loss, with δ = 10⁻³, of the
differences of logarithms is minimised from several starts. N counts all parameters, D tokens.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

HUBER_DELTA = 1e-3
RESAMPLINGS = 100
LEAST_RUNGS, LEAST_SPREAD = 6, 3
"""The law has five numbers; of fewer sizes or lengths an exponent cannot be told."""
MOST_EXPONENT = 2.0
"""α and β lie between 0 and this: what is found there in practice is 0.2 to 0.8."""

EDGE = 0.01
TOLERANCE = 1e-5
"""Of the cost and of the law's numbers: losses are known to a thousandth."""


@dataclass(frozen=True)
class Measured:
    """What a rung came to."""

    num_parameters: int
    num_tokens: int
    loss: float


@dataclass(frozen=True)
class ScalingLaw:
    """E + A / N^α + B / D^β; in nats."""

    irreducible: float
    by_size: float
    by_tokens: float
    alpha: float
    beta: float

    @property
    def untold(self) -> list[str]:
        """What the losses did not tell the way of: an exponent at the edge of where it is looked
        for is none."""
        exponents = {"parameters": self.alpha, "tokens": self.beta}
        return [
            name
            for name, exponent in exponents.items()
            if not EDGE < exponent < MOST_EXPONENT - EDGE
        ]

    def loss(self, num_parameters: float, num_tokens: float) -> float:
        """What a model of so many parameters would come to on so many tokens."""
        return float(
            self.irreducible
            + self.by_size / num_parameters**self.alpha
            + self.by_tokens / num_tokens**self.beta
        )


OTHER_START = ScalingLaw(irreducible=1.0, by_size=10.0, by_tokens=10.0, alpha=0.2, beta=0.2)
"""Where fits to rungs drawn again begin besides the law of all rungs, so that they may end
elsewhere."""


def is_enough(measured: Sequence[Measured]) -> bool:
    """Whether a law can be fitted to these rungs; one that was drawn twice counts once."""
    sizes = {item.num_parameters for item in measured}
    tokens = {item.num_tokens for item in measured}
    return len(set(measured)) >= LEAST_RUNGS and min(len(sizes), len(tokens)) >= LEAST_SPREAD


def fit_law(measured: Sequence[Measured], starts: Iterable[ScalingLaw] = ()) -> ScalingLaw:
    """The law that fits best; from `starts` alone where there are some. Raises ValueError for rungs
    that are not enough."""
    import numpy as np
    from scipy.optimize import least_squares

    if not is_enough(measured):
        raise ValueError(
            f"{len(measured)} rungs: the law wants at least {LEAST_RUNGS}, of {LEAST_SPREAD} sizes "
            f"and {LEAST_SPREAD} lengths"
        )
    # Sizes and tokens are taken relative to their means, by which the law's numbers hardly depend
    # on each other: log E, log A and log B (both at the means), α, β.
    sizes = np.log([float(item.num_parameters) for item in measured])
    tokens = np.log([float(item.num_tokens) for item in measured])
    losses = np.log([item.loss for item in measured])
    middle = float(sizes.mean()), float(tokens.mean())
    sizes, tokens = sizes - middle[0], tokens - middle[1]

    def terms(numbers: np.ndarray) -> np.ndarray:
        rest, by_size, by_tokens, alpha, beta = numbers
        rests = np.full_like(sizes, rest)
        logs = np.stack([rests, by_size - alpha * sizes, by_tokens - beta * tokens])
        parts: np.ndarray = np.exp(logs)
        return parts

    def residuals(numbers: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.log(terms(numbers).sum(axis=0)) - losses
        return found

    def slopes(numbers: np.ndarray) -> np.ndarray:
        parts = terms(numbers)
        shares = parts / parts.sum(axis=0)
        return np.stack([*shares, -shares[1] * sizes, -shares[2] * tokens], axis=1)

    level = float(losses.mean())
    low = [level - 12.0] * 3 + [0.0] * 2
    high = [level + 2.0] * 3 + [MOST_EXPONENT] * 2
    begins = [_to_numbers(law, middle) for law in starts] or [
        (level + math.log(rest), *[level + math.log((1 - rest) / 2)] * 2, alpha, beta)
        for rest, alpha, beta in itertools.product((0.3, 0.7), (0.2, 0.6), (0.2, 0.6))
    ]
    found = [
        least_squares(
            residuals,
            np.clip(begin, low, high),
            jac=slopes,
            bounds=(low, high),
            loss="huber",
            f_scale=HUBER_DELTA,
            ftol=TOLERANCE,
            xtol=TOLERANCE,
        )
        for begin in begins
    ]
    best = min(found, key=lambda item: float(item.cost))
    return _from_numbers([float(number) for number in best.x], middle)


def fit_again(measured: Sequence[Measured], law: ScalingLaw, seed: int = 0) -> list[ScalingLaw]:
    """Laws of the rungs drawn again with replacement, for intervals. A draw that is not enough is
    drawn anew."""
    chance = random.Random(seed)
    laws = list[ScalingLaw]()
    while len(laws) < RESAMPLINGS:
        drawn = chance.choices(measured, k=len(measured))
        if is_enough(drawn):
            laws.append(fit_law(drawn, starts=[law, OTHER_START]))
    return laws


def _to_numbers(law: ScalingLaw, middle: tuple[float, float]) -> tuple[float, ...]:
    tiny = 1e-12
    return (
        math.log(max(tiny, law.irreducible)),
        math.log(max(tiny, law.by_size)) - law.alpha * middle[0],
        math.log(max(tiny, law.by_tokens)) - law.beta * middle[1],
        law.alpha,
        law.beta,
    )


def _from_numbers(numbers: Sequence[float], middle: tuple[float, float]) -> ScalingLaw:
    rest, by_size, by_tokens, alpha, beta = numbers
    return ScalingLaw(
        irreducible=math.exp(rest),
        by_size=math.exp(by_size + alpha * middle[0]),
        by_tokens=math.exp(by_tokens + beta * middle[1]),
        alpha=alpha,
        beta=beta,
    )
