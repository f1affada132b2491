"""Classes that are more than names: of unlike weight, in an order, or with paths such as a/b/c; and
the metrics that go with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dray.tasks.parts.metrics import ClassificationMetrics
from dray.tasks.parts.objectives import LabelLoss, model_inputs
from dray.tasks.parts.scores import Classes
from dray.tasks.rows import IGNORED
from dray.tasks.task import Batch, Output, Terms

PATH_SEPARATOR = "/"


class ClassLoss(LabelLoss):
    """A classifier of rows, and the cross entropy of the labels times their class' weight, with the
    focal factor (1 - p)^focal, p the probability of the label (Lin et al., 2017)."""

    def __init__(
        self,
        model: Any,
        label_smoothing: float = 0.0,
        *,
        weights: Sequence[float] | None = None,
        focal: float = 0.0,
    ) -> None:
        super().__init__(model, label_smoothing)
        # No buffer: it is no part of the model, and keeps fp32 where the model does not.
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        self.focal = focal

    def forward(self, batch: Batch) -> tuple[Terms, Output]:
        logits = self.model(**model_inputs(batch, self.takes_segments)).logits.float()
        labels = batch["labels"]
        real = labels != IGNORED
        chosen = labels.clamp(min=0)
        losses = self._losses(logits, chosen)
        if self.weights is not None:
            losses = losses * self.weights.to(logits.device)[chosen]
        loss = torch.where(real, self._learnt(losses, logits, batch), 0.0).sum()
        terms: Terms = {"loss": (loss, real.sum())}
        if torch.is_grad_enabled():
            return terms, {}
        return terms, {"loss_sum": loss, "scores": self._scores(logits)}

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each row."""
        smoothing = self.label_smoothing if self.training else 0.0
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        if not self.focal:
            return losses
        likely = logits.log_softmax(dim=-1).gather(1, labels[:, None])[:, 0].exp()
        return losses * (1 - likely) ** self.focal

    def _learnt(self, losses: Tensor, logits: Tensor, batch: Batch) -> Tensor:
        """The loss of each row as it is learnt from."""
        return losses

    def _scores(self, logits: Tensor) -> Tensor:
        """Probabilities of the classes by id."""
        return torch.softmax(logits, dim=-1)


class OrdinalLoss(ClassLoss):
    """Classes in an order, by a cumulative link: of n classes n - 1 numbers fall from t_1 on, since
    each is the one before less a softplus, and P(rank > k) is the sigmoid of t_k, so that these
    never contradict each other. The loss is the binary cross entropy of the n - 1 questions whether
    the rank is above k (CORAL: Cao, Mirjalili and Raschka, 2020), smoothed towards a half.

    `ranks`: the place in the order of each class by id. The last of the model's n outputs has no
    part in it.
    """

    links = True
    """That the model's outputs are no logits of the classes."""

    def __init__(
        self,
        model: Any,
        label_smoothing: float = 0.0,
        *,
        ranks: Sequence[int],
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(model, label_smoothing, weights=weights)
        self.ranks = torch.tensor(ranks)

    @staticmethod
    def _above(logits: Tensor) -> Tensor:
        """Logits of P(rank > k): [rows, classes - 1]."""
        steps = F.softplus(logits[:, 1:-1]).cumsum(dim=-1)
        return logits[:, :1] - F.pad(steps, (1, 0))

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        ranks = self.ranks.to(logits.device)[labels]
        questions = torch.arange(logits.shape[1] - 1, device=logits.device)
        targets = (ranks[:, None] > questions).float()
        if self.training and self.label_smoothing:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / 2
        above = self._above(logits)
        return F.binary_cross_entropy_with_logits(above, targets, reduction="none").sum(dim=-1)

    def _scores(self, logits: Tensor) -> Tensor:
        above = F.pad(torch.sigmoid(self._above(logits)), (1, 0), value=1.0)
        by_rank = above - F.pad(above[:, 1:], (0, 1))
        return by_rank[:, self.ranks.to(logits.device)]


class PathLoss(ClassLoss):
    """Classes with paths: the mean over the levels of -log P(the path down to there), each the sum
    of the probabilities of the classes below it. A class whose path ends earlier stays itself.

    `groups` [levels, classes]: the number of what a class belongs to at each level (`path_groups`).
    """

    def __init__(
        self,
        model: Any,
        label_smoothing: float = 0.0,
        *,
        groups: Sequence[Sequence[int]],
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(model, label_smoothing, weights=weights)
        self.groups = torch.tensor(groups)

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        likely = logits.log_softmax(dim=-1)
        losses = torch.zeros_like(likely[:, 0])
        for level in self.groups.to(logits.device):
            inside = level[None, :] == level[labels][:, None]
            losses = losses - likely.masked_fill(~inside, -torch.inf).logsumexp(dim=-1)
        smoothing = self.label_smoothing if self.training else 0.0
        return (1 - smoothing) * losses / len(self.groups) - smoothing * likely.mean(dim=-1)


def balanced_weights(counts: Sequence[float]) -> list[float]:
    """Weights of classes by the documents of each: all together count the same, and the mean weight
    of a document is 1. Raises ValueError for a class without any."""
    if not all(count > 0 for count in counts):
        raise ValueError(f"every class needs documents; they have {list(counts)}")
    return [sum(counts) / (len(counts) * count) for count in counts]


def path_groups(labels: Sequence[str]) -> list[list[int]]:
    """For each level, down to the deepest path's last, the number of what each class belongs to
    there."""
    parts = [label.split(PATH_SEPARATOR) for label in labels]
    depth = max(map(len, parts), default=1)
    found = []
    for level in range(1, depth + 1):
        numbers: dict[tuple[str, ...], int] = {}
        found.append([numbers.setdefault(tuple(own[:level]), len(numbers)) for own in parts])
    return found


class OrdinalMetrics(ClassificationMetrics):
    """Of classes in an order: a guess is the median of what the model deems likely."""

    names = (*ClassificationMetrics.names, "mae", "kappa")

    def __init__(self, ranks: Sequence[int]) -> None:
        super().__init__(len(ranks))
        self._ranks = list(ranks)

    def _measure(self) -> dict[str, float]:
        """Beside those of classes `mae`, how many ranks guesses are off in the mean, and `kappa`,
        Cohen's with quadratic weights: 0 as by chance, 1 if all are right."""
        from sklearn.metrics import cohen_kappa_score

        ranks = torch.tensor(self._ranks)
        wanted = ranks[torch.tensor(self._wanted)]
        found = medians(torch.tensor(self._found, dtype=torch.float64), ranks)
        varies = len({*wanted.tolist(), *found.tolist()}) > 1
        kappa = (
            cohen_kappa_score(wanted.numpy(), found.numpy(), weights="quadratic") if varies else 0
        )
        return {
            **super()._measure(),
            "mae": float((wanted - found).abs().double().mean()),
            "kappa": float(kappa),
        }

    def scores(self, labels: Sequence[str]) -> Classes:
        """Those of classes, with their order."""
        return replace(super().scores(labels), ranks=tuple(self._ranks))

    def _guesses(self, scores: Tensor) -> list[int]:
        ranks = torch.tensor(self._ranks)
        by_rank: list[int] = ranks.argsort()[medians(scores, ranks)].tolist()
        return by_rank


def medians(scores: Tensor, ranks: Tensor) -> Tensor:
    """The rank of each row's median class: [rows] of scores [rows, classes]."""
    by_rank = scores[:, ranks.argsort()]
    above = 1 - by_rank.cumsum(dim=-1)[:, :-1]
    return (above > 0.5).sum(dim=-1)


class PathMetrics(ClassificationMetrics):
    """Of classes with paths: also by level, of the likeliest class' path."""

    names = (*ClassificationMetrics.names, "path_f1")

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__(len(labels))
        self._levels = torch.tensor(path_groups(labels))
        self._depths = torch.tensor([label.count(PATH_SEPARATOR) + 1 for label in labels])

    def _measure(self) -> dict[str, float]:
        """Beside those of classes `path_f1`: precision and recall are of each class' path counted
        as a set of all that lies on it (hierarchical F1: Kiritchenko et al., 2006)."""
        wanted, found = self._pairs()
        same = self._levels[:, wanted] == self._levels[:, found]
        level = torch.arange(len(self._levels))[:, None]
        on_both = (level < self._depths[wanted]) & (level < self._depths[found])
        shared = int((same & on_both).sum())
        sizes = int(self._depths[wanted].sum() + self._depths[found].sum())
        return {**super()._measure(), "path_f1": 2 * shared / sizes}

    def _pairs(self) -> tuple[Tensor, Tensor]:
        scores = torch.tensor(self._found, dtype=torch.float64)
        return torch.tensor(self._wanted), scores.argmax(dim=-1)

    def report(self) -> dict[str, dict[str, float]]:
        """Accuracy and mean F1 by level, from the top."""
        if not self._wanted:
            return {}
        from sklearn.metrics import f1_score

        wanted, found = self._pairs()
        told = {}
        for number, level in enumerate(self._levels, 1):
            right, guess = level[wanted].numpy(), level[found].numpy()
            told[f"level {number}"] = {
                "accuracy": float((right == guess).mean()),
                "f1": float(f1_score(right, guess, average="macro", zero_division=0.0)),
                "num": float(len(set(level.tolist()))),
            }
        return told


def class_weights(
    given: str | Mapping[str, float], labels: Sequence[str], counts: Mapping[str, float]
) -> list[float] | None:
    """The weight of each class by id: those given (1 where none is), or by the documents that each
    has in training; None where all count the same."""
    if isinstance(given, Mapping):
        return [float(given.get(label, 1.0)) for label in labels]
    if given == "balanced":
        return balanced_weights([counts.get(label, 0) for label in labels])
    return None
