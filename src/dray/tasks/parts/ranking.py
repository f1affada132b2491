"""Ranking the whole vocabulary for a row: which token comes next, of all those that the row has not
had yet. Nothing is sampled: what is measured is the rank among all tokens.

Of a body and a plain projection only the rows' last places go through the projection.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dray.tasks.parts.metrics import total
from dray.tasks.parts.objectives import NextTokenLoss
from dray.tasks.parts.ratio_scores import Ratios
from dray.tasks.rows import FIRST_WORD, IGNORED
from dray.tasks.task import Batch, Output, Terms


class NextOfAllLoss(NextTokenLoss):
    """A causal model of whole words and the summed cross entropy of each row's next ones. Where no
    gradient is wanted, it is of each row's last one alone, with its rank among all words, and with
    the `num_told` likeliest words to follow the row.

    A batch has `input_ids` and `labels` [rows, width], `last` [rows], the place of each row's last
    word (-1 for rows of padding), and `before` [rows, any], further words that a row has had (0:
    none). `repeats`: words that a row has had may come again; else they are ranked
    behind all others.
    """

    def __init__(
        self, model: Any, label_smoothing: float = 0.0, *, num_told: int, repeats: bool
    ) -> None:
        super().__init__(model, label_smoothing)
        self.num_told, self.repeats = num_told, repeats

    def forward(self, batch: Batch) -> tuple[Terms, Output]:
        if torch.is_grad_enabled():
            return super().forward(batch)
        ids, last = batch["input_ids"], batch["last"]
        places = torch.stack([last - 1, last], dim=1).clamp(min=0)
        logits = self._logits_at(ids, places)
        rows = torch.arange(len(ids), device=ids.device)
        targets = ids[rows, last.clamp(min=0)]
        measured, known = last > 0, (last > 0) & (targets >= FIRST_WORD)
        labels = torch.where(known, targets, IGNORED)
        loss = F.cross_entropy(logits[:, 0], labels, ignore_index=IGNORED, reduction="sum")
        ranks = self._ranks(logits[:, 0], targets, self._seen(batch, places[:, 0]))
        told = logits[:, 1].softmax(dim=-1)
        if not self.repeats:
            told = told.scatter(1, self._seen(batch, last), 0.0)
        told[:, :FIRST_WORD] = 0.0
        best = told.topk(min(self.num_told, told.shape[1] - FIRST_WORD), dim=-1)
        return {"loss": (loss, known.sum())}, {
            "loss_sum": loss,
            "measured": measured,
            "ranks": torch.where(known, ranks, 0),
            "told": best.indices,
            "scores": best.values,
        }

    def _logits_at(self, ids: Tensor, places: Tensor) -> Tensor:
        """Logits at some places of each row: [rows, places, vocabulary], fp32."""
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        if self.projection is None:
            every: Tensor = self.model(input_ids=ids).logits
            return every[rows, places].float()
        hidden = self.model.get_submodule(self.body_name)(input_ids=ids)[0]
        # The model's own module is called, so that ZeRO-3 finds that its weights are wanted.
        product: Tensor = self.model.get_output_embeddings()(hidden[rows, places])
        return self.projection.rule.logits(product.float())

    @staticmethod
    def _seen(batch: Batch, last: Tensor) -> Tensor:
        """The words of each row up to a place, and those before: [rows, any]; 0 where there is
        none."""
        ids = batch["input_ids"]
        inside = torch.arange(ids.shape[1], device=ids.device) <= last[:, None]
        return torch.cat([ids.masked_fill(~inside, 0), batch["before"]], dim=1)

    def _ranks(self, logits: Tensor, targets: Tensor, seen: Tensor) -> Tensor:
        """The rank of each target from 1 on, among the words that it might be; of equal ones the
        target is the last, so that a model which tells nothing apart gains nothing by it."""
        own = logits.gather(1, targets[:, None])
        others = logits.clone()
        if not self.repeats:
            others.scatter_(1, seen, -math.inf)
            # What has been had is told to nobody: where it comes again, that is a miss.
            own = own.masked_fill((seen == targets[:, None]).any(dim=1, keepdim=True), -math.inf)
        others[:, :FIRST_WORD] = -math.inf
        others.scatter_(1, targets[:, None], -math.inf)
        # A number that is none is not below any: a model that has diverged ranks nothing first.
        return 1 + (~(others < own)).sum(dim=1)


class RankMetrics:
    """Of the rank of each row's last word among all: how often it is one of the first ten."""

    names = ("loss", "hr_10", "ndcg_10", "mrr")

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._ranks: list[int] = []

    def update(self, batch: Batch, output: Output) -> None:
        self._losses.append(float(output["loss_sum"]))
        self._ranks += output["ranks"][output["measured"]].tolist()

    def state(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "ranks": list(self._ranks)}

    def merge(self, states: Iterable[dict[str, Any]]) -> Self:
        for state in states:
            self._losses += state["losses"]
            self._ranks += state["ranks"]
        return self

    def compute(self) -> dict[str, float]:
        """`loss` (nats a word that the vocabulary has), `hr_10` (share of ranks up to 10),
        `ndcg_10` (1 / log2(1 + rank) of these: with one wanted word the ideal is 1), `mrr` (mean of
        1 / rank), `num_targets`. A word that the vocabulary has not is a miss."""
        if not self._ranks:
            return dict.fromkeys((*self.names, "num_targets"), 0.0)
        known = [rank for rank in self._ranks if rank > 0]
        first = [rank for rank in known if rank <= 10]
        count, loss = len(self._ranks), total(self._losses) / max(1, len(known))
        gains = math.fsum(1 / math.log2(1 + rank) for rank in first)
        return {
            "loss": loss,
            "hr_10": len(first) / count,
            "ndcg_10": gains / count,
            "mrr": math.fsum(1 / rank for rank in known) / count,
            "num_targets": float(count),
        }

    def scores(self, labels: Sequence[str]) -> Ratios:
        """Of each row that is measured, what its rank is worth."""
        ranks = np.array(self._ranks, np.float64)
        ones, known = np.ones(len(ranks)), np.where(ranks > 0, ranks, np.inf)
        worth = {
            "hr_10": (known <= 10).astype(np.float64),
            "ndcg_10": np.where(known <= 10, 1 / np.log2(1 + known), 0.0),
            "mrr": 1 / known,
        }
        sums = {name: (values, ones) for name, values in worth.items()}
        return Ratios(sums, "mrr", is_loss=False, of="sequence", aligned=False)

    def undefined(self) -> tuple[str, ...]:
        if not self._ranks:
            return self.names
        return () if any(self._ranks) else ("loss",)
