"""What a ladder tells, of losses that follow a known law."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dray.ladder.forecast import Forecast, load_forecast
from dray.ladder.rungs import make_point, make_rungs, make_target
from dray.ladder.scaling import ScalingLaw
from dray.show.ladders import format_forecast
from dray.spec import Spec, make_spec
from dray.sweep.events import COMPLETED, DIVERGED, FAILED, Begun, Ended, Reported
from dray.sweep.policies import NoPolicy
from dray.sweep.space import make_space
from dray.sweep.study import Scale, Study
from tiny import tiny_tree

TRUE = ScalingLaw(irreducible=1.8, by_size=40.0, by_tokens=300.0, alpha=0.35, beta=0.37)
TREE = tiny_tree(
    Path("corpus"),
    model={"hidden_size": 256, "num_layers": 4, "num_heads": 4, "tie_embeddings": False},
    batch={"global_rows": 32, "micro_rows": "auto"},
    duration={"steps": None, "tokens": 40_000_000},
    resources={"workers": 1},
)


@pytest.fixture(autouse=True)
def few_resamplings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals are test_scaling.py's."""
    monkeypatch.setattr("dray.ladder.scaling.RESAMPLINGS", 10)


def foretell(
    flops: float | None = None, ends: dict[int, str] | None = None, wrong: int = 0
) -> tuple[Spec, Forecast | None]:
    """The forecast of a ladder whose losses follow TRUE. `ends`: trial → how else it ended;
    `wrong`: one whose loss is 5 % too high."""
    spec = make_spec(TREE)
    target = make_target(spec, 0)
    rungs = make_rungs(spec, target, 0.05 * target.flops)
    points = [make_point(spec, target, rung) for rung in rungs]
    space = make_space({"points": points, "metric": "loss", "scheduler": "none"})
    scale = Scale("min", 100, 32, seed=0)
    study = Study(space, TREE, spec, scale, NoPolicy())
    for number, rung in enumerate(rungs, 1):
        loss = TRUE.loss(rung.size.num_parameters, rung.num_tokens)
        loss *= 1.05 if number == wrong else 1.0
        how = (ends or {}).get(number, COMPLETED)
        study.apply(Begun(number, number - 1, 0, 1, {}, points[number - 1]))
        study.apply(Reported(number, 40, 40.0, loss))
        study.apply(Ended(number, how, 40, cause="data" if how == FAILED else ""))
    ladder: dict[str, Any] = {
        "rungs": [rung.to_json() for rung in rungs],
        "target": target.to_json(),
        "flops": flops,
        "vocab_size": 512,
        "corpus_tokens": 40_000_000,
    }
    return spec, load_forecast(ladder, study)


def test_the_spec_is_foretold_and_the_largest_rung_checked() -> None:
    spec, forecast = foretell()
    assert forecast is not None
    target = make_target(spec, 0)
    truth = TRUE.loss(target.size.num_parameters, target.num_tokens)
    assert forecast.loss.value == pytest.approx(truth, rel=5e-3)
    assert forecast.missing == ()
    assert forecast.check == pytest.approx(0.0, abs=2e-3)
    reach = forecast.to_json()["reach"]
    assert 1 < reach["parameters"] < 10
    assert 1 < reach["tokens"] < 30


def test_a_largest_rung_that_the_others_do_not_foretell_is_told() -> None:
    last = 9
    forecast = foretell(wrong=last)[1]
    assert forecast is not None
    assert forecast.check == pytest.approx(1 / 1.05 - 1, abs=5e-3)
    assert "foretold by the others, is off by -4" in format_forecast(forecast.to_json())


def test_the_best_model_is_where_the_law_has_it() -> None:
    """Between the ends of the sizes looked at, a neighbour on either side does worse."""
    _, forecast = foretell(flops=1e18)
    assert forecast is not None
    assert forecast.edge == ""
    best, law = forecast.best, forecast.law
    assert best.size.num_parameters > 1e6
    for factor in (0.5, 2.0):
        other = law.loss(best.size.num_parameters * factor, best.num_tokens / factor)
        assert other > forecast.best_loss.value
    assert "wants more data" in format_forecast(forecast.to_json())


def test_a_budget_beyond_all_sizes_is_said_to_be() -> None:
    _, forecast = foretell(flops=1e30)
    assert forecast is not None
    assert "the largest size that was looked at" in format_forecast(forecast.to_json())


def test_rungs_without_a_loss_are_named() -> None:
    _, forecast = foretell(ends={2: DIVERGED, 5: FAILED})
    assert forecast is not None
    assert forecast.missing == ("0002 diverged", "0005 data")
    assert "without   0002 diverged, 0005 data" in format_forecast(forecast.to_json())
    few = foretell(ends=dict.fromkeys(range(1, 5), DIVERGED))[1]
    assert few is None
    assert "too few rungs have a loss" in format_forecast(few)
