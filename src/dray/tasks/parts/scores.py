"""What a model gave for each row that was measured, so that its metrics can be told of some rows:
of a slice, of a sample drawn again, of rows whose answers two models exchange.

scikit-learn and seqeval compute; a value that stands for nothing on the rows is NaN. Nothing here
knows a model, a task or a file.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
LEAST_PROBABILITY = 1e-7
"""What a smaller one counts as where its logarithm is taken: about fp32's own distance from 1."""


@dataclass(frozen=True)
class Scores(ABC):
    """Of rows in their order. `unit`: what one entry is of."""

    @property
    def unit(self) -> str:
        return "row"

    @property
    def is_aligned(self) -> bool:
        """Whether entry *i* is of row *i* of what was measured."""
        return True

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, rows: Ints) -> Self:
        """Those of some rows, in that order; one may be there several times."""

    @abstractmethod
    def join(self, other: Self) -> Self:
        """Those of both, one after the other."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Metrics by name; NaN for one that stands for nothing on these rows."""

    @abstractmethod
    def is_same_truth(self, other: Self) -> bool:
        """Whether both are of rows of which the same was wanted."""

    def costs(self) -> Floats:
        """How wrong the model is of each row: the greater, the worse."""
        raise NotImplementedError

    def correct(self) -> npt.NDArray[np.bool_] | None:
        """Whether each row's answer is the right one, where answers are right or wrong."""
        return None

    def by_label(self) -> Mapping[str, npt.NDArray[np.bool_]]:
        """The rows of each label, or of each quarter of what was wanted; empty: there are none."""
        return {}

    def told(self, row: int) -> dict[str, Any]:
        """What was wanted of a row and what the model gave."""
        raise NotImplementedError


@dataclass(frozen=True)
class Classes(Scores):
    """One class each: `wanted` and `guesses` [rows], `probabilities` [rows, classes]. `ranks`: each
    class' place, where they are in an order."""

    wanted: Ints
    guesses: Ints
    probabilities: Floats
    labels: tuple[str, ...]
    ranks: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.wanted)

    def take(self, rows: Ints) -> Self:
        return replace(
            self,
            wanted=self.wanted[rows],
            guesses=self.guesses[rows],
            probabilities=self.probabilities[rows],
        )

    def join(self, other: Self) -> Self:
        return replace(
            self,
            wanted=np.concatenate([self.wanted, other.wanted]),
            guesses=np.concatenate([self.guesses, other.guesses]),
            probabilities=np.concatenate([self.probabilities, other.probabilities]),
        )

    def is_same_truth(self, other: Self) -> bool:
        return self.labels == other.labels and np.array_equal(self.wanted, other.wanted)

    def metrics(self) -> dict[str, float]:
        """`accuracy`, `precision`, `recall`, `f1`, `mcc`, `auc`, `average_precision`, `brier`,
        `log_loss`; `mae` and `kappa` (quadratic) of classes in an order.

        With two classes precision, recall, F1, AUC and average precision are those of class 1, with
        more the unweighted mean over classes. `brier`: with two classes (p - y)² of class 1, with
        more the sum over classes, each in the mean over rows.
        """
        from sklearn import metrics

        wanted, guesses, num = self.wanted, self.guesses, len(self.labels)
        every = set(wanted.tolist())
        kind: dict[str, Any] = {"average": "binary" if num == 2 else "macro"}
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            wanted, guesses, zero_division=0.0, **kind
        )
        own = np.clip(self._shares[np.arange(len(wanted)), wanted], LEAST_PROBABILITY, 1.0)
        found = {
            "accuracy": float(np.mean(wanted == guesses)),
            "precision": float(precision),
            "recall": float(recall) if num != 2 or 1 in every else math.nan,
            "f1": float(f1) if num != 2 or 1 in every else math.nan,
            "mcc": float(metrics.matthews_corrcoef(wanted, guesses))
            if len(every) > 1
            else math.nan,
            **self._areas(every),
            "brier": float(np.mean(self._squares)),
            "log_loss": float(-np.mean(np.log(own))),
        }
        return found | ({} if self.ranks is None else self._distances())

    @cached_property
    def _shares(self) -> Floats:
        """Probabilities that add up to 1 exactly, as scikit-learn wants them."""
        shares: Floats = self.probabilities / self.probabilities.sum(axis=1, keepdims=True)
        return shares

    @property
    def _squares(self) -> Floats:
        """Each row's part of the Brier score."""
        truth = np.eye(len(self.labels))[self.wanted]
        squares: Floats = ((self._shares - truth) ** 2).sum(axis=1)
        return squares / 2 if len(self.labels) == 2 else squares

    def _areas(self, every: set[int]) -> dict[str, float]:
        from sklearn.metrics import average_precision_score, roc_auc_score

        if len(every) < len(self.labels):
            return {"auc": math.nan, "average_precision": math.nan}
        if len(self.labels) == 2:
            likely = self.probabilities[:, 1]
            return {
                "auc": float(roc_auc_score(self.wanted, likely)),
                "average_precision": float(average_precision_score(self.wanted, likely)),
            }
        truth = np.eye(len(self.labels), dtype=np.int64)[self.wanted]
        return {
            "auc": float(roc_auc_score(self.wanted, self._shares, multi_class="ovr")),
            "average_precision": float(average_precision_score(truth, self._shares)),
        }

    def _distances(self) -> dict[str, float]:
        from sklearn.metrics import cohen_kappa_score

        ranks = np.array(self.ranks)
        wanted, found = ranks[self.wanted], ranks[self.guesses]
        varies = len({*wanted.tolist(), *found.tolist()}) > 1
        kappa = cohen_kappa_score(wanted, found, weights="quadratic") if varies else math.nan
        return {"mae": float(np.abs(wanted - found).mean()), "kappa": float(kappa)}

    def costs(self) -> Floats:
        """The negative logarithm of the wanted class' probability."""
        own = self._shares[np.arange(len(self)), self.wanted]
        costs: Floats = -np.log(np.clip(own, LEAST_PROBABILITY, 1.0))
        return costs

    def correct(self) -> npt.NDArray[np.bool_]:
        right: npt.NDArray[np.bool_] = self.wanted == self.guesses
        return right

    def by_label(self) -> Mapping[str, npt.NDArray[np.bool_]]:
        return {name: self.wanted == number for number, name in enumerate(self.labels)}

    def told(self, row: int) -> dict[str, Any]:
        guess = int(self.guesses[row])
        return {
            "wanted": self.labels[int(self.wanted[row])],
            "found": self.labels[guess],
            "probability": float(self.probabilities[row, guess]),
        }

    def confusion(self) -> list[list[int]]:
        """Rows by what was wanted, columns by what was guessed."""
        from sklearn.metrics import confusion_matrix

        places = list(range(len(self.labels)))
        counts: list[list[int]] = confusion_matrix(
            self.wanted, self.guesses, labels=places
        ).tolist()
        return counts


@dataclass(frozen=True)
class LabelSets(Scores):
    """Any number of labels each: `wanted` [rows, labels] of 0 and 1, and `probabilities`."""

    wanted: Ints
    probabilities: Floats
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.wanted)

    def take(self, rows: Ints) -> Self:
        return replace(self, wanted=self.wanted[rows], probabilities=self.probabilities[rows])

    def join(self, other: Self) -> Self:
        return replace(
            self,
            wanted=np.concatenate([self.wanted, other.wanted]),
            probabilities=np.concatenate([self.probabilities, other.probabilities]),
        )

    def is_same_truth(self, other: Self) -> bool:
        return self.labels == other.labels and np.array_equal(self.wanted, other.wanted)

    @property
    def _guesses(self) -> Ints:
        return (self.probabilities > 0.5).astype(np.int64)

    def metrics(self) -> dict[str, float]:
        """`accuracy` (rows with exactly their labels), micro `precision`, `recall` and `f1`, `auc`
        and `average_precision` (means of labels that some rows have and some have not), `brier`
        (the mean over rows and labels)."""
        from sklearn import metrics

        guesses = self._guesses
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            self.wanted, guesses, average="micro", zero_division=0.0
        )
        both = np.flatnonzero((self.wanted.min(axis=0) == 0) & (self.wanted.max(axis=0) == 1))
        areas = [
            [measure(self.wanted[:, place], self.probabilities[:, place]) for place in both]
            for measure in (metrics.roc_auc_score, metrics.average_precision_score)
        ]
        auc, precise = (float(np.mean(area)) if area else math.nan for area in areas)
        return {
            "accuracy": float((self.wanted == guesses).all(axis=1).mean()),
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "auc": auc,
            "average_precision": precise,
            "brier": float(((self.probabilities - self.wanted) ** 2).mean()),
        }

    def costs(self) -> Floats:
        """The mean binary cross entropy of a row's labels."""
        likely = np.clip(self.probabilities, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
        costs: Floats = -np.where(self.wanted == 1, np.log(likely), np.log1p(-likely)).mean(axis=1)
        return costs

    def correct(self) -> npt.NDArray[np.bool_]:
        right: npt.NDArray[np.bool_] = (self.wanted == self._guesses).all(axis=1)
        return right

    def by_label(self) -> Mapping[str, npt.NDArray[np.bool_]]:
        """A row is with each of its labels."""
        return {name: self.wanted[:, place] == 1 for place, name in enumerate(self.labels)}

    def told(self, row: int) -> dict[str, Any]:
        named = [
            ", ".join(name for name, has in zip(self.labels, flags[row], strict=True) if has)
            for flags in (self.wanted, self._guesses)
        ]
        return {"wanted": named[0], "found": named[1]}


@dataclass(frozen=True)
class Numbers(Scores):
    """Numbers beside those that were wanted, each [rows]."""

    wanted: Floats
    found: Floats

    def __len__(self) -> int:
        return len(self.wanted)

    def take(self, rows: Ints) -> Self:
        return replace(self, wanted=self.wanted[rows], found=self.found[rows])

    def join(self, other: Self) -> Self:
        return replace(
            self,
            wanted=np.concatenate([self.wanted, other.wanted]),
            found=np.concatenate([self.found, other.found]),
        )

    def is_same_truth(self, other: Self) -> bool:
        return np.array_equal(self.wanted, other.wanted)

    def metrics(self) -> dict[str, float]:
        """`mse`, `rmse`, `mae`, `r2`, `pearson`, `spearman`, and `bias`: how much too high."""
        from scipy.stats import pearsonr, spearmanr
        from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

        wanted, found = self.wanted, self.found
        varies = len(set(wanted.tolist())) > 1 and len(set(found.tolist())) > 1
        mse = float(mean_squared_error(wanted, found))
        return {
            "mse": mse,
            "rmse": math.sqrt(mse),
            "mae": float(mean_absolute_error(wanted, found)),
            "r2": float(r2_score(wanted, found)) if len(set(wanted.tolist())) > 1 else math.nan,
            "pearson": float(pearsonr(wanted, found).statistic) if varies else math.nan,
            "spearman": float(spearmanr(wanted, found).statistic) if varies else math.nan,
            "bias": float(np.mean(found - wanted)),
        }

    def costs(self) -> Floats:
        """The size of the error."""
        costs: Floats = np.abs(self.found - self.wanted)
        return costs

    def by_label(self) -> Mapping[str, npt.NDArray[np.bool_]]:
        return quarters(self.wanted)

    def told(self, row: int) -> dict[str, Any]:
        return {"wanted": float(self.wanted[row]), "found": float(self.found[row])}


def quarters(values: Sequence[float] | Floats | Ints) -> dict[str, npt.NDArray[np.bool_]]:
    """Rows by the quarter that their value lies in, those of one value always together; fewer than
    four where values are few."""
    given = np.asarray(values, dtype=np.float64)
    if not len(given):
        return {}
    edges = np.unique(np.quantile(given, [0.25, 0.5, 0.75], method="lower"))
    places = np.searchsorted(edges, given, side="left")
    found = {}
    for place in range(len(edges) + 1):
        rows = places == place
        if rows.any():
            found[f"{given[rows].min():g} to {given[rows].max():g}"] = rows
    return found
