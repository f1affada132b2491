"""The training rows that are most like a prediction, by what the model's last layer is given of
each.

`cosine`: that of the angle between both. `gradient`: the product of both gradients of the loss in
the last layer (TracIn of Pruthi et al., 2020, by its last layer as Yeh et al., 2022, do): rows
above 0 have taught the model to predict this, those below 0 something else. Memory does not grow
with the corpus. Refuses models whose last layer is no linear one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dray.corpus.manifest import Manifest, Split
from dray.corpus.stream import read_rows
from dray.errors import SpecError
from dray.order import Ints
from dray.tasks import Batch, Task
from dray.tasks.rows import IGNORED

By = Literal["cosine", "gradient"]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Neighbour:
    """A training row, and how like it is."""

    row: int
    similarity: float


@dataclass
class LastLayer:
    """What the last linear layer of a model is given of each row: the vectors that its head goes
    by, with what the loss says of each output."""

    task: Task
    objective: Any
    where: str
    _last: tuple[nn.Module, Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        model = self.objective.model
        self.layers = [part for part in model.modules() if isinstance(part, nn.Linear)]
        for layer in self.layers:
            layer.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        self._last = layer, given[0], output

    @torch.no_grad()
    def of(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Vectors [rows, width] and, where outputs have probabilities, those less what is wanted
        [rows, outputs]: what the loss' gradient is in the outputs. Raises SpecError."""
        self._last = None
        _, output = self.objective(batch)
        vectors = self._given().float()
        if vectors.dim() == 3:  # of every token: it predicts by the last one
            ends = batch["attention_mask"].sum(dim=1) - 1
            vectors = vectors[torch.arange(len(ends), device=ends.device), ends]
        scores = output.get("scores", output.get("log_scores"))
        if scores is None or scores.dim() != 2:
            return vectors.flatten(1), None
        likely = scores.exp() if "log_scores" in output else scores
        return vectors.flatten(1), likely.float() - _wanted(batch["labels"], likely)

    def _given(self) -> Tensor:
        if self._last is None:
            raise SpecError(
                self.where,
                "its last layer is no linear one",
                "neighbours are found by what that is given",
                "leave --neighbours out",
            )
        return self._last[1]


def _wanted(labels: Tensor, likely: Tensor) -> Tensor:
    """Labels as 1 or 0 for each output; what is not known is what is likeliest."""
    if labels.dim() == 2:
        known = labels[:, :1] != IGNORED
        return torch.where(known, labels, (likely > 0.5).long()).float()
    guessed = torch.where(labels == IGNORED, likely.argmax(dim=-1), labels)
    return nn.functional.one_hot(guessed, likely.shape[1]).float()


@dataclass
class Search:
    """The rows of a corpus that are most like some vectors."""

    vectors: Tensor
    """[queries, width]."""
    slopes: Tensor | None
    """[queries, outputs]; None: by cosine."""
    number: int
    num_rows: int = 0
    """Looked at."""

    def __post_init__(self) -> None:
        queries = len(self.vectors)
        self._best = np.empty((queries, 0)), np.empty((queries, 0), np.int64)
        self._worst = np.empty((queries, 0)), np.empty((queries, 0), np.int64)

    def add(self, ids: Ints, vectors: Tensor, slopes: Tensor | None) -> None:
        """Look at some rows."""
        found = self._similar(vectors, slopes).double().cpu().numpy()
        self.num_rows += len(ids)
        self._best = _keep_most(self._best, found, ids, self.number)
        if self.slopes is not None:
            self._worst = _keep_most(self._worst, -found, ids, self.number)

    def _similar(self, vectors: Tensor, slopes: Tensor | None) -> Tensor:
        if self.slopes is None or slopes is None:
            own = nn.functional.normalize(self.vectors, dim=-1)
            return own @ nn.functional.normalize(vectors, dim=-1).T
        # A linear layer's gradient is the outer product of both; its bias has the input 1.
        return (self.slopes @ slopes.T) * (self.vectors @ vectors.T + 1)

    def nearest(self, query: int) -> list[Neighbour]:
        """The most like a query, the likest first."""
        return _told(self._best, query, 1.0)

    def opposed(self, query: int) -> list[Neighbour]:
        """By gradients: those that taught against it, the most opposed first."""
        return [one for one in _told(self._worst, query, -1.0) if one.similarity < 0]


def _keep_most(
    kept: tuple[Floats, Ints], found: Floats, ids: Ints, number: int
) -> tuple[Floats, Ints]:
    """The `number` greatest values of each query, with their rows; of equal ones the first."""
    values = np.concatenate([kept[0], found], axis=1)
    rows = np.concatenate([kept[1], np.broadcast_to(ids, found.shape)], axis=1)
    order = np.argsort(-values, axis=1, kind="stable")[:, :number]
    return np.take_along_axis(values, order, 1), np.take_along_axis(rows, order, 1)


def _told(kept: tuple[Floats, Ints], query: int, sign: float) -> list[Neighbour]:
    values, rows = kept
    return [
        Neighbour(int(row), float(sign * value))
        for value, row in zip(values[query], rows[query], strict=True)
    ]


def rows_to_search(split: Split, most: int | None) -> Ints:
    """All rows, or `most` of them, evenly spread."""
    if most is None or most >= split.num_rows:
        return np.arange(split.num_rows)
    return np.unique(np.linspace(0, split.num_rows - 1, most).astype(np.int64))


def search_rows(  # noqa: PLR0917
    layer: LastLayer,
    search: Search,
    folder: str,
    manifest: Manifest,
    ids: Ints,
    at_once: int,
    say: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Look at rows of a corpus, a few at a time. `say`: how many are done, of how many."""
    device = next(layer.objective.parameters()).device
    for some in _cut(ids, manifest.group_rows):
        rows = read_rows(folder, manifest, manifest.train, some)
        for start in range(0, rows.num_rows, at_once):
            piece = rows.slice(start, at_once)
            batch = {key: value.to(device) for key, value in layer.task.collate(piece).items()}
            search.add(some[start : start + at_once], *layer.of(batch))
        say(search.num_rows, len(ids))


def _cut(ids: Sequence[int] | Ints, size: int) -> Iterator[Ints]:
    array = np.asarray(ids, np.int64)
    for start in range(0, len(array), size):
        yield array[start : start + size]
