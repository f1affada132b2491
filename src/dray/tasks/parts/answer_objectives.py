"""Losses of answers around models: of pairs of which one is preferred, of answers that are good or
bad, and of rewards.

`log_probs` are those of whole answers, summed over their tokens, fp32. Losses are of each row; what
wraps a model sums them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dray.tasks.rows import IGNORED
from dray.tasks.task import Batch, Output, Terms


@dataclass(frozen=True)
class PairRule:
    """Which loss a pair has, and its numbers."""

    loss: str
    beta: float
    margin: float = 0.0
    """By how much the preferred answer's reward is to be the greater one (SimPO)."""
    flipped: float = 0.0
    """Share of the pairs that are taken to be the wrong way round (DPO, SimPO)."""


def pair_losses(
    rule: PairRule, log_probs: Tensor, reference: Tensor, num_tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of each pair [rows], and the rewards of its answers [rows, 2], the preferred one
    first: β times the log-ratio to the reference, or, where there is none, times the mean
    log-probability of a token.

    `log_probs`, `reference`, `num_tokens`: [rows, 2]. `dpo`: Rafailov et al. 2023, eq. 7, with the
    smoothing of Mitchell's note on conservative DPO; `ipo`: Azar et al. 2023, eq. 17, on means over
    tokens; `simpo`: Meng et al. 2024, eq. 6; `orpo`: Hong et al. 2024, eq. 6 and 7, β their λ, the
    likelihood of an answer the mean over its tokens. Raises KeyError for another.
    """
    means = log_probs / num_tokens.clamp(min=1)
    ratios = log_probs - reference
    if rule.loss == "dpo":
        rewards = rule.beta * ratios
        return _preference(rewards[:, 0] - rewards[:, 1], rule.flipped), rewards
    if rule.loss == "ipo":
        ratio_means = ratios / num_tokens.clamp(min=1)
        gap = ratio_means[:, 0] - ratio_means[:, 1]
        return (gap - 1 / (2 * rule.beta)).square(), rule.beta * ratios
    rewards = rule.beta * means
    if rule.loss == "simpo":
        return _preference(rewards[:, 0] - rewards[:, 1] - rule.margin, rule.flipped), rewards
    if rule.loss == "orpo":
        odds = means - _log_one_minus_exp(means)
        return -means[:, 0] - rule.beta * F.logsigmoid(odds[:, 0] - odds[:, 1]), rewards
    raise KeyError(rule.loss)


def _preference(gap: Tensor, flipped: float) -> Tensor:
    right = -F.logsigmoid(gap)
    return right if not flipped else (1 - flipped) * right - flipped * F.logsigmoid(-gap)


def _log_one_minus_exp(logs: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0, without losing digits at either end."""
    logs = logs.clamp(max=-torch.finfo(logs.dtype).eps)
    near = logs > -math.log(2)
    # Each side is given numbers of its own, or the other's gradient would be NaN.
    close = torch.log(-torch.expm1(torch.where(near, logs, -math.log(2))))
    far = torch.log1p(-torch.exp(torch.where(near, -math.log(2), logs)))
    return torch.where(near, close, far)


def good_or_bad_losses(
    ratios: Tensor, good: Tensor, baseline: Tensor, beta: float, weights: tuple[float, float]
) -> Tensor:
    """The loss of each answer [rows] by KTO (Ethayarajh et al. 2024, eq. 8): `ratios` to the
    reference [rows], which answers are `good` (bool), the `baseline` of all, at least 0, and the
    `weights` of good and bad ones."""
    gaps = beta * (ratios - baseline.clamp(min=0))
    return torch.where(
        good, weights[0] * (1 - torch.sigmoid(gaps)), weights[1] * (1 - torch.sigmoid(-gaps))
    )


def answer_log_probs(model: Any, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The log-probability of each answer, summed over its tokens (fp32), and their number:
    [rows, sequences] each. `temperature`: of what is drawn from the model's scores."""
    ids, labels = batch["input_ids"], batch["labels"]
    logits = model(
        input_ids=ids.flatten(0, 1), attention_mask=batch["attention_mask"].flatten(0, 1)
    ).logits
    scores = logits.flatten(0, 1).float() / temperature
    losses = F.cross_entropy(scores, labels.flatten(), ignore_index=IGNORED, reduction="none")
    return -losses.view(ids.shape).sum(dim=-1), (labels != IGNORED).sum(dim=-1)


class PairLoss(nn.Module):
    """A language model and the summed loss of pairs of answers (`pair_losses`)."""

    def __init__(self, model: Any, rule: PairRule) -> None:
        super().__init__()
        self.model, self.rule = model, rule

    def forward(self, batch: Batch) -> tuple[Terms, Output]:
        log_probs, num_tokens = answer_log_probs(self.model, batch)
        reference, real = batch["reference"], batch["real"]
        losses, rewards = pair_losses(self.rule, log_probs, reference, num_tokens)
        losses = torch.where(real, losses, 0.0)
        terms: Terms = {"loss": (losses.sum(), real.sum())}
        if torch.is_grad_enabled():
            return terms, {}
        return terms, {"losses": losses, "log_probs": log_probs, "rewards": rewards}


class GoodOrBadLoss(nn.Module):
    """A language model and the summed loss of answers that are good or bad
    (`good_or_bad_losses`).

    The second sequence of a row is its prompt with another one's answer: how much likelier those
    have become is the baseline. It is one number for a whole step, so it is found before
    (`Task.explores`), as the term `baseline`; a row by itself has none.
    """

    def __init__(self, model: Any, beta: float, weights: tuple[float, float]) -> None:
        super().__init__()
        self.model, self.beta, self.weights = model, beta, weights

    def forward(self, batch: Batch) -> tuple[Terms, Output]:
        real, reference = batch["real"], batch["reference"]
        learns = torch.is_grad_enabled()  # the baseline is known then, and the first is enough
        sequences = {
            name: batch[name][:, :1] if learns else batch[name]
            for name in ("input_ids", "attention_mask", "labels")
        }
        log_probs, _ = answer_log_probs(self.model, sequences)
        ratios = log_probs - reference[:, : log_probs.shape[1]]
        drift = torch.where(real, ratios[:, -1], 0.0).sum()
        baseline = batch["baseline"] if learns else drift / real.sum().clamp(min=1)
        losses = good_or_bad_losses(ratios[:, 0], batch["good"], baseline, self.beta, self.weights)
        terms: Terms = {"loss": (torch.where(real, losses, 0.0).sum(), real.sum())}
        if learns:
            return terms, {}
        terms["baseline"] = (drift, real.sum())
        return terms, {"log_probs": log_probs, "ratios": ratios}


class ScoreLoss(nn.Module):
    """A model of one score a sequence, and the summed loss of pairs of which the first one is to
    have the greater score: Bradley and Terry's, -log σ(difference)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Terms, Output]:
        ids, real = batch["input_ids"], batch["real"]
        found = self.model(
            input_ids=ids.flatten(0, 1), attention_mask=batch["attention_mask"].flatten(0, 1)
        ).logits.float()
        scores = found[:, 0].view(ids.shape[:2])
        losses = torch.where(real, -F.logsigmoid(scores[:, 0] - scores[:, -1]), 0.0)
        terms: Terms = {"loss": (losses.sum(), real.sum())}
        return terms, {} if torch.is_grad_enabled() else {"losses": losses, "scores": scores}
