"""What differentially private training proves: ε for a δ, from how often a row was used and how
much noise there was.

A row's gradient is at most C long, and each use of it is a release of a sum with normal noise of
the deviation σ·C. k such releases are one of the deviation σ/√k (Gaussian differential privacy:
Dong, Roth and Su 2022), whose ε is known exactly (Balle and Wang 2018, theorem 8). Nothing is
gained here by a row's batch being a secret: the order is a shuffle that a seed decides, not a
sample, so the amplification by sampling that others count on is none of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

_GREATEST = 1e6


def delta_of(epsilon: float, mu: float) -> float:
    """δ of μ-Gaussian differential privacy at an ε: Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ)."""
    if mu <= 0:
        return 0.0
    second = _log_phi(-mu / 2 - epsilon / mu) + epsilon
    return max(0.0, math.exp(_log_phi(mu / 2 - epsilon / mu)) - math.exp(min(0.0, second)))


def mu_of(num_uses: int, noise_multiplier: float) -> float:
    """μ of so many uses of a row with noise of so many times its gradient's greatest length."""
    return math.sqrt(num_uses) / noise_multiplier


def epsilon_of(delta: float, mu: float) -> float:
    """The least ε for a δ; infinite beyond a million."""
    if mu <= 0:
        return 0.0
    if delta_of(_GREATEST, mu) > delta:
        return math.inf
    return _least(lambda epsilon: delta_of(epsilon, mu) <= delta, _GREATEST)


def noise_for(num_uses: int, mu: float) -> float:
    """The noise multiplier by which so many uses of a row are of μ."""
    return math.sqrt(num_uses) / mu


def mu_for(epsilon: float, delta: float) -> float:
    """The greatest μ that has an ε at a δ."""
    return 1 / _least(lambda noise: delta_of(epsilon, 1 / noise) <= delta, _GREATEST, least=1e-6)


def _least(holds: Callable[[float], bool], most: float, least: float = 0.0) -> float:
    """Where something that holds from a number on begins to, rounded up."""
    low, high = least, most
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _log_phi(x: float) -> float:
    """The logarithm of the normal distribution function."""
    if x > -30:
        return math.log(max(math.erfc(-x / math.sqrt(2)) / 2, 5e-324))
    # Its asymptotic series, where erfc has no digits left (Abramowitz and Stegun 26.2.12).
    series = 1 - 1 / x**2 + 3 / x**4 - 15 / x**6
    return -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi)) + math.log(series)
