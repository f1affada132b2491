"""The loss of a classifier that keeps to rules, more or less, and how far it does (Hu, Ma, Liu,
Hovy and Xing, 2016: Harnessing Deep Neural Networks with Logic Rules)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from dray.tasks.parts.classes import ClassLoss
from dray.tasks.parts.metrics import ClassificationMetrics, total
from dray.tasks.parts.rules import ABSTAINS
from dray.tasks.rows import IGNORED, VOTES
from dray.tasks.task import Batch, Output


class RuleLoss(ClassLoss):
    """A classifier of rows whose loss is, in training, (1 - share) · its own (class weights, focal
    factor and smoothing are of that) + share · the cross entropy of p, what the model gives, and

        q(y) ∝ p(y) · exp(-strength · Σ weights of the rules that vote for another label than y),

    through which no gradient goes. Where no rule votes q is p, and that part teaches nothing.

    A batch has VOTES [rows, rules]: places among the rules' labels, or ABSTAINS. `classes`: the
    class of each such place; `rule_weights`: of each rule.
    """

    def __init__(
        self,
        model: Any,
        label_smoothing: float = 0.0,
        *,
        classes: Sequence[int],
        rule_weights: Sequence[float],
        share: float,
        strength: float,
        weights: Sequence[float] | None = None,
        focal: float = 0.0,
    ) -> None:
        super().__init__(model, label_smoothing, weights=weights, focal=focal)
        self.classes = torch.tensor(classes)
        self.rule_weights = torch.tensor(rule_weights, dtype=torch.float32)
        self.share, self.strength = share, strength

    def _learnt(self, losses: Tensor, logits: Tensor, batch: Batch) -> Tensor:
        if not (self.training and self.share):
            return losses
        imitated = self._imitation(logits, batch[VOTES])
        return (1 - self.share) * losses + self.share * imitated

    def _imitation(self, logits: Tensor, votes: Tensor) -> Tensor:
        """The cross entropy of each row and its corrected distribution."""
        likely = logits.log_softmax(dim=-1)
        broken = self._broken(votes, logits.shape[-1])
        wanted = (likely.detach() - self.strength * broken).softmax(dim=-1)
        return -(wanted * likely).sum(dim=-1)

    def _broken(self, votes: Tensor, num_classes: int) -> Tensor:
        """The weights together of the rules that each class would break, [rows, classes]."""
        voted = self.classes.to(votes.device)[votes.clamp(min=0)]
        weights = self.rule_weights.to(votes.device) * (votes != ABSTAINS)
        # No scatter: on a GPU its sums would have another order each time.
        breaks = voted[..., None] != torch.arange(num_classes, device=votes.device)
        return (weights[..., None] * breaks).sum(dim=1)


class RuleMetrics(ClassificationMetrics):
    """Those of classes, and `rules_broken`: the mean over all votes of the probability that the
    model gives to other labels than the rule's. `classes` as in the loss."""

    names = (*ClassificationMetrics.names, "rules_broken")

    def __init__(self, num_labels: int, rules: Sequence[str], classes: Sequence[int]) -> None:
        super().__init__(num_labels)
        self._classes = torch.tensor(classes)
        self._broken: dict[str, list[float]] = {rule: [] for rule in rules}

    def update(self, batch: Batch, output: Output) -> None:
        super().update(batch, output)
        real = batch["labels"] != IGNORED
        votes, scores = batch[VOTES][real].cpu(), output["scores"][real].double().cpu()
        others = 1 - scores.gather(1, self._classes[votes.clamp(min=0)])
        for place, broken in enumerate(self._broken.values()):
            broken += others[votes[:, place] != ABSTAINS, place].tolist()

    def state(self) -> dict[str, Any]:
        broken = {rule: list(values) for rule, values in self._broken.items()}
        return {**super().state(), "broken": broken}

    def merge(self, states: Iterable[dict[str, Any]]) -> Self:
        for state in states:
            super().merge([state])
            for rule, values in state["broken"].items():
                self._broken[rule] += values
        return self

    def _measure(self) -> dict[str, float]:
        every = [value for values in self._broken.values() for value in values]
        return {**super()._measure(), "rules_broken": total(every) / max(1, len(every))}

    def undefined(self) -> tuple[str, ...]:
        found = super().undefined()
        if any(self._broken.values()) or "rules_broken" in found:
            return found
        return (*found, "rules_broken")

    def report(self) -> dict[str, dict[str, float]]:
        """By rule how far it is broken, and how often it votes."""
        return {
            f"rule {rule}": {"broken": total(values) / len(values), "num": float(len(values))}
            for rule, values in self._broken.items()
            if values
        }
