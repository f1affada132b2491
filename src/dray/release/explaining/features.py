"""What a block of a model knows: the features that a dictionary of its hidden states has, each by
the tokens of some data on which it fires most strongly.

Refuses tasks that find no features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from dray.errors import PlanError, SpecError
from dray.release.explaining.reading import read_first
from dray.release.measuring import rows_at_once
from dray.release.predict import Counts, Predictor
from dray.release.trained import Trained

AROUND = 8
"""Tokens that are told before and behind one on which a feature fires."""


@dataclass(frozen=True)
class WantedFeatures:
    """What is asked."""

    num_records: int = 1000
    """The first so many."""
    num_features: int = 20
    """Told are so many of those that fire on most tokens."""
    num_tokens: int = 5
    """Of each, the tokens on which it fires most strongly."""

    def check(self) -> None:
        """Raises PlanError."""
        for key, value in (("--rows", self.num_records), ("--features", self.num_features)):
            if value < 1:
                raise PlanError(key, f"is {value}", "at least 1")


@dataclass
class _Found:
    """What was seen of all features: on how many tokens each fires, and its strongest tokens."""

    fired: Tensor
    """[features]"""
    strongest: Tensor
    """[tokens told, features], falling."""
    places: Tensor
    """Where these are, counted through all rows."""


def tell_features(
    trained: Trained,
    data: Sequence[str],
    wanted: WantedFeatures,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The most frequent features on the first records of some data, as plain values. `data`: as for
    `predict`. Raises PlanError for numbers that make no sense, SpecError for a task without
    features."""
    wanted.check()
    if not trained.task.finds_features:
        raise SpecError(trained.where, f"its task is {trained.task.name}, which finds no features")
    predictor = Predictor(trained, Counts())
    texts = read_first(trained, predictor, data, wanted.num_records, say)
    table = predictor.rows_of(texts)
    width = trained.manifest.sequence_tokens
    found, num_tokens = _look(_activations(trained, predictor, table), width, wanted.num_tokens)
    told = {
        "run": trained.run.name,
        "step": trained.checkpoint.step,
        "num_records": len(texts),
        "num_tokens": num_tokens,
    }
    if found is None:
        return {**told, "num_features": 0, "num_firing": 0, "features": []}
    order = torch.argsort(found.fired, descending=True, stable=True)
    chosen = [int(one) for one in order[: wanted.num_features] if found.fired[one] > 0]
    seen = _Windows(trained, predictor, table, chosen)
    return {
        **told,
        "num_features": len(found.fired),
        "num_firing": int((found.fired > 0).sum()),
        "features": [
            {
                "feature": feature,
                "share": int(found.fired[feature]) / num_tokens,
                "tokens": [
                    seen.tell(feature, *divmod(int(place), width))
                    for value, place in zip(
                        found.strongest[:, feature], found.places[:, feature], strict=True
                    )
                    if value > 0
                ],
            }
            for feature in chosen
        ],
    }


def _activations(
    trained: Trained, predictor: Predictor, table: pa.Table
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Of some rows at a time: the first one's number, tokens' rows among them and places in these,
    and the activations there."""
    size = rows_at_once(trained, predictor.task)
    for start in range(0, table.num_rows, size):
        rows, columns, values = _of_rows(predictor, table.slice(start, size))
        yield start, rows, columns, values


@torch.no_grad()
def _of_rows(predictor: Predictor, rows: pa.Table) -> tuple[Tensor, Tensor, Tensor]:
    batch = {
        name: value.to(predictor.device) for name, value in predictor.task.collate(rows).items()
    }
    _, output = predictor.objective(batch)
    places, values = predictor.task.activations(batch, output)
    width = batch["input_ids"].shape[1]
    return (places // width).cpu(), (places % width).cpu(), values.float().cpu()


def _look(
    pieces: Iterator[tuple[int, Tensor, Tensor, Tensor]], width: int, most: int
) -> tuple[_Found | None, int]:
    """All pieces together, and the number of their tokens."""
    found: _Found | None = None
    num_tokens = 0
    for start, rows, columns, values in pieces:
        num_tokens += len(values)
        if not len(values):
            continue
        strongest, at = values.topk(min(most, len(values)), dim=0)
        places = ((rows + start) * width + columns)[at]
        fired = (values > 0).sum(dim=0)
        if found is None:
            found = _Found(fired, strongest, places)
            continue
        both = torch.cat((found.strongest, strongest))
        kept, order = both.topk(min(most, len(both)), dim=0)
        places = torch.cat((found.places, places)).gather(0, order)
        found = _Found(found.fired + fired, kept, places)
    return found, num_tokens


class _Windows:
    """Tokens with what stands around them. A row is computed once more when it is first asked
    for."""

    def __init__(
        self, trained: Trained, predictor: Predictor, table: pa.Table, chosen: Sequence[int]
    ) -> None:
        self.trained, self.predictor, self.table = trained, predictor, table
        self.chosen = list(chosen)
        self._rows: dict[int, tuple[list[str], Tensor]] = {}

    def tell(self, feature: int, row: int, place: int) -> dict[str, Any]:
        tokens, values = self._row(row)
        own = values[:, self.chosen.index(feature)]
        first, end = max(0, place - AROUND), place + AROUND + 1
        return {
            "record": row,
            "place": place,
            "token": tokens[place],
            "at": place - first,
            "activation": float(own[place]),
            "tokens": tokens[first:end],
            "activations": own[first:end].tolist(),
        }

    def _row(self, row: int) -> tuple[list[str], Tensor]:
        """A row's tokens as texts, and the chosen features on each, 0 where nothing is learnt."""
        if row not in self._rows:
            one = self.table.slice(row, 1)
            size = int(one.column("num_tokens")[0].as_py())
            ids = one.column("input_ids")[0].as_py()[:size]
            _, columns, values = _of_rows(self.predictor, one)
            every = torch.zeros(size, len(self.chosen))
            every[columns] = values[:, self.chosen]
            tokens = [self.trained.decode_token(token) for token in ids]
            self._rows[row] = _spaced(tokens), every
        return self._rows[row]


def _spaced(tokens: list[str]) -> list[str]:
    """Tokens of a text with the spaces before them, which WordPiece leaves out, and marks instead
    what goes on with a word."""
    if any(token.startswith(" ") for token in tokens):
        return tokens
    return [token[2:] if token.startswith("##") else f" {token}" for token in tokens]
