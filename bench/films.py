"""What people think of films, to learn `regression` and ordered classes from; the recipes
film_stars and film_bands read it.

    python -m bench.films films                # films/train.jsonl and films/heldout.jsonl
    python -m bench.films films --baseline     # what tf-idf and a linear model make of them

A record is a film of MovieLens that at least five people have rated: its title, genres and tags as
`text`, the mean of its ratings as `stars`, and as `band` which fifth of the training films that is,
from 1 (worst) to 5. Films are held out by a hash of their number.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LEAST_RATINGS, HELD_OUT_OF = 5, 5


@dataclass(frozen=True)
class Film:
    """A record before it has a band."""

    text: str
    stars: float
    is_held: bool


def read(folder: Path) -> list[Film]:
    """The films that enough people have rated."""

    def records(file: str) -> Iterator[dict[str, str]]:
        with gzip.open(folder / file, "rt", encoding="utf-8") as lines:
            yield from csv.DictReader(lines)

    ratings, tags = defaultdict[str, list[float]](list), defaultdict[str, set[str]](set)
    for one in records("ratings.csv.gz"):
        ratings[one["movieId"]].append(float(one["rating"]))
    for one in records("tags.csv.gz"):
        tags[one["movieId"]].add(one["tag"].lower())
    found = []
    films = list(records("movies.csv.gz"))
    for one in films:
        number = one["movieId"]
        if len(ratings[number]) >= LEAST_RATINGS:
            text = f"{one['title']}. {one['genres'].replace('|', ', ')}."
            text += f" {', '.join(sorted(tags[number]))}" if tags[number] else ""
            digest = int(hashlib.sha256(number.encode()).hexdigest(), 16)
            stars = round(float(np.mean(ratings[number])), 3)
            found.append(Film(text, stars, digest % HELD_OUT_OF == 0))
    few = f"{len(films) - len(found):,} have fewer than {LEAST_RATINGS} ratings and are left out"
    print(f"{len(found):,} of {len(films):,} films; {few}", file=sys.stderr)
    return found


def write(folder: Path, data: Path) -> None:
    """Both files."""
    films = read(data)
    bounds = np.quantile([film.stars for film in films if not film.is_held], (0.2, 0.4, 0.6, 0.8))
    folder.mkdir(parents=True, exist_ok=True)
    for name, is_held in (("train", False), ("heldout", True)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for film in films:
                if film.is_held == is_held:
                    band = 1 + int(np.searchsorted(bounds, film.stars))
                    record = {"text": film.text, "stars": film.stars, "band": band}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def baseline(folder: Path) -> dict[str, float]:
    """Mean squared error of the mean and of a ridge regression on tf-idf of words and pairs of
    words, its correlation, and the quadratic kappa of its numbers' bands."""
    from scipy.stats import spearmanr
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import RidgeCV
    from sklearn.metrics import cohen_kappa_score, mean_squared_error

    train, held = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").open(encoding="utf-8")]
        for name in ("train", "heldout")
    )
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    features = vectors.fit_transform([one["text"] for one in train])
    others = vectors.transform([one["text"] for one in held])
    stars, bands = (np.array([one[key] for one in train]) for key in ("stars", "band"))
    wanted, places = (np.array([one[key] for one in held]) for key in ("stars", "band"))
    strengths = np.logspace(-1, 2, 13)
    numbers = RidgeCV(alphas=strengths).fit(features, stars).predict(others)
    ranks = RidgeCV(alphas=strengths).fit(features, bands).predict(others)
    return {
        "mse_of_the_mean": mean_squared_error(wanted, np.full(len(wanted), stars.mean())),
        "mse": mean_squared_error(wanted, numbers),
        "spearman": float(spearmanr(wanted, numbers).statistic),
        "kappa": cohen_kappa_score(
            places, ranks.round().clip(1, 5).astype(int), weights="quadratic"
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/movielens_latest_small"))
    parser.add_argument("--baseline", action="store_true")
    given = parser.parse_args()
    if given.baseline:
        print(json.dumps(baseline(given.folder), indent=1))
    else:
        write(given.folder, given.data)


if __name__ == "__main__":
    main()
