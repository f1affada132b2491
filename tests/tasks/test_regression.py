"""What errors of numbers cost."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dray.spec.tasks import make_task

FOUND = torch.tensor([0.5, -1.0, 4.0, 7.0])
WANTED = torch.tensor([1.0, -1.0, 1.0, float("nan")])  # the last row is padding


class Told(nn.Module):
    """A model whose outputs are its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.numbers = nn.Parameter(FOUND.clone())

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.numbers[:, None])


@pytest.mark.parametrize(
    ("settings", "cost"),
    [
        ({}, lambda error: error**2),
        ({"loss": "absolute"}, np.abs),
        (
            {"loss": "huber", "huber_delta": 2.0},
            lambda error: np.where(np.abs(error) <= 2, error**2 / 2, 2 * (np.abs(error) - 2 / 2)),
        ),
    ],
)
def test_an_error_costs_what_the_settings_say(
    settings: dict[str, Any], cost: Callable[[Any], Any]
) -> None:
    model = Told()
    task = make_task({"name": "regression", **settings})
    objective = task.objective(model)
    terms, output = objective({"input_ids": torch.zeros(4, 1), "labels": WANTED})
    errors = (FOUND - WANTED).numpy()[:3]
    loss, count = terms["loss"]
    assert (loss.item(), count.item()) == (pytest.approx(cost(errors).sum()), 3)
    assert output == {}  # training needs no more
    loss.backward()
    assert model.numbers.grad is not None
    slopes = (cost(errors + 1e-4) - cost(errors - 1e-4)) / 2e-4
    assert model.numbers.grad.tolist() == pytest.approx([*slopes, 0.0], abs=1e-2)


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="huber_delta = 2 is of loss = huber"):
        make_task({"name": "regression", "huber_delta": 2.0})
