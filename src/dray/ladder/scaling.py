"""The law of a ladder's losses, L(N, D) = E + A / N^α + B / D^β, fitted and drawn again.

Hoffmann et al. 2022 (arXiv 2203.15556, approach 3): the Huber loss, with δ = 10⁻³, of the
differences of logarithms is minimised by L-BFGS from a grid of starts. N counts all parameters, D
tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

HUBER_DELTA = 1e-3
RESAMPLINGS = 200
LEAST_RUNGS = 6
"""The law has five numbers."""
MOST_EXPONENT = 2.0
"""α and β lie between 0 and this: what is found there in practice is 0.2 to 0.8."""


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

    def loss(self, num_parameters: float, num_tokens: float) -> float:
        """What a model of so many parameters would come to on so many tokens."""
        return float(
            self.irreducible
            + self.by_size / num_parameters**self.alpha
            + self.by_tokens / num_tokens**self.beta
        )


def fit_law(measured: Sequence[Measured], starts: Iterable[ScalingLaw] = ()) -> ScalingLaw:
    """The law that fits best; from `starts` alone where there are some. Raises ValueError for fewer
    than LEAST_RUNGS."""
    import numpy as np
    from scipy.optimize import minimize

    if len(measured) < LEAST_RUNGS:
        raise ValueError(f"{len(measured)} rungs: the law wants at least {LEAST_RUNGS}")
    # Sizes and tokens are taken relative to their means, by which the numbers hardly depend on each
    # other.
    sizes = np.log([float(item.num_parameters) for item in measured])
    tokens = np.log([float(item.num_tokens) for item in measured])
    losses = np.log([item.loss for item in measured])
    middle = float(sizes.mean()), float(tokens.mean())
    sizes, tokens = sizes - middle[0], tokens - middle[1]

    def cost(numbers: np.ndarray) -> tuple[float, np.ndarray]:
        return _cost(numbers, sizes, tokens, losses)

    level = float(losses.mean())
    bounds = [(level - 12, level + 2)] * 3 + [(0.0, MOST_EXPONENT)] * 2
    begins = [_to_numbers(law, middle) for law in starts] or [
        (level + math.log(rest), level + math.log(part), level + math.log(part), alpha, beta)
        for rest, part, alpha, beta in itertools.product(
            (0.2, 0.5, 0.8), (0.05, 0.2), (0.1, 0.3, 0.6), (0.1, 0.3, 0.6)
        )
    ]
    found = [minimize(cost, begin, jac=True, method="L-BFGS-B", bounds=bounds) for begin in begins]
    best = min(found, key=lambda item: float(item.fun))
    return _from_numbers([float(number) for number in best.x], middle)


def fit_again(measured: Sequence[Measured], law: ScalingLaw, seed: int = 0) -> list[ScalingLaw]:
    """Laws of the rungs drawn again with replacement, for intervals. A draw of fewer than three
    sizes or lengths tells nothing of an exponent and is drawn anew."""
    import random

    chance = random.Random(seed)
    laws = list[ScalingLaw]()
    while len(laws) < RESAMPLINGS:
        drawn = chance.choices(measured, k=len(measured))
        if (
            min(
                len({item.num_parameters for item in drawn}),
                len({item.num_tokens for item in drawn}),
            )
            >= 3
        ):
            laws.append(fit_law(drawn, starts=[law]))
    return laws


def _cost(
    numbers: np.ndarray, sizes: np.ndarray, tokens: np.ndarray, losses: np.ndarray
) -> tuple[float, np.ndarray]:
    """The Huber loss of log-losses and its gradient; `numbers`: log E, log A, log B (both at the
    mean size and tokens), α, β."""
    import numpy as np

    rest, by_size, by_tokens, alpha, beta = numbers
    terms = np.stack(
        [np.full_like(sizes, rest), by_size - alpha * sizes, by_tokens - beta * tokens]
    )
    top = terms.max(axis=0)
    weights = np.exp(terms - top)
    whole = weights.sum(axis=0)
    residual = top + np.log(whole) - losses
    shares = weights / whole
    small = np.abs(residual) <= HUBER_DELTA
    cost = np.where(small, 0.5 * residual**2, HUBER_DELTA * (np.abs(residual) - 0.5 * HUBER_DELTA))
    slope = np.clip(residual, -HUBER_DELTA, HUBER_DELTA)
    gradient = np.array(
        [
            (slope * shares[0]).sum(),
            (slope * shares[1]).sum(),
            (slope * shares[2]).sum(),
            (-slope * shares[1] * sizes).sum(),
            (-slope * shares[2] * tokens).sum(),
        ]
    )
    scale = 1 / HUBER_DELTA**2  # of the order of 1, by which L-BFGS knows when it is done
    return float(cost.sum() * scale), gradient * scale


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
