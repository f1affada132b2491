"""ε and δ are those of a reference: opacus' numerical accountant, and the definition itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
from scipy import integrate, stats

from dray.plan import Shape, make_plan
from dray.plan.privacy import delta_of, epsilon_of, mu_for, mu_of, noise_for
from dray.spec import make_spec


@pytest.mark.parametrize("uses", [1, 3, 20])
@pytest.mark.parametrize("noise", [0.8, 2.0, 8.0])
def test_epsilon_is_what_opacus_accounts_for_without_sampling(uses: int, noise: float) -> None:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(noise, 1 - 1e-9, uses)]  # at 1 it divides by 0
    expected = accountant.get_epsilon(delta=1e-5, eps_error=0.01, delta_error=1e-8)
    found = epsilon_of(1e-5, mu_of(uses, noise))
    assert found == pytest.approx(expected, abs=0.02)
    assert found <= expected + 1e-6  # theirs is an upper bound


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("mu", [0.3, 1.0, 3.0])
def test_delta_is_the_greatest_excess_of_one_density_over_another(
    epsilon: float, mu: float
) -> None:
    """δ = ∫ max(0, p − e^ε q) of two normal densities, μ apart."""

    def excess(x: float) -> float:
        return max(0.0, stats.norm.pdf(x, mu) - math.exp(epsilon) * stats.norm.pdf(x))

    least = epsilon / mu + mu / 2  # where the densities are e^ε apart
    found, _ = integrate.quad(excess, least, least + 40, limit=400)
    assert delta_of(epsilon, mu) == pytest.approx(found, rel=1e-6, abs=1e-14)


def test_more_uses_cost_more_and_more_noise_costs_less() -> None:
    by_uses = [epsilon_of(1e-5, mu_of(uses, 1.0)) for uses in (1, 2, 4, 8)]
    assert by_uses == sorted(by_uses)
    by_noise = [epsilon_of(1e-5, mu_of(4, noise)) for noise in (0.5, 1.0, 2.0, 4.0)]
    assert by_noise == sorted(by_noise, reverse=True)
    assert epsilon_of(1e-5, 0.0) == 0.0
    assert delta_of(1.0, 0.0) == 0.0


@pytest.mark.parametrize("epsilon", [0.5, 3.0, 10.0])
@pytest.mark.parametrize("uses", [1, 5, 40])
def test_noise_for_an_epsilon_has_it(epsilon: float, uses: int) -> None:
    noise = noise_for(uses, mu_for(epsilon, 1e-5))
    assert epsilon_of(1e-5, mu_of(uses, noise)) == pytest.approx(epsilon, rel=1e-6)
    assert epsilon_of(1e-5, mu_of(uses, noise)) <= epsilon * (1 + 1e-9)


def test_numbers_far_out_stay_numbers() -> None:
    assert 0 < delta_of(100.0, 1.0) < 1e-300 or delta_of(100.0, 1.0) == 0.0
    assert delta_of(0.0, 100.0) == pytest.approx(1.0)
    assert epsilon_of(1e-300, 1.0) < 50
    assert math.isinf(epsilon_of(1e-5, 1e6))


def test_a_plan_tells_what_rows_one_by_one_cost_and_what_epsilon_comes_to() -> None:
    tree: dict[str, Any] = {
        "name": "t",
        "task": "sequence_classification",
        "data": {"train": {"path": "none", "label": "label"}, "sequence_tokens": 64},
        "tokenizer": {"train": "byte_bpe", "vocab_size": 8192},
        "model": {"architecture": "bert", "hidden_size": 256, "num_layers": 4, "num_heads": 4},
        "batch": {"global_rows": 64, "micro_rows": 32},
        "duration": {"steps": 100},
        "zero": {"stage": 0},
    }
    shape = Shape(name="laptop", cpus_per_node=2, memory_bytes_per_node=24 * 10**9)
    private = make_spec(tree | {"privacy": {"epsilon": 8.0}})
    plain, hidden = (make_plan(spec, shape, num_rows=1000) for spec in (make_spec(tree), private))
    assert hidden.memory.activations < plain.memory.activations / 8
    assert hidden.memory.gradients > plain.memory.gradients + 4 * hidden.num_parameters * 0.9
    assert (hidden.step_seconds or 0) > (plain.step_seconds or math.inf)
    (note,) = [note for note in hidden.notes if note.startswith("privacy")]
    noise = math.sqrt(7) / mu_for(8.0, 1e-5)
    length = noise * math.sqrt(hidden.num_parameters) / 64
    assert f"used about 7 times with noise {noise:.4g} is ε = 8 at δ = 1e-05" in note
    assert f"is {length:.2g} times as long as the longest gradient" in note
    (note,) = [one for one in make_plan(private, shape).notes if one.startswith("privacy")]
    assert "known once a run has begun" in note
