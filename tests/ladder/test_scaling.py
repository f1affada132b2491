"""The law of losses: found again from its own losses, and how sure it is."""

from __future__ import annotations

import random

import pytest

from dray.ladder.scaling import Measured, ScalingLaw, fit_again, fit_law, is_enough

TRUE = ScalingLaw(irreducible=1.8, by_size=40.0, by_tokens=300.0, alpha=0.35, beta=0.37)
"""Of about what Hoffmann et al. found, for small models."""
TARGET = 4e6, 1e7


def measure(noise: float, seed: int = 0) -> list[Measured]:
    chance = random.Random(seed)
    return [
        Measured(int(size), int(tokens), TRUE.loss(size, tokens) * (1 + chance.gauss(0, noise)))
        for size in (8e4, 2e5, 4e5, 8e5)
        for tokens in (2e5, 5e5, 1.2e6)
    ]


def test_the_law_is_found_again() -> None:
    law = fit_law(measure(0.0))
    assert law.alpha == pytest.approx(TRUE.alpha, rel=0.02)
    assert law.beta == pytest.approx(TRUE.beta, rel=0.02)
    assert law.loss(*TARGET) == pytest.approx(TRUE.loss(*TARGET), rel=1e-3)


def test_one_rung_that_went_wrong_hardly_counts() -> None:
    """That is what the Huber loss is for."""
    rungs = measure(0.0)
    rungs[4] = Measured(rungs[4].num_parameters, rungs[4].num_tokens, 2 * rungs[4].loss)
    assert fit_law(rungs).loss(*TARGET) == pytest.approx(TRUE.loss(*TARGET), rel=1e-2)


@pytest.mark.slow
def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    inside = 0
    for seed in range(5):
        rungs = measure(0.003, seed)
        losses = sorted(law.loss(*TARGET) for law in fit_again(rungs, fit_law(rungs)))
        inside += losses[5] <= TRUE.loss(*TARGET) <= losses[-6]
    assert inside >= 3


def test_fits_are_the_same_again() -> None:
    rungs = measure(0.003)
    law = fit_law(rungs)
    assert fit_law(rungs) == law
    assert fit_again(rungs, law)[:3] == fit_again(rungs, law)[:3]


def test_what_the_losses_do_not_tell_is_said() -> None:
    assert fit_law(measure(0.0)).untold == []
    flat = [Measured(rung.num_parameters, rung.num_tokens, 3.0) for rung in measure(0.0)]
    same_sizes = [
        Measured(rung.num_parameters, rung.num_tokens, 2.0 + 1e4 / rung.num_tokens**0.9)
        for rung in flat
    ]
    assert "parameters" in fit_law(same_sizes).untold


def test_too_few_rungs() -> None:
    rungs = measure(0.0)
    assert is_enough(rungs)
    with pytest.raises(ValueError, match="at least 6"):
        fit_law(rungs[:5])
    two_sizes = [*rungs[:6], *rungs[:6]]
    assert not is_enough(two_sizes)
    with pytest.raises(ValueError, match="of 3 sizes and 3 lengths"):
        fit_law(two_sizes)
