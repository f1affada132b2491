"""Metrics that tasks share: sums over the batches of a validation, which add up over ranks in any
order."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dray.tasks.task import IGNORED, Batch, Output


class TokenMetrics:
    """Summed loss, targets and correctly predicted tokens."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._num_targets = 0
        self._num_correct = 0

    def update(self, batch: Batch, output: Output) -> None:
        self._losses.append(float(output["loss_sum"]))
        self._num_targets += int((batch["labels"] != IGNORED).sum())
        self._num_correct += int(output["num_correct"])

    def state(self) -> dict[str, Any]:
        return {
            "losses": list(self._losses),
            "num_targets": self._num_targets,
            "num_correct": self._num_correct,
        }

    def merge(self, states: Iterable[dict[str, Any]]) -> TokenMetrics:
        for state in states:
            self._losses += state["losses"]
            self._num_targets += state["num_targets"]
            self._num_correct += state["num_correct"]
        return self

    def compute(self) -> dict[str, float]:
        """`loss` (nats a token), `perplexity`, `accuracy` (share of tokens predicted first),
        `num_targets`."""
        count = max(1, self._num_targets)
        loss = (
            math.fsum(self._losses) / count
        )  # exact, so independent of the order of batches and ranks
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": self._num_correct / count,
            "num_targets": float(self._num_targets),
        }

    def undefined(self) -> tuple[str, ...]:
        return () if self._num_targets else ("loss", "perplexity", "accuracy", "bits_per_byte")


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


def bits_per_byte(mean_loss: float, num_tokens: int, num_text_bytes: int) -> float:
    """Bits needed for a byte of text by a model that loses `mean_loss` nats a token on text of
    `num_tokens` tokens.

    Comparable across tokenisers, and with a compressor's ratio. The first token of each row, which
    no loss covers, is charged at the mean. Raises ValueError if there is no text.
    """
    if num_text_bytes <= 0:
        raise ValueError(f"num_text_bytes = {num_text_bytes}: there is no text to measure on")
    return mean_loss * num_tokens / math.log(2) / num_text_bytes
