"""Two towers: a vector and a bias for each of two names, and the number that they make together.

One model is both towers: the names of either side have tokens of their own, so that its embedding
is a table for each, and what follows is shared.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dray.tasks.parts.metrics import NumberMetrics
from dray.tasks.rows import UNKNOWN_WORD
from dray.tasks.task import Batch, Output, Terms


class TowersLoss(nn.Module):
    """A model of rows of one token that puts out a vector and a bias, and the summed squared error
    of low + (high - low) · sigmoid(u·v / √size + both biases).

    A batch has `input_ids` [rows, 2], `labels` [rows], NaN for rows without one, and `hidden`
    [rows, 2]: which names are taken as unknown in training, so that there is something to say of
    those that nobody knows.
    """

    def __init__(self, model: Any, low: float, high: float) -> None:
        super().__init__()
        self.model, self.low, self.high = model, low, high

    def forward(self, batch: Batch) -> tuple[Terms, Output]:
        ids = batch["input_ids"]
        if self.training:
            ids = ids.masked_fill(batch["hidden"], UNKNOWN_WORD)
        found = self.rate(ids)
        real = batch["labels"].isfinite()
        errors = torch.where(real, found - batch["labels"].nan_to_num(), 0.0)
        loss = errors.square().sum()
        terms: Terms = {"loss": (loss, real.sum())}
        return terms, {} if torch.is_grad_enabled() else {"loss_sum": loss, "numbers": found}

    def rate(self, ids: Tensor) -> Tensor:
        """The rating [rows] that each pair of a user and an item, [rows, 2], has."""
        single = ids.reshape(-1, 1)
        mask = torch.ones_like(single)
        sides = self.model(input_ids=single, attention_mask=mask).logits.float()
        first, second = sides.view(len(ids), 2, -1).unbind(dim=1)
        nearness = (first[:, 1:] * second[:, 1:]).sum(dim=-1) / math.sqrt(first.shape[1] - 1)
        number = nearness + first[:, 0] + second[:, 0]
        return self.low + (self.high - self.low) * torch.sigmoid(number)


class RatingMetrics(NumberMetrics):
    """Of numbers, with the root of their mean squared error."""

    names = (*NumberMetrics.names, "rmse")

    def _measure(self) -> dict[str, float]:
        values = super()._measure()
        return {**values, "rmse": math.sqrt(values["mse"])}
