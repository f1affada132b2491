"""The table of docs/tasks.md: what each task's recipe reaches on data that it has not learnt from,
beside a simple model on the same split.

    python -m bench.tasks [--only mnist rating …] [--seed 0]

Each recipe runs as a person would run it, by `dray train`; what is done already is found, and what
was stopped goes on. The step is chosen by validation. Rows may be measured one after the other:
each has its day, and a row that is not measured now stays as it is. Reads ../shared/data; what of
it, or of the packages with pretrained weights, is absent ends the run.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from functools import cache
from typing import Any

from bench import baselines
from bench.report import RESULTS, ROOT, write_section

DATA = ROOT / "../shared/data"
FOLDER = RESULTS / "tasks"
PAGE = ROOT / "docs" / "tasks.md"
STORAGE = FOLDER / "runs"
SST2, HOTEL, WNUT = DATA / "sst2", DATA / "chnsenticorp_hotel", DATA / "wnut17"
MOVIES = "../shared/data/movielens_latest_small"
LATER = (
    f"{{path: {MOVIES}/ratings.csv.gz, gather: {{by: userId, order: timestamp, "
    f"names: {{path: {MOVIES}/movies.csv.gz, id: movieId, name: title}}}}}}"
)
TOLD_IN_RECIPE = "…"
"""What is long stands in the recipe's own words."""


@dataclass(frozen=True)
class Row:
    """A recipe, what is measured of its run, and the simple model beside it."""

    task: str
    recipe: str
    data: str
    """What is learnt and what is held out, in words."""
    metrics: Mapping[str, str]
    """How each is written: a format of Python's."""
    baseline: Callable[[str], str]
    """The simple model's figures in words, given the run's name."""
    test: str = ""
    """What is evaluated, as `--data` takes it; empty: what the recipe holds out."""
    options: tuple[str, ...] = ()
    """Of `dray evaluate`."""
    starts_from: str = ""
    """The recipe whose run it starts from."""
    made_by: tuple[str, ...] = ()
    """A module that makes the data, and the folder that it makes."""

    @property
    def command(self) -> str:
        made = f"python -m {' '.join(self.made_by)} && " if self.made_by else ""
        first = made + (f"dray train {self.starts_from} && " if self.starts_from else "")
        place = self.test.removeprefix(f"{ROOT}/")
        test = f" --data {place if self.test != LATER else TOLD_IN_RECIPE}" if self.test else ""
        return (
            f"{first}dray train {self.recipe} && dray evaluate {self.recipe} --step best"
            f"{''.join(f' {one}' for one in self.options)}{test}"
        )


@cache
def of_sst2(_: str) -> str:
    found = baselines.tfidf(*sst2(), analyzer="word", longest=2)
    return f"tf-idf and logistic regression {found:.1%}"


@cache
def sst2() -> Any:
    return [baselines.read_sst2(SST2 / file) for file in ("train.tsv.gz", "dev.tsv", "test.tsv")]


def of_hotel(_: str) -> str:
    kept, held = baselines.read_hotel(HOTEL / "ChnSentiCorp_htl_all.csv.gz", 0.2)
    found = baselines.tfidf(kept, None, held, analyzer="char", longest=3)
    return f"tf-idf and logistic regression {found:.1%}"


def of_entities(_: str) -> str:
    files = ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated")
    report = baselines.crf(*(baselines.read_conll(WNUT / file) for file in files))
    return f"CRF {report['micro avg']['f1-score']:.1%}"


def of_digits(_: str) -> str:
    return f"logistic regression on pixels {baselines.pixels(DATA / 'mnist_test10k', 8000):.1%}"


def of_numbers(_: str) -> str:
    path = DATA / "mnist_test10k"
    few, all_of_them = baselines.pixels(path, 8000, 64), baselines.pixels(path, 8000)
    return f"logistic regression on the 64 {few:.1%}, on all pixels {all_of_them:.1%}"


def of_pairs(run: str) -> str:
    words = {"longer": "the longer answer", "likelier": "what the reference finds likelier"}
    found = baselines.answers(str(STORAGE), run)
    return "; ".join(f"{words[name]} {value:.2f}" for name, value in found.items())


def of_classes(_: str) -> str:
    train, dev, _ = sst2()
    common = max(map(dev[1].count, set(dev[1]))) / len(dev[1])
    told = baselines.tfidf(train, None, dev, analyzer="word", longest=2)
    return f"the commoner class {common:.2f}; tf-idf that is told every class {told:.2f}"


def of_tokens(run: str) -> str:
    from bench.ngrams import measure as measure_ngrams
    from dray.release.trained import open_trained

    trained = open_trained(str(STORAGE), run)
    found = {order: measure_ngrams(trained, order)["perplexity"] for order in (3, 1)}
    return f"Kneser–Ney trigram {found[3]:.0f}, unigram {found[1]:.0f}, same tokens"


@cache
def of_movies() -> dict[str, Any]:
    from bench.recommendation import make_sequences, rank_items, rate, read_ratings

    ratings = read_ratings(ROOT / MOVIES)
    return {"items": rank_items(make_sequences(ratings)), "ratings": rate(ratings)}


def of_items(split: str) -> Callable[[str], str]:
    def words(_: str) -> str:
        names = ("popularity", "item_knn", "item_knn_last_10")
        found = (of_movies()["items"][f"{name}, {split}"] for name in names)
        cells = [f"{one['hr_10']:.3f}, {one['ndcg_10']:.3f}" for one in found]
        return f"popularity {cells[0]}; item-kNN {cells[1]}; of the last ten films {cells[2]}"

    return words


def of_ratings(_: str) -> str:
    cells = (
        f"{one['rmse']:.3f}, {one['mae']:.3f}"
        for one in map(of_movies()["ratings"].get, ("mean", "biases"))
    )
    return "global mean {}; biases of people and films {}".format(*cells)


def of_retrieval(_: str) -> str:
    from bench.retrieval import ask_minilm, find_answers, read_pairs

    pairs = read_pairs(DATA / "dialogue" / "alpaca_en_demo.json.gz")
    rows = {"tf-idf": find_answers(pairs), "MiniLM as it comes": ask_minilm(pairs)}
    return "; ".join(
        f"{name} {found['recall_1']:.3f}, {found['recall_10']:.3f}, {found['mrr']:.3f}"
        for name, found in rows.items()
    )


def of_speech(_: str) -> str:
    from bench.spoken import baseline

    return f"a linear model of 220 ms {baseline(ROOT / 'speech'):.1%} of the characters"


@cache
def of_films() -> dict[str, float]:
    from bench.films import baseline

    return baseline(ROOT / "films")


def of_stars(_: str) -> str:
    words = "the mean {mse_of_the_mean:.3f}; tf-idf and ridge regression {mse:.3f}, {spearman:.2f}"
    return words.format(**of_films())


def of_bands(_: str) -> str:
    return f"tf-idf and ridge regression of the ranks {of_films()['kappa']:.2f}"


def of_sources(_: str) -> str:
    whole, short = (baselines.sources(DATA / "corpus_en", 0.2, most) for most in (None, 250))
    return f"tf-idf and logistic regression {short:.1%} on 250 letters, {whole:.1%} on whole texts"


ACCURACY = {"accuracy": "accuracy {:.1%}"}
ROWS = (
    Row(
        "sequence_classification",
        "sst2",
        "SST-2: 6,920 sentences; 1,821 of test",
        ACCURACY,
        of_sst2,
        str(SST2 / "test.tsv"),
    ),
    Row(
        "sequence_classification",
        "sst2_minilm",
        "the same, from MiniLM",
        ACCURACY,
        of_sst2,
        str(SST2 / "test.tsv"),
    ),
    Row(
        "sequence_classification",
        "sst2_lora",
        "the same, from MiniLM by LoRA: 0.48 of 23.0 M parameters",
        ACCURACY,
        of_sst2,
        str(SST2 / "test.tsv"),
    ),
    Row(
        "sequence_classification",
        "hotel_zh",
        "7,766 hotel reviews, a fifth held out, from an encoder that `masked_lm` has pretrained",
        ACCURACY,
        of_hotel,
        starts_from="reviews_zh",
    ),
    Row(
        "sequence_classification",
        "sources_en",
        "5,848 texts of eight collections, a fifth held out; rare ones are read more often",
        {"f1": "mean F1 of the classes {:.1%}", "accuracy": "accuracy {:.1%}"},
        of_sources,
    ),
    Row(
        "sequence_classification",
        "film_bands",
        "3,650 films by title, genres and tags, a fifth held out: which fifth of the films by its "
        "ratings, from MiniLM",
        {"kappa": "quadratic kappa {:.2f}", "mae": "{:.2f} ranks off"},
        of_bands,
        made_by=("bench.films", "films"),
    ),
    Row(
        "regression",
        "film_stars",
        "the same films: the mean of their ratings",
        {"mse": "mean squared error {:.3f}", "spearman": "Spearman {:.2f}"},
        of_stars,
        made_by=("bench.films", "films"),
    ),
    Row(
        "token_classification",
        "wnut17",
        "WNUT-17: 3,394 short messages; 1,287 of test, from MiniLM",
        {"f1": "entity F1 {:.1%}"},
        of_entities,
        str(WNUT / "emerging.test.annotated"),
    ),
    Row(
        "instruction",
        "service_zh",
        "1,000 Chinese instructions, a tenth held out",
        {"perplexity": "perplexity of the answers' tokens {:.0f}"},
        of_tokens,
    ),
    Row(
        "preference",
        "preference_zh",
        "289 pairs of Chinese dialogue, a fifth held out",
        {"accuracy": "accuracy of pairs {:.2f}"},
        of_pairs,
        starts_from="service_zh",
    ),
    Row(
        "reward",
        "reward_zh",
        "the same",
        {"accuracy": "accuracy of pairs {:.2f}"},
        of_pairs,
        starts_from="service_zh",
    ),
    Row(
        "policy",
        "policy_sst2",
        "SST-2 as prompts; an answer is worth 1 where it is the sentence's class; 872 held out",
        {"reward": "mean reward of 8 drawn answers {:.2f}"},
        of_classes,
        starts_from="sentences_sst2",
    ),
    Row(
        "seq2seq",
        "ci_zh",
        "16,031 Song poems by tune, of which 6,400 are seen; 5,343 held out",
        {"perplexity": "perplexity a token {:.0f}"},
        of_tokens,
    ),
    Row(
        "next_item",
        "next_item",
        "MovieLens latest small, 610 people: the last film, among all that are in the vocabulary",
        {"hr_10": "HR@10 {:.3f}", "ndcg_10": "NDCG@10 {:.3f}"},
        of_items("test"),
        LATER,
    ),
    Row(
        "rating",
        "rating",
        "MovieLens latest small, a tenth of the ratings held out",
        {"rmse": "RMSE {:.3f}", "mae": "MAE {:.3f}"},
        of_ratings,
        options=("--weights ema",),
    ),
    Row(
        "embedding",
        "embedding",
        "999 instructions and answers, a fifth held out, from MiniLM",
        {"recall_1": "recall@1 {:.3f}", "recall_10": "recall@10 {:.3f}", "mrr": "MRR {:.3f}"},
        of_retrieval,
    ),
    Row(
        "image_classification",
        "mnist",
        "MNIST: 8,000 digits, 2,000 held out",
        ACCURACY,
        of_digits,
    ),
    Row(
        "feature_classification",
        "digits_by_numbers",
        "the same digits, by 64 principal components instead of 784 pixels",
        ACCURACY,
        of_numbers,
    ),
    Row(
        "speech_recognition",
        "spoken",
        "2,000 sentences and strings of digits by espeak-ng; 200 in voices that speak nowhere else",
        {"cer": "characters wrong {:.1%}", "wer": "words wrong {:.1%}"},
        of_speech,
        options=("--thorough",),
        made_by=("bench.spoken", "speech"),
    ),
)


def dray(*arguments: str) -> dict[str, Any]:
    """One command of dray's, and the JSON that it prints."""
    command = [f"{sys.prefix}/bin/dray", *arguments, "--storage", str(STORAGE), "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def seconds_of(run: str) -> float:
    """What all attempts of a run took."""
    attempts = dray("show", run)["attempts"]
    spans = (map(datetime.fromisoformat, (one["started"], one["ended"])) for one in attempts)
    return sum((ended - started).total_seconds() for started, ended in spans)


def measure(row: Row, seed: int) -> dict[str, Any]:
    """Train a recipe, or find it done, evaluate it, and ask the simple model."""
    if row.made_by and not (ROOT / row.made_by[-1]).exists():
        subprocess.run([sys.executable, "-m", *row.made_by], cwd=ROOT, check=True)
    runs = [row.starts_from] * bool(row.starts_from) + [row.recipe]
    if row.starts_from:
        dray("train", row.starts_from)
    dray("train", row.recipe, f"seed={seed}")
    data = ("--data", row.test) if row.test else ()
    options = [word for option in row.options for word in option.split()]
    found = dray("evaluate", row.recipe, "--step", "best", *options, *data)
    figures = {
        "evaluation": found,
        "seconds": sum(map(seconds_of, runs)),
        "baseline": row.baseline(row.recipe),
        "day": date.today().isoformat(),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{row.recipe}.json").write_text(json.dumps(figures, indent=1))
    return figures


def rows_before(page: str) -> dict[str, str]:
    """The lines of a page's table, by recipe."""
    rows = re.finditer(r"(?m)^\|.*dray train (\w+) && dray evaluate.*\|$", page)
    return {row[1]: row[0] for row in rows}


def lines(figures: Mapping[str, Any], before: Mapping[str, str]) -> Iterator[str]:
    """The table; what was never measured has no row."""
    yield "| task | data | figure | beside it | command | minutes | day |"
    yield "|---|---|---|---|---|--:|---|"
    for row in ROWS:
        if row.recipe not in figures:
            if row.recipe in before:
                yield before[row.recipe]
            continue
        found = figures[row.recipe]
        cells = (text.format(found["evaluation"][key]) for key, text in row.metrics.items())
        yield (
            f"| `{row.task}` | {row.data} | **{', '.join(cells)}** | {found['baseline']} | "
            f"`{row.command}` | {found['seconds'] / 60:.0f} | {found['day']} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [row.recipe for row in ROWS]
    parser.add_argument("--only", nargs="*", default=names, choices=names)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for row in ROWS:
        if row.recipe in given.only:
            print(f"── {row.recipe}", file=sys.stderr, flush=True)
            print(json.dumps(measure(row, given.seed), indent=1), flush=True)
    kept = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
    before = rows_before(PAGE.read_text(encoding="utf-8"))
    if absent := [name for name in names if name not in kept and name not in before]:
        print(f"not measured yet: {', '.join(absent)}", file=sys.stderr)
    write_section("tasks", "\n".join(lines(kept, before)), kept, PAGE)


if __name__ == "__main__":
    main()
