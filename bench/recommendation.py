"""What recommending without learning gives, by the split and the ranking of dray's tasks: the films
of MovieLens that are seen most, and those that the same people see (item-kNN); ratings by means and
biases.

    python -m bench.recommendation [--data ../shared/data/movielens_latest_small]

Leave one out as `gather` does: by time, equal times as they were read, the last film is the test
and the one before it validation. Films that somebody has had are left out of his ranking, all
others are ranked; one that training does not have is a miss.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dray.corpus.cleaning import hash_texts, held_out
from dray.tasks.rows import SEPARATOR

NEIGHBOURS = 100
BIAS_PRIOR = 3.0, 1.0
"""Of people and of films: the better of 1, 3, 5, 10 and 20 each, by what is held out."""
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rating:
    """A record."""

    user: str
    item: str
    value: float
    time: float


def read_ratings(folder: Path) -> list[Rating]:
    """The records in the order of the file."""
    with gzip.open(folder / "ratings.csv.gz", "rt", encoding="utf-8") as file:
        return [
            Rating(row["userId"], row["movieId"], float(row["rating"]), float(row["timestamp"]))
            for row in csv.DictReader(file)
        ]


def make_sequences(ratings: Sequence[Rating]) -> list[list[str]]:
    """Each person's films by time."""
    found: dict[str, list[Rating]] = {}
    for rating in ratings:
        found.setdefault(rating.user, []).append(rating)
    return [[one.item for one in sorted(own, key=lambda one: one.time)] for own in found.values()]


def measure(
    sequences: Sequence[Sequence[str]], left_out: int, score: Any, items: dict[str, int]
) -> dict[str, float]:
    """Hit rate and NDCG at 10 of the item that comes before the last `left_out`; `score` gives
    numbers for all items by a history."""
    hits, gains = 0, 0.0
    for sequence in sequences:
        place = len(sequence) - 1 - left_out
        history = [items[item] for item in sequence[:place] if item in items]
        wanted = items.get(sequence[place])
        if wanted is None:
            continue
        scores = score(history).astype(np.float64)
        scores[[item for item in history if item != wanted]] = -np.inf
        rank = int((scores >= scores[wanted]).sum())
        if rank <= 10:
            hits += 1
            gains += 1 / math.log2(1 + rank)
    return {"hr_10": hits / len(sequences), "ndcg_10": gains / len(sequences)}


def rank_items(sequences: Sequence[Sequence[str]]) -> dict[str, dict[str, float]]:
    """Popularity and item-kNN, learnt of all but the last two items of each sequence."""
    known = [sequence[:-2] for sequence in sequences]
    names = sorted({item for sequence in known for item in sequence})
    items = {name: index for index, name in enumerate(names)}
    seen = np.zeros((len(known), len(items)), np.float32)
    for row, sequence in enumerate(known):
        seen[row, [items[item] for item in sequence]] = 1
    popularity = seen.sum(axis=0)
    norms = np.sqrt(popularity)
    together = (seen.T @ seen) / np.outer(norms, norms)
    np.fill_diagonal(together, 0)
    near = np.zeros_like(together)
    best = np.argpartition(-together, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
    np.put_along_axis(near, best, np.take_along_axis(together, best, axis=1), axis=1)
    found = {}
    for split, left_out in (("validation", 1), ("test", 0)):
        scorers = {
            "popularity": lambda history: popularity,
            "item_knn": lambda history: near[history].sum(axis=0),
            "item_knn_last_10": lambda history: near[history[-10:]].sum(axis=0),
        }
        for name, score in scorers.items():
            values = measure(sequences, left_out, score, items)
            found[f"{name}, {split}"] = values
    return found


def rate(ratings: Sequence[Rating], share: float = 0.1) -> dict[str, dict[str, float]]:
    """The mean of all ratings, and with it biases of people and films (by turns, each drawn towards
    0 as by BIAS_PRIOR ratings more), learnt of what dray does not hold out."""
    texts = pa.array([f"{one.user}{SEPARATOR}{one.item}" for one in ratings], pa.large_string())
    held = held_out(hash_texts(texts)[1], share)
    values = np.array([one.value for one in ratings])
    users, items = (
        np.unique([getattr(one, name) for one in ratings], return_inverse=True)[1]
        for name in ("user", "item")
    )
    mean = values[~held].mean()
    found = {"mean": _errors(values[held], np.full(held.sum(), mean))}
    biases = [np.zeros(users.max() + 1), np.zeros(items.max() + 1)]
    for _ in range(20):
        for own, place in ((users, 0), (items, 1)):
            other = biases[1 - place][(items, users)[place]]
            rest = (values - mean - other)[~held]
            sums, counts = (
                np.bincount(own[~held], weights=weights, minlength=len(biases[place]))
                for weights in (rest, None)
            )
            biases[place] = sums / (counts + BIAS_PRIOR[place])
    guesses = mean + biases[0][users] + biases[1][items]
    return found | {"biases": _errors(values[held], guesses[held].clip(0.5, 5.0))}


def _errors(wanted: Scores, found: Scores) -> dict[str, float]:
    off = found - wanted
    return {
        "rmse": float(np.sqrt((off**2).mean())),
        "mae": float(np.abs(off).mean()),
        "num": float(len(off)),
    }


def main() -> None:
    """Print the baselines as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data/movielens_latest_small", type=Path)
    ratings = read_ratings(parser.parse_args().data)
    found = {"next_item": rank_items(make_sequences(ratings)), "rating": rate(ratings)}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
