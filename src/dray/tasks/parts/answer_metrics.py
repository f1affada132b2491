"""Metrics of answers, of rows gathered over all ranks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
import torch

from dray.tasks.parts.answer_objectives import good_or_bad_losses
from dray.tasks.parts.metrics import Gathered, total
from dray.tasks.parts.ratio_scores import Ratios
from dray.tasks.task import Batch, Output


class PairMetrics(Gathered):
    """Of pairs: the loss, how often the preferred answer has the greater reward or score, and by
    how much; with a reference, how much likelier both answers have become (`kl`)."""

    def __init__(self, names: Sequence[str], values: str) -> None:
        super().__init__()
        self.names, self._values = tuple(names), values

    def update(self, batch: Batch, output: Output) -> None:
        real = batch["real"]
        self._losses += output["losses"][real].tolist()
        values = output[self._values][real]
        drift = values.new_zeros(len(values))
        if "kl" in self.names:
            drift = (output["log_probs"] - batch["reference"])[real].mean(dim=1)
        self._wanted += [1] * len(values)
        self._found += torch.cat([values, drift[:, None]], dim=1).tolist()

    def _measure(self) -> dict[str, float]:
        first, second, drifts = zip(*self._found, strict=True)
        gaps = [one - other for one, other in zip(first, second, strict=True)]
        # Two answers that the model does not tell apart are half right.
        right = statistics.fmean((gap > 0) + 0.5 * (gap == 0) for gap in gaps)
        found = {"accuracy": right, "margin": statistics.fmean(gaps)}
        if "chosen_reward" in self.names:
            found |= {
                "chosen_reward": statistics.fmean(first),
                "rejected_reward": statistics.fmean(second),
            }
        return found | ({"kl": statistics.fmean(drifts)} if "kl" in self.names else {})

    def scores(self, labels: Sequence[str]) -> Ratios:
        """Of each pair its loss, whether the preferred answer wins, and by how much."""
        first, second, _ = np.array(self._found, np.float64).reshape(-1, 3).T
        right = (first > second) + 0.5 * (first == second)
        ones = np.ones(len(first))
        losses = np.array(self._losses, np.float64)
        return Ratios(
            {"loss": (losses, ones), "accuracy": (right, ones), "margin": (first - second, ones)},
            "loss",
            of="pair",
        )


class GoodOrBadMetrics(Gathered):
    """Of answers that are good or bad: the loss with the baseline of all rows (`kl`), how often a
    good one's reward lies above it or a bad one's below, and the gap between their means."""

    names = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "kl")

    def __init__(self, beta: float, weights: tuple[float, float]) -> None:
        super().__init__()
        self._beta, self._weights = beta, weights

    def update(self, batch: Batch, output: Output) -> None:
        real = batch["real"]
        self._wanted += batch["good"][real].tolist()
        self._found += output["ratios"][real].double().tolist()

    def compute(self) -> dict[str, float]:
        found = super().compute()
        return found if not self._wanted else found | {"loss": self._loss()}

    def _loss(self) -> float:
        ratios = torch.tensor(self._found, dtype=torch.float64)
        good = torch.tensor(self._wanted, dtype=torch.bool)
        baseline = ratios[:, 1].mean()
        losses = good_or_bad_losses(ratios[:, 0], good, baseline, self._beta, self._weights)
        return total(losses.tolist()) / len(self._wanted)

    def _measure(self) -> dict[str, float]:
        baseline = max(0.0, statistics.fmean(other for _, other in self._found))
        rewards = [self._beta * own for own, _ in self._found]
        kinds = [
            [reward for reward, good in zip(rewards, self._wanted, strict=True) if good == wanted]
            for wanted in (True, False)
        ]
        good, bad = (statistics.fmean(kind) if kind else math.nan for kind in kinds)
        right = sum(
            (reward > self._beta * baseline) == good
            for reward, good in zip(rewards, self._wanted, strict=True)
        )
        return {
            "accuracy": right / len(rewards),
            "margin": good - bad,
            "chosen_reward": good,
            "rejected_reward": bad,
            "kl": statistics.fmean(other for _, other in self._found),
        }

    def undefined(self) -> tuple[str, ...]:
        if not self._wanted:
            return self.names
        kinds = {True: "chosen_reward", False: "rejected_reward"}
        missing = tuple(name for kind, name in kinds.items() if kind not in self._wanted)
        return ("margin", *missing) if missing else ()


class RewardMetrics(Gathered):
    """Of answers that were written to prompts: the mean `reward` (the loss is minus it), the mean
    of each prompt's best, the share of prompts whose answers are not all worth the same (`varied`:
    only these teach), and the mean `length` in tokens."""

    names = ("loss", "reward", "best_reward", "varied", "length")

    def update(self, batch: Batch, output: Output) -> None:
        real = batch["real"]
        self._wanted += [1] * int(real.sum())
        rewards, lengths = output["rewards"][real].double(), output["lengths"][real].double()
        best, least = rewards.amax(dim=1), rewards.amin(dim=1)
        self._losses += (-rewards.mean(dim=1)).tolist()
        self._found += torch.stack(
            [rewards.mean(dim=1), best, (best > least).double(), lengths.mean(dim=1)], dim=1
        ).tolist()

    def _measure(self) -> dict[str, float]:
        columns = zip(*self._found, strict=True)
        return {
            name: statistics.fmean(values)
            for name, values in zip(self.names[1:], columns, strict=True)
        }

    def scores(self, labels: Sequence[str]) -> Ratios:
        """Of each prompt what its answers are worth."""
        columns = np.array(self._found, np.float64).reshape(-1, 4).T
        ones = np.ones(columns.shape[1])
        sums = {name: (values, ones) for name, values in zip(self.names[1:], columns, strict=True)}
        return Ratios(sums, "reward", is_loss=False, of="prompt")
