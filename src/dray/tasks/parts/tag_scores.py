"""What a model gave for each sentence: a tag for each word, with entities as seqeval reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from dray.tasks.parts.scores import Floats, Ints, Scores


@dataclass(frozen=True)
class Entities(Scores):
    """Tags of the words of sentences, with entities as seqeval reads them (conlleval's rule)."""

    wanted: tuple[tuple[str, ...], ...]
    found: tuple[tuple[str, ...], ...]
    has_entities: bool

    @property
    def unit(self) -> str:
        return "sentence"

    @property
    def is_aligned(self) -> bool:
        return False

    def __len__(self) -> int:
        return len(self.wanted)

    def take(self, rows: Ints) -> Self:
        places = rows.tolist()
        taken = replace(
            self,
            wanted=tuple(self.wanted[place] for place in places),
            found=tuple(self.found[place] for place in places),
        )
        # A cached property is no field: sentences keep what was counted of them.
        taken.__dict__["_counts"] = self._counts[rows]
        return taken

    def join(self, other: Self) -> Self:
        return replace(
            self, wanted=(*self.wanted, *other.wanted), found=(*self.found, *other.found)
        )

    def is_same_truth(self, other: Self) -> bool:
        return self.wanted == other.wanted

    @cached_property
    def _counts(self) -> Ints:
        """Of each sentence: words, right words, entities wanted, found, and found rightly; [rows,
        5]."""
        from seqeval.metrics.sequence_labeling import get_entities

        counts = np.zeros((len(self), 5), np.int64)
        for row, (wanted, found) in enumerate(zip(self.wanted, self.found, strict=True)):
            same = sum(one == other for one, other in zip(wanted, found, strict=True))
            counts[row, :2] = len(wanted), same
            if self.has_entities:
                truth, guessed = set(get_entities(list(wanted))), set(get_entities(list(found)))
                counts[row, 2:] = len(truth), len(guessed), len(truth & guessed)
        return counts

    def metrics(self) -> dict[str, float]:
        """`accuracy` of words; `precision`, `recall` and `f1` of entities."""
        words, same, wanted, found, right = self._counts.sum(axis=0).tolist()
        values = {"accuracy": same / words if words else math.nan}
        if not self.has_entities:
            return values
        return values | {
            "precision": right / found if found else 0.0,
            "recall": right / wanted if wanted else math.nan,
            "f1": 2 * right / (wanted + found) if wanted else math.nan,
        }

    def costs(self) -> Floats:
        """Words with another tag."""
        costs: Floats = (self._counts[:, 0] - self._counts[:, 1]).astype(np.float64)
        return costs

    def correct(self) -> npt.NDArray[np.bool_]:
        right: npt.NDArray[np.bool_] = self.costs() == 0
        return right

    def by_label(self) -> Mapping[str, npt.NDArray[np.bool_]]:
        """Sentences with an entity of each type, or with none."""
        types = [{tag.partition("-")[2] for tag in tags} - {""} for tags in self.wanted]
        named = sorted(set().union(*types)) if self.has_entities else []
        found = {name: np.array([name in own for own in types]) for name in named}
        return {**found, "(none)": np.array([not own for own in types])} if named else {}

    def told(self, row: int) -> dict[str, Any]:
        return {"wanted": " ".join(self.wanted[row]), "found": " ".join(self.found[row])}

    def confusion(self) -> list[list[int]]:
        """Words by the tag that was wanted and the one that was found."""
        from sklearn.metrics import confusion_matrix

        wanted = [tag for tags in self.wanted for tag in tags]
        found = [tag for tags in self.found for tag in tags]
        counts: list[list[int]] = confusion_matrix(wanted, found, labels=list(self.labels)).tolist()
        return counts

    @property
    def labels(self) -> tuple[str, ...]:
        """All tags that are there."""
        return tuple(sorted({tag for tags in (*self.wanted, *self.found) for tag in tags}))
