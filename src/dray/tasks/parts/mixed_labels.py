"""The loss of rows that are each a mixture of two, and the metrics of classes of which only the
counts are kept: sums that stay small however many rows and classes there are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dray.tasks.parts.metrics import total
from dray.tasks.parts.scores import Classes
from dray.tasks.rows import IGNORED
from dray.tasks.task import Batch, Output, Terms

MOST_CLASSES_SHOWN = 20
"""Of as many classes a report has all confusions, of more the commonest of each."""


class MixedLabelLoss(nn.Module):
    """A classifier of rows, and the summed cross entropy of `labels` [rows]; where a batch has
    `other_labels` and `own_share` [rows], of both labels by their shares. Metrics get the
    logarithms of the probabilities.

    `inputs` names what of a batch the model is given; numbers that are no integers come in the
    precision of the model.
    """

    def __init__(self, model: Any, inputs: Sequence[str], label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.inputs = model, tuple(inputs)
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch) -> tuple[Terms, Output]:
        logits = self.model(**given_inputs(self.model, batch, self.inputs)).logits.float()
        labels = batch["labels"]
        losses = self._losses(logits, labels)
        if "other_labels" in batch:
            others = self._losses(logits, batch["other_labels"])
            losses = torch.lerp(others, losses, batch["own_share"])
        loss = losses.sum()
        terms: Terms = {"loss": (loss, (labels != IGNORED).sum())}
        if torch.is_grad_enabled():
            return terms, {}
        return terms, {"loss_sum": loss, "log_scores": torch.log_softmax(logits, dim=-1)}

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(
            logits, labels, ignore_index=IGNORED, label_smoothing=smoothing, reduction="none"
        )


def given_inputs(model: Any, batch: Batch, names: Sequence[str]) -> Batch:
    """What of a batch a model is given, in its own precision."""
    return {
        name: batch[name].to(model.dtype) if batch[name].is_floating_point() else batch[name]
        for name in names
    }


def likeliest(output: Output, labels: Sequence[str]) -> list[Any]:
    """Of each row the likeliest class, and the probability of each."""
    found = []
    for row in output["log_scores"].exp().tolist():
        scores = dict(zip(labels, row, strict=True))
        best = max(scores, key=lambda label: scores[label])
        found.append({"prediction": best, "scores": scores})
    return found


class ConfusionMetrics:
    """Counts of each class taken for each other, and of rows whose class was among the likeliest
    five."""

    names = ("loss", "accuracy", "top5", "precision", "recall", "f1")

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = tuple(labels)
        self._losses: list[float] = []
        self._counts: Counter[tuple[int, int]] = Counter()
        self._num_in_five = 0
        self._rows: list[tuple[int, list[float]]] | None = None

    def gather_rows(self) -> bool:
        """Keep each row's class and probabilities, too, from now on."""
        self._rows = []
        return False

    def update(self, batch: Batch, output: Output) -> None:
        real = batch["labels"] != IGNORED
        wanted, scores = batch["labels"][real], output["log_scores"][real]
        self._losses.append(float(output["loss_sum"]))
        if not len(wanted):
            return
        likeliest = scores.topk(min(5, scores.shape[1])).indices
        self._num_in_five += int((likeliest == wanted[:, None]).any(dim=1).sum())
        self._counts.update(zip(wanted.tolist(), likeliest[:, 0].tolist(), strict=True))
        if self._rows is not None:
            likely = scores.double().exp().tolist()
            self._rows += zip(wanted.tolist(), likely, strict=True)

    def state(self) -> dict[str, Any]:
        counts = [[*pair, count] for pair, count in self._counts.items()]
        kept = {} if self._rows is None else {"rows": [list(row) for row in self._rows]}
        return {
            "losses": list(self._losses),
            "counts": counts,
            "in_five": self._num_in_five,
            **kept,
        }

    def merge(self, states: Iterable[dict[str, Any]]) -> Self:
        for state in states:
            self._losses += state["losses"]
            for wanted, found, count in state["counts"]:
                self._counts[wanted, found] += count
            self._num_in_five += state["in_five"]
            if "rows" in state:
                self._rows = [*(self._rows or []), *map(tuple, state["rows"])]
        return self

    def scores(self, labels: Sequence[str]) -> Classes | None:
        """What was found of each row, where that was gathered."""
        if self._rows is None:
            return None
        found = np.array([likely for _, likely in self._rows], np.float64)
        wanted = np.array([place for place, _ in self._rows], np.int64)
        return Classes(wanted, found.argmax(axis=1), found, self._labels)

    def compute(self) -> dict[str, float]:
        """`loss` (nats a row), `accuracy`, `top5`, and the unweighted means of `precision`,
        `recall` and `f1` over the classes that rows or guesses show; `num_targets`."""
        num_rows = self._counts.total()
        if not num_rows:
            return dict.fromkeys((*self.names, "num_targets"), 0.0)
        loss = total(self._losses) / num_rows
        if not math.isfinite(loss):  # the first guess of a model that has diverged is none
            nothing = dict.fromkeys(self.names[1:], math.nan)
            return {"loss": loss, **nothing, "num_targets": float(num_rows)}
        precision, recall, f1, _ = self._scores("macro")
        right = sum(count for (wanted, found), count in self._counts.items() if wanted == found)
        return {
            "loss": loss,
            "accuracy": right / num_rows,
            "top5": self._num_in_five / num_rows,
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "num_targets": float(num_rows),
        }

    def undefined(self) -> tuple[str, ...]:
        return () if self._counts else self.names

    def report(self) -> dict[str, dict[str, float]]:
        """A row for each class that rows or guesses show: how well it is known, how often it is
        there, and as what it was taken how often."""
        if not self._counts:
            return {}
        shown = sorted({number for pair in self._counts for number in pair})
        table = zip(shown, *(values.tolist() for values in self._scores(None)), strict=True)
        return {
            self._labels[number]: {
                "precision": precision,
                "recall": recall,
                "f1": f1,
                "num": int(num),
                **self._confusions(number, shown),
            }
            for number, precision, recall, f1, num in table
        }

    def _confusions(self, wanted: int, shown: Sequence[int]) -> dict[str, float]:
        if len(shown) > MOST_CLASSES_SHOWN:
            wrong = {
                found: count
                for (other, found), count in self._counts.items()
                if other == wanted != found
            }
            shown = [max(wrong, key=lambda found: (wrong[found], -found))] if wrong else []
        return {f"as {self._labels[found]}": self._counts[wanted, found] for found in shown}

    def _scores(self, average: str | None) -> Any:
        from sklearn.metrics import precision_recall_fscore_support

        (wanted, found), counts = zip(*self._counts, strict=True), list(self._counts.values())
        return precision_recall_fscore_support(
            wanted, found, sample_weight=counts, average=average, zero_division=0.0
        )
