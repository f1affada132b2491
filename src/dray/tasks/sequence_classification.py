"""One label a document: sentiment, topic, language. Rows are documents, padded to the longest of
their batch.

The corpus keeps rows of like length together, so little of a batch is padding. The model pools as
its architecture does: encoders their own way, decoders at the last token that is not padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dray.tasks.columns import integer_column, real_rows, token_matrix
from dray.tasks.losses import summed_cross_entropy
from dray.tasks.task import IGNORED, Batch, Output, TaskMetrics, Terms

if TYPE_CHECKING:
    import pyarrow as pa


class SequenceClassification:
    """Prediction of a document's label among `num_labels`."""

    name = "sequence_classification"

    def __init__(self, num_labels: int = 2, pad_token_id: int | None = None) -> None:
        self.num_labels = num_labels
        self._pad_token_id = pad_token_id

    def collate(self, table: pa.Table) -> Batch:
        """`input_ids` and `attention_mask` [rows, width], `labels` [rows], all int64; padding rows
        are IGNORED."""
        num_tokens, real = integer_column(table, "num_tokens"), real_rows(table)
        tokens = token_matrix(table)
        longest = int((num_tokens * real).max()) if table.num_rows else 0
        width = max(1, min(tokens.shape[1], longest))
        # A row without any token to attend to would give NaN, also in the gradients of its
        # neighbours.
        num_tokens = num_tokens.clamp(min=1)
        mask = torch.arange(width)[None, :] < num_tokens[:, None]
        input_ids = tokens[:, :width].contiguous()
        if self._pad_token_id is not None:
            input_ids = input_ids.masked_fill(~mask, self._pad_token_id)
        labels = integer_column(table, "label").masked_fill(~real, IGNORED)
        return {"input_ids": input_ids, "attention_mask": mask.long(), "labels": labels}

    def num_targets(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def objective(self, model: Any, label_smoothing: float = 0.0) -> nn.Module:
        return LabelLoss(model, label_smoothing)

    def new_metrics(self) -> TaskMetrics:
        return ClassificationMetrics(self.num_labels)


class LabelLoss(nn.Module):
    """A classifier with its loss, as `NextTokenLoss` for language models."""

    def __init__(self, model: Any, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch) -> tuple[Terms, Output]:
        logits = self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
        smoothing = self.label_smoothing if self.training else 0.0
        loss = summed_cross_entropy(logits, batch["labels"], smoothing)
        terms: Terms = {"loss": (loss, (batch["labels"] != IGNORED).sum())}
        if torch.is_grad_enabled():
            return terms, {}
        return terms, {"loss_sum": loss, "scores": torch.softmax(logits.float(), dim=-1)}


class ClassificationMetrics:
    """Every document's label and scores: unlike means, ranks' AUCs do not add up."""

    def __init__(self, num_labels: int) -> None:
        self._num_labels = num_labels
        self._losses: list[float] = []
        self._labels: list[int] = []
        self._scores: list[list[float]] = []

    def update(self, batch: Batch, output: Output) -> None:
        real = batch["labels"] != IGNORED
        self._losses.append(float(output["loss_sum"]))
        self._labels += batch["labels"][real].tolist()
        self._scores += output["scores"][real].tolist()

    def state(self) -> dict[str, Any]:
        return {
            "losses": list(self._losses),
            "labels": list(self._labels),
            "scores": list(self._scores),
        }

    def merge(self, states: Iterable[dict[str, Any]]) -> ClassificationMetrics:
        for state in states:
            self._losses += state["losses"]
            self._labels += state["labels"]
            self._scores += state["scores"]
        return self

    def compute(self) -> dict[str, float]:
        """`loss`, `accuracy`, `precision`, `recall`, `f1`, `auc`, `num_targets`.

        With two classes the middle four are those of class 1, with more the unweighted mean over
        the classes that the documents or the guesses show (AUC: each class against the rest). `auc`
        is 0.5, what guessing gives, where the documents do not show every class.
        """
        if not self._labels:
            names = ("loss", "accuracy", "precision", "recall", "f1", "auc", "num_targets")
            return dict.fromkeys(names, 0.0)
        from sklearn.metrics import accuracy_score, precision_recall_fscore_support

        scores = torch.tensor(self._scores, dtype=torch.float64)
        guesses = scores.argmax(dim=-1).tolist()
        kind: dict[str, Any] = (
            {"average": "binary"} if self._num_labels == 2 else {"average": "macro"}
        )
        precision, recall, f1, _ = precision_recall_fscore_support(
            self._labels, guesses, zero_division=0.0, **kind
        )
        return {
            "loss": math.fsum(self._losses) / len(self._labels),
            "accuracy": float(accuracy_score(self._labels, guesses)),
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "auc": self._auc(scores),
            "num_targets": float(len(self._labels)),
        }

    def undefined(self) -> tuple[str, ...]:
        """The AUC without every class; with two classes what asks for documents of class 1, where
        there are none."""
        seen = set(self._labels)
        if not seen:
            return ("loss", "accuracy", "precision", "recall", "f1", "auc")
        positives = ("recall", "f1") if self._num_labels == 2 and 1 not in seen else ()
        return (*positives, "auc") if len(seen) < self._num_labels else ()

    def _auc(self, scores: Tensor) -> float:
        from sklearn.metrics import roc_auc_score

        if len(set(self._labels)) < self._num_labels:
            return 0.5
        if self._num_labels == 2:
            return float(roc_auc_score(self._labels, scores[:, 1].numpy()))
        shares = (scores / scores.sum(dim=-1, keepdim=True)).numpy()
        return float(roc_auc_score(self._labels, shares, multi_class="ovr", average="macro"))
