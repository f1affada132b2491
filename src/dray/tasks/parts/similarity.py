"""Texts as vectors of length 1, near each other where texts belong together: the loss over a pool
of pairs, and how well one text of a pair finds the other.

The pool is a whole global batch (`Task.pools`): what is nearest depends on no rank and no micro
batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dray.tasks.parts.metrics import total
from dray.tasks.parts.ratio_scores import Ratios
from dray.tasks.task import Batch, Output, Terms

ROWS_AT_ONCE = 1024
"""Texts that are compared with all others at a time."""


def contrastive_losses(pooled: Tensor, temperature: float, label_smoothing: float = 0.0) -> Tensor:
    """The loss of each pair, [pairs], of vectors [pairs, 2, size]: the mean over both directions of
    the cross entropy of finding the other text among those of all pairs, by cosines over the
    temperature (InfoNCE: van den Oord et al., 2018)."""
    cosines = pooled[:, 0] @ pooled[:, 1].T / temperature
    own = torch.arange(len(pooled), device=pooled.device)
    forth, back = (
        F.cross_entropy(side, own, reduction="none", label_smoothing=label_smoothing)
        for side in (cosines, cosines.T)
    )
    return (forth + back) / 2


class PairVectors(nn.Module):
    """A body and the vectors of the texts of a batch, `pooled` [rows, 1 or 2, size], fp32: the mean
    of the tokens' hidden states, or the first token's, made one long.

    The loss term is of the batch's own pairs; that of a global batch is made of what all ranks
    have pooled.
    """

    def __init__(
        self, model: Any, *, temperature: float, pooling: Literal["mean", "first"]
    ) -> None:
        super().__init__()
        self.model, self.temperature, self.pooling = model, temperature, pooling

    def forward(self, batch: Batch) -> tuple[Terms, Output]:
        real = batch["real"]
        # The first texts of all rows, then the second ones.
        vectors = self.vectors(batch["input_ids"], batch["attention_mask"])
        pooled = vectors.view(-1, len(real), vectors.shape[-1]).transpose(0, 1)
        if pooled.shape[1] == 1:
            return {}, {"pooled": pooled}
        loss = contrastive_losses(pooled[real], self.temperature).sum()
        return {"loss": (loss, real.sum())}, {"pooled": pooled}

    def vectors(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The vector of each text, [texts, size], fp32 and of length 1."""
        states = self.model(input_ids=input_ids, attention_mask=attention_mask)[0].float()
        if self.pooling == "mean":
            weights = attention_mask[:, :, None].float()
            found = (states * weights).sum(dim=1) / weights.sum(dim=1)
        else:
            found = states[:, 0]
        return F.normalize(found, dim=-1)


class RetrievalMetrics:
    """Of all pairs of a validation: the place of each second text among those of all pairs, by
    their nearness to the first."""

    names = ("loss", "recall_1", "recall_10", "mrr")

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._vectors: list[npt.NDArray[np.float32]] = []

    def update(self, batch: Batch, output: Output) -> None:
        self._vectors.append(output["pooled"][batch["real"]].float().cpu().numpy())

    def state(self) -> dict[str, Any]:
        return {"vectors": list(self._vectors)}

    def merge(self, states: Iterable[dict[str, Any]]) -> Self:
        for state in states:
            self._vectors += state["vectors"]
        return self

    def compute(self) -> dict[str, float]:
        """`loss` (nats, over all pairs as one pool), `recall_1` and `recall_10` (share of pairs
        whose second text is the nearest, or one of the ten nearest), `mrr` (mean of 1 / place),
        `num_targets`. Of texts that are equally near the wanted one comes last."""
        if not self._num_pairs:
            return dict.fromkeys((*self.names, "num_targets"), 0.0)
        vectors = torch.from_numpy(np.concatenate(self._vectors))
        if not bool(vectors.isfinite().all()):
            nothing = dict.fromkeys(self.names, math.nan)
            return {**nothing, "num_targets": float(self._num_pairs)}
        losses, places = self._look_up(vectors)
        count = len(places)
        return {
            "loss": total(losses) / count,
            "recall_1": sum(place <= 1 for place in places) / count,
            "recall_10": sum(place <= 10 for place in places) / count,
            "mrr": math.fsum(1 / place for place in places) / count,
            "num_targets": float(count),
        }

    def _look_up(self, vectors: Tensor) -> tuple[list[float], list[int]]:
        losses: list[float] = []
        places: list[int] = []
        for first in range(0, len(vectors), ROWS_AT_ONCE):
            rows = torch.arange(first, min(first + ROWS_AT_ONCE, len(vectors)))
            for side in (0, 1):
                cosines = vectors[rows, side] @ vectors[:, 1 - side].T
                found = F.cross_entropy(cosines / self._temperature, rows, reduction="none")
                losses += (found / 2).tolist()
                if side == 0:
                    own = cosines.gather(1, rows[:, None])
                    places += (cosines >= own).sum(dim=1).tolist()
        return losses, places

    @property
    def _num_pairs(self) -> int:
        return sum(len(part) for part in self._vectors)

    def scores(self, labels: Sequence[str]) -> Ratios:
        """Of each pair, the place of its second text among those of all pairs: rows that are drawn
        again, or left out, stay among them."""
        vectors = torch.from_numpy(np.concatenate(self._vectors))
        _, found = self._look_up(vectors)
        places = np.array(found, np.float64)
        worth = {
            "recall_1": (places <= 1).astype(np.float64),
            "recall_10": (places <= 10).astype(np.float64),
            "mrr": 1 / places,
        }
        ones = np.ones(len(places))
        sums = {name: (values, ones) for name, values in worth.items()}
        return Ratios(sums, "mrr", is_loss=False, of="pair")

    def undefined(self) -> tuple[str, ...]:
        return () if self._num_pairs else self.names
