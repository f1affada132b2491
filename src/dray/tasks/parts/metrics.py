"""Metrics that tasks share: sums over the batches of a validation, which add up over ranks in any
order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from dray.tasks.parts.ratio_scores import Ratios, perplexity
from dray.tasks.parts.scores import Classes, LabelSets, Numbers, Scores
from dray.tasks.parts.tag_scores import Entities
from dray.tasks.rows import IGNORED
from dray.tasks.task import Batch, Output


def total(losses: Sequence[float]) -> float:
    """The exact sum; NaN where not all are finite."""
    return math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan


class TokenMetrics:
    """Summed loss, targets and correctly predicted tokens; `perplexity` names the exponential of
    the mean loss."""

    def __init__(self, perplexity: str = "perplexity") -> None:
        self._perplexity = perplexity
        self._losses: list[float] = []
        self._num_targets = 0
        self._num_correct = 0
        self._counts: list[tuple[int, int]] = []
        """Targets and right ones of each batch."""

    def gather_rows(self) -> bool:
        """Sums of batches are kept in any case: of rows, where each is a batch by itself."""
        return True

    def update(self, batch: Batch, output: Output) -> None:
        counts = int((batch["labels"] != IGNORED).sum()), int(output["num_correct"])
        self._losses.append(float(output["loss_sum"]))
        self._counts.append(counts)
        self._num_targets += counts[0]
        self._num_correct += counts[1]

    def scores(self, labels: Sequence[str]) -> Scores:
        """Loss, perplexity and accuracy of each batch."""
        targets, right = np.array(self._counts, np.float64).reshape(-1, 2).T
        sums = {"loss": (np.array(self._losses), targets), "accuracy": (right, targets)}
        named = self._perplexity == "perplexity"
        return Ratios(sums, "loss", derive=perplexity if named else None)

    def state(self) -> dict[str, Any]:
        return {
            "losses": list(self._losses),
            "num_targets": self._num_targets,
            "num_correct": self._num_correct,
            "counts": [list(pair) for pair in self._counts],
        }

    def merge(self, states: Iterable[dict[str, Any]]) -> TokenMetrics:
        for state in states:
            self._losses += state["losses"]
            self._num_targets += state["num_targets"]
            self._num_correct += state["num_correct"]
            self._counts += [(targets, right) for targets, right in state["counts"]]
        return self

    def compute(self) -> dict[str, float]:
        """`loss` (nats a token), the perplexity, `accuracy` (share of tokens predicted first),
        `num_targets`."""
        count = max(1, self._num_targets)
        loss = (
            total(self._losses) / count
        )  # exact, so independent of the order of batches and ranks
        return {
            "loss": loss,
            self._perplexity: math.exp(min(loss, 700.0)),
            # Where a loss is not finite the model has diverged, and its first guess is none.
            "accuracy": self._num_correct / count if math.isfinite(loss) else math.nan,
            "num_targets": float(self._num_targets),
        }

    def undefined(self) -> tuple[str, ...]:
        names = ("loss", self._perplexity, "accuracy", "bits_per_byte")
        return () if self._num_targets else names


class Gathered:
    """Metrics that need every row: what ranks have adds up to lists."""

    names: tuple[str, ...]
    """The loss first."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._wanted: list[Any] = []
        self._found: list[Any] = []

    def state(self) -> dict[str, Any]:
        return {
            "losses": list(self._losses),
            "wanted": list(self._wanted),
            "found": list(self._found),
        }

    def merge(self, states: Iterable[dict[str, Any]]) -> Self:
        for state in states:
            self._losses += state["losses"]
            self._wanted += state["wanted"]
            self._found += state["found"]
        return self

    def compute(self) -> dict[str, float]:
        if not self._wanted:
            return dict.fromkeys((*self.names, "num_targets"), 0.0)
        # What a diverged model gives has no metrics; the run that asks is told so, and goes on.
        sound = bool(torch.tensor(self._found, dtype=torch.float64).isfinite().all())
        values = self._measure() if sound else dict.fromkeys(self.names[1:], math.nan)
        loss = total(self._losses) / len(self._wanted)
        return {"loss": loss, **values, "num_targets": float(len(self._wanted))}

    def undefined(self) -> tuple[str, ...]:
        return () if self._wanted else self.names

    def _measure(self) -> dict[str, float]:
        raise NotImplementedError


class ClassificationMetrics(Gathered):
    """Every document's label and scores: unlike means, ranks' AUCs do not add up."""

    names: tuple[str, ...] = ("loss", "accuracy", "precision", "recall", "f1", "auc")

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self._num_labels = num_labels

    def update(self, batch: Batch, output: Output) -> None:
        real = batch["labels"] != IGNORED
        self._losses.append(float(output["loss_sum"]))
        self._wanted += batch["labels"][real].tolist()
        self._found += output["scores"][real].tolist()

    def _measure(self) -> dict[str, float]:
        """`accuracy`, `precision`, `recall`, `f1`, `auc`.

        With two classes the middle three are those of class 1, with more the unweighted mean over
        the classes that the documents or the guesses show (AUC: each class against the rest). `auc`
        is 0.5, what guessing gives, where the documents do not show every class.
        """
        from sklearn.metrics import accuracy_score, precision_recall_fscore_support

        scores = torch.tensor(self._found, dtype=torch.float64)
        guesses = self._guesses(scores)
        kind: dict[str, Any] = (
            {"average": "binary"} if self._num_labels == 2 else {"average": "macro"}
        )
        precision, recall, f1, _ = precision_recall_fscore_support(
            self._wanted, guesses, zero_division=0.0, **kind
        )
        return {
            "accuracy": float(accuracy_score(self._wanted, guesses)),
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "auc": self._auc(scores),
        }

    def _guesses(self, scores: Tensor) -> list[int]:
        likeliest: list[int] = scores.argmax(dim=-1).tolist()
        return likeliest

    def scores(self, labels: Sequence[str]) -> Classes:
        """What was found of each document, with the names of the classes."""
        found = torch.tensor(self._found, dtype=torch.float64)
        names = tuple(labels) or tuple(map(str, range(self._num_labels)))
        return Classes(
            np.array(self._wanted, np.int64),
            np.array(self._guesses(found), np.int64),
            found.numpy(),
            names,
        )

    def undefined(self) -> tuple[str, ...]:
        """The AUC without every class; with two classes what asks for documents of class 1, where
        there are none."""
        seen = set(self._wanted)
        if not seen:
            return self.names
        positives = ("recall", "f1") if self._num_labels == 2 and 1 not in seen else ()
        return (*positives, "auc") if len(seen) < self._num_labels else ()

    def _auc(self, scores: Tensor) -> float:
        from sklearn.metrics import roc_auc_score

        if len(set(self._wanted)) < self._num_labels:
            return 0.5
        if self._num_labels == 2:
            return float(roc_auc_score(self._wanted, scores[:, 1].numpy()))
        shares = (scores / scores.sum(dim=-1, keepdim=True)).numpy()
        return float(roc_auc_score(self._wanted, shares, multi_class="ovr", average="macro"))


class ManyLabelsMetrics(Gathered):
    """Of rows with any number of labels, each likelier than not or not."""

    names = ("loss", "accuracy", "precision", "recall", "f1", "auc")

    def update(self, batch: Batch, output: Output) -> None:
        real = batch["labels"][:, 0] != IGNORED
        self._losses.append(float(output["loss_sum"]))
        self._wanted += batch["labels"][real].tolist()
        self._found += output["scores"][real].tolist()

    def _measure(self) -> dict[str, float]:
        """`accuracy`: rows with exactly their labels; precision, recall and F1 over all labels of
        all rows; `auc`: the mean of labels that some rows have and some have not, or 0.5."""
        from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

        wanted, found = torch.tensor(self._wanted), torch.tensor(self._found, dtype=torch.float64)
        guesses = (found > 0.5).long()
        precision, recall, f1, _ = precision_recall_fscore_support(
            wanted.numpy(), guesses.numpy(), average="micro", zero_division=0.0
        )
        both = (wanted.min(dim=0).values == 0) & (wanted.max(dim=0).values == 1)
        areas = [
            roc_auc_score(wanted[:, index].numpy(), found[:, index].numpy())
            for index in both.nonzero()[:, 0].tolist()
        ]
        return {
            "accuracy": float((wanted == guesses).all(dim=1).double().mean()),
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "auc": float(sum(areas) / len(areas)) if areas else 0.5,
        }

    def scores(self, labels: Sequence[str]) -> LabelSets:
        """What was found of each document, with the names of the labels."""
        found = np.array(self._found, np.float64)
        return LabelSets(np.array(self._wanted, np.int64), found, tuple(labels))

    def undefined(self) -> tuple[str, ...]:
        if not self._wanted:
            return self.names
        wanted = torch.tensor(self._wanted)
        both = (wanted.min(dim=0).values == 0) & (wanted.max(dim=0).values == 1)
        return () if bool(both.any()) else ("auc",)


class NumberMetrics(Gathered):
    """Of numbers, beside those that were wanted."""

    names: tuple[str, ...] = ("loss", "mse", "mae", "r2", "pearson", "spearman")

    def update(self, batch: Batch, output: Output) -> None:
        real = batch["labels"].isfinite()
        self._losses.append(float(output["loss_sum"]))
        self._wanted += batch["labels"][real].tolist()
        self._found += output["numbers"][real].tolist()

    def _measure(self) -> dict[str, float]:
        """`mse`, `mae`, `r2` (1 less the share of the variance that is left), and two correlations,
        0 where either side is constant."""
        from scipy.stats import pearsonr, spearmanr
        from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

        varies = self._varies()
        return {
            "mse": float(mean_squared_error(self._wanted, self._found)),
            "mae": float(mean_absolute_error(self._wanted, self._found)),
            "r2": float(r2_score(self._wanted, self._found)) if len(self._wanted) > 1 else 0.0,
            "pearson": float(pearsonr(self._wanted, self._found).statistic) if varies else 0.0,
            "spearman": float(spearmanr(self._wanted, self._found).statistic) if varies else 0.0,
        }

    def scores(self, labels: Sequence[str]) -> Numbers:
        """What was found of each row."""
        return Numbers(np.array(self._wanted, np.float64), np.array(self._found, np.float64))

    def undefined(self) -> tuple[str, ...]:
        if not self._wanted:
            return self.names
        correlations = () if self._varies() else ("pearson", "spearman")
        return ("r2", *correlations) if len(set(self._wanted)) < 2 else correlations

    def _varies(self) -> bool:
        return len(set(self._wanted)) > 1 and len(set(self._found)) > 1


class EntityMetrics(Gathered):
    """Of the tags of words: entities by seqeval, as conlleval counts them, and words.

    A sentence in several windows is put together again by its document and their order.
    """

    names = ("loss", "accuracy", "precision", "recall", "f1", "f1_macro", "num_invalid")

    def __init__(self, tags: Sequence[str], *, entities: bool = True) -> None:
        super().__init__()
        self._tags, self._entities = tuple(tags), entities
        self._places: list[tuple[int, int]] = []
        self._num_words = 0

    def update(self, batch: Batch, output: Output) -> None:
        self._losses.append(float(output["loss_sum"]))
        guesses = output["scores"].argmax(dim=-1).cpu()
        places = zip(batch["document"].tolist(), batch["window"].tolist(), strict=True)
        for place, labels, guess in zip(places, batch["labels"].cpu(), guesses, strict=True):
            real = labels != IGNORED
            if not bool(real.any()):
                continue
            self._places.append(place)
            self._wanted.append(labels[real].tolist())
            self._found.append(guess[real].tolist())
            self._num_words += int(real.sum())

    def state(self) -> dict[str, Any]:
        return {**super().state(), "places": list(self._places), "num_words": self._num_words}

    def merge(self, states: Iterable[dict[str, Any]]) -> Self:
        for state in states:
            super().merge([state])
            self._places += state["places"]
            self._num_words += state["num_words"]
        return self

    def compute(self) -> dict[str, float]:
        """`loss` (a word), `accuracy` of words, entity `precision`, `recall` and `f1` over all, the
        mean of types as `f1_macro`, and `num_invalid`: guesses that go on with an entity which
        none began."""
        if not self._wanted:
            return dict.fromkeys((*self.names, "num_targets"), 0.0)
        wanted, found = self._sentences()
        pairs = zip(chain(*wanted), chain(*found), strict=True)
        same = sum(one == other for one, other in pairs)
        loss, num_targets = total(self._losses) / self._num_words, float(self._num_words)
        if not math.isfinite(loss):  # the tags are those of a model that has diverged
            nothing = dict.fromkeys(self.names[1:] if self._entities else ("accuracy",), math.nan)
            return {"loss": loss, **nothing, "num_targets": num_targets}
        values = {
            "loss": loss,
            "accuracy": same / self._num_words,
            "num_targets": num_targets,
        }
        if not self._entities:
            return values
        report = self._report(wanted, found)
        every = report.get("micro avg", {})
        return {
            **values,
            "precision": float(every.get("precision", 0.0)),
            "recall": float(every.get("recall", 0.0)),
            "f1": float(every.get("f1-score", 0.0)),
            "f1_macro": float(report.get("macro avg", {}).get("f1-score", 0.0)),
            "num_invalid": float(sum(map(count_invalid, found))),
        }

    def report(self) -> dict[str, dict[str, float]]:
        """Precision, recall, F1 and number by type of entity."""
        if not self._wanted or not self._entities:
            return {}
        found = self._report(*self._sentences())
        return {
            name: {
                "precision": float(row["precision"]),
                "recall": float(row["recall"]),
                "f1": float(row["f1-score"]),
                "num": int(row["support"]),
            }
            for name, row in found.items()
        }

    def scores(self, labels: Sequence[str]) -> Entities:
        """What was found of each sentence."""
        wanted, found = (tuple(map(tuple, tags)) for tags in self._sentences())
        return Entities(wanted, found, self._entities)

    def _sentences(self) -> tuple[list[list[str]], list[list[str]]]:
        """Wanted and found tags of whole sentences."""
        order = sorted(range(len(self._places)), key=self._places.__getitem__)
        wanted: list[list[str]] = []
        found: list[list[str]] = []
        last = None
        for index in order:
            document = self._places[index][0]
            if document != last:
                wanted.append([])
                found.append([])
                last = document
            wanted[-1] += [self._tags[tag] for tag in self._wanted[index]]
            found[-1] += [self._tags[tag] for tag in self._found[index]]
        return wanted, found

    @staticmethod
    def _report(wanted: list[list[str]], found: list[list[str]]) -> dict[str, dict[str, Any]]:
        from seqeval.metrics import classification_report

        if not any(tag != "O" for tags in wanted for tag in tags):
            return {}
        report: dict[str, dict[str, Any]] = classification_report(
            wanted, found, output_dict=True, zero_division=0
        )
        return report

    def undefined(self) -> tuple[str, ...]:
        if not self._wanted:
            return self.names
        entities = any(self._tags[tag] != "O" for tags in self._wanted for tag in tags)
        return () if entities or not self._entities else ("precision", "recall", "f1", "f1_macro")


def count_invalid(tags: Sequence[str]) -> int:
    """Tags inside or at the end of an entity that none of its kind begins."""
    found, before = 0, "O"
    for tag in tags:
        kind, _, name = tag.partition("-")
        goes_on = kind in ("I", "E")
        begun = before.partition("-")[0] in ("B", "I") and before.partition("-")[2] == name
        found += goes_on and not begun
        before = tag
    return found


def bits_per_byte(mean_loss: float, num_tokens: int, num_text_bytes: int) -> float:
    """Bits needed for a byte of text by a model that loses `mean_loss` nats a token on text of
    `num_tokens` tokens.

    Comparable across tokenisers, and with a compressor's ratio. The first token of each row, which
    no loss covers, is charged at the mean. Raises ValueError if there is no text.
    """
    if num_text_bytes <= 0:
        raise ValueError(f"num_text_bytes = {num_text_bytes}: there is no text to measure on")
    return mean_loss * num_tokens / math.log(2) / num_text_bytes
