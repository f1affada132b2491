"""Watches what guests write: reads reviews as they come, a line of JSON each, and says when more of
them are unhappy than are used to be.

    python docs/applications/sentiment_watch.py stream stream.jsonl      # a stream to try it on
    python docs/applications/sentiment_watch.py watch hotel_zh --plot trend.png < stream.jsonl

The chart is a cumulative sum for shares (Reynolds and Stoumbos 1999): each review adds the
logarithm of how much likelier it is where the share of unhappy ones has risen to `--risen` than
where it is the usual one, and the sum does not fall below 0. The usual share is that of the first
`--learn` reviews, as the model tells them, so that what it takes for unhappy by mistake is part of
it. The limit is set so that a stream where nothing happens has a false alarm in `--quiet` reviews.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

REVIEWS = Path("../shared/data/chnsenticorp_hotel/ChnSentiCorp_htl_all.csv.gz")
HELD_OUT = 0.2
"""As in the recipe: what the model has not seen."""
UNHAPPY = "0"
PARTS = ((500, 0.3), (150, 0.6), (350, 0.3))
"""Of the stream: reviews, and the share of unhappy ones. In the second part something is wrong."""


def make_stream(path: Path, seed: int) -> None:
    """Real reviews that the model has not seen, in an order that is made: unhappy ones become
    frequent for a while."""
    import pyarrow as pa

    from dray.corpus.cleaning import hash_texts, held_out, normalize

    with gzip.open(REVIEWS, "rt", encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["review"].strip()]
    texts = normalize(pa.array([row["review"] for row in rows], pa.large_string()), "NFC")
    held = held_out(hash_texts(texts)[1], HELD_OUT)
    drawn = random.Random(seed)
    kinds: dict[bool, list[str]] = {True: [], False: []}
    for row, is_held in zip(rows, held, strict=True):
        if is_held:
            kinds[row["label"] == UNHAPPY].append(row["review"])
    for reviews in kinds.values():
        drawn.shuffle(reviews)
    lines = [
        {"review": kinds[is_unhappy].pop(), "was_unhappy": is_unhappy}
        for number, share in PARTS
        for is_unhappy in (drawn.random() < share for _ in range(number))
    ]
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    print(f"{len(lines)} reviews; from {PARTS[0][0] + 1} to {PARTS[0][0] + PARTS[1][0]} more of")
    print(f"them are unhappy ({PARTS[1][1]:.0%} instead of {PARTS[0][1]:.0%})")


@dataclass
class Chart:
    """A cumulative sum of what reviews say for a risen share."""

    usual: float
    risen: float
    limit: float
    total: float = 0.0
    since: int = 0
    """The review behind the last one where the sum was 0: about where the rise began."""

    def add(self, number: int, is_unhappy: bool) -> bool:
        """Whether the sum goes over the limit with this review; it begins anew then."""
        self.total = max(0.0, self.total + gain(self.usual, self.risen)[int(is_unhappy)])
        if self.total == 0:
            self.since = number + 1
        if self.total < self.limit:
            return False
        self.total = 0.0
        return True


def gain(usual: float, risen: float) -> tuple[float, float]:
    """What a happy review and an unhappy one add: logarithms of how much likelier each is."""
    return float(np.log((1 - risen) / (1 - usual))), float(np.log(risen / usual))


def begin(usual: float, given: argparse.Namespace, number: int = 0) -> Chart:
    """The chart behind review `number`, with the share that it looks for well above the usual
    one."""
    usual = round(min(max(usual, 0.01), 0.85), 2)  # of a share of 0 or 1 nothing could be told
    risen = max(given.risen, usual + 0.1)
    limit = find_limit(usual, risen, given.quiet)
    return Chart(usual, risen, limit, since=number + 1)


@cache
def find_limit(usual: float, risen: float, quiet: int, seed: int = 0, streams: int = 400) -> float:
    """The lowest limit that streams of the usual share reach in `quiet` reviews on average, found
    by drawing such streams."""
    drawn = np.random.default_rng(seed).random((streams, 4 * quiet)) < usual
    steps = np.where(drawn, gain(usual, risen)[1], gain(usual, risen)[0])
    sums = np.cumsum(steps, axis=1)
    totals = sums - np.minimum(np.minimum.accumulate(sums, axis=1), 0)
    low, high = 0.0, float(totals.max())
    for _ in range(20):
        limit = (low + high) / 2
        reached = totals >= limit
        first = np.where(reached.any(axis=1), reached.argmax(axis=1), totals.shape[1])
        low, high = (low, limit) if first.mean() >= quiet else (limit, high)
    return high


def read_as_they_come(most: int = 64) -> Iterator[list[dict[str, Any]]]:
    """Lists of what there is to read: one at least, and no more waiting than for that."""
    rest, source = b"", sys.stdin.fileno()
    while piece := os.read(source, 1 << 20):  # what is there, or the next that comes
        *lines, rest = (rest + piece).split(b"\n")
        found = [_read_line(line) for line in lines if line.strip()]
        for start in range(0, len(found), most):
            yield found[start : start + most]
    if rest.strip():
        yield [_read_line(rest)]


def _read_line(line: bytes) -> dict[str, Any]:
    """A review; what is none is an empty one, which the model has nothing to tell of."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    review = found.get("review") if isinstance(found, dict) else None
    return {"review": review} if isinstance(review, str) else {"review": None, "was": repr(line)}


def watch(given: argparse.Namespace) -> None:
    """Read reviews from standard input to its end, and print what is to be known of them."""
    from dray.release.predict import Predictor
    from dray.release.trained import load_trained

    predictor = Predictor(load_trained(given.storage, given.run))
    told: list[bool] = []
    chart: Chart | None = None
    alarms: list[tuple[int, int]] = []
    for reviews in read_as_they_come():
        texts = [{"text": review["review"]} for review in reviews]
        for review, found in zip(reviews, predictor.predict(texts), strict=True):
            if "error" in found:
                print(f"left out: {found['error']}: {review}")
                continue
            told.append(found["prediction"] == UNHAPPY)
            number = len(told)
            if number == given.learn:
                usual = sum(told) / number
                chart = begin(usual, given, number)
                print(f"of the first {number} reviews {usual:.0%} are unhappy: that is usual")
            elif chart is not None and chart.add(number, told[-1]):
                since, chart.since = chart.since, number + 1
                alarms.append((since, number))
                share = sum(told[since - 1 :]) / (number - since + 1)
                print(f"ALERT at review {number}: since {since} {share:.0%} are unhappy")
    print(f"{len(told)} reviews, {sum(told) / max(1, len(told)):.0%} unhappy, {len(alarms)} alerts")
    if given.plot and chart is not None:
        draw(told, chart, alarms, given)


def draw(
    told: list[bool], chart: Chart, alarms: list[tuple[int, int]], given: argparse.Namespace
) -> None:
    """The share of the last 50 reviews, and when there was an alert."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width = min(50, len(told))
    shares = np.convolve(told, np.ones(width) / width, mode="valid")
    figure, axes = pyplot.subplots(figsize=(9, 3), layout="constrained")
    axes.plot(np.arange(width, len(told) + 1), shares, label=f"of the last {width} reviews")
    axes.axhline(chart.usual, color="grey", linestyle=":", label="usual")
    for place, (since, number) in enumerate(alarms):
        label = {"label": "alert, from its likely beginning"} if not place else {}
        axes.axvspan(since, number, color="tab:red", alpha=0.2, linewidth=0, **label)
    axes.set(xlabel="review", ylabel="unhappy", ylim=(0, 1))
    axes.legend(loc="upper left")
    figure.savefig(given.plot, dpi=100)
    print(f"drawn: {given.plot}")


def measure(given: argparse.Namespace) -> None:
    """What the model makes of a stream's reviews, and how soon the chart tells that more of them
    are unhappy."""
    from dray.release.predict import Predictor
    from dray.release.trained import load_trained

    with given.path.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    predictor = Predictor(load_trained(given.storage, given.run))
    found = predictor.predict([{"text": line["review"]} for line in lines])
    told: dict[bool, list[bool]] = {True: [], False: []}
    for line, one in zip(lines, found, strict=True):
        told[line["was_unhappy"]].append(one["prediction"] == UNHAPPY)
    hit, mistaken = (sum(told[kind]) / len(told[kind]) for kind in (True, False))
    print(f"of the unhappy {hit:.1%} are found, of the happy {mistaken:.1%} taken for unhappy")
    drawn, before, behind = random.Random(given.seed), 500, 150
    for risen in (PARTS[1][1], PARTS[0][1]):
        delays, false = [], 0
        for _ in range(given.streams):
            stream = [
                drawn.choice(told[drawn.random() < (risen if number > before else PARTS[0][1])])
                for number in range(1, before + behind + 1)
            ]
            chart = begin(sum(stream[: given.learn]) / given.learn, given, given.learn)
            for number, is_unhappy in enumerate(stream[given.learn :], given.learn + 1):
                if chart.add(number, is_unhappy):
                    false += number <= before or risen == PARTS[0][1]
                    delays += [number - before] * (number > before and risen != PARTS[0][1])
                    break
        print(f"{risen:.0%} unhappy behind review {before}: {false} false alerts", end="")
        if delays:
            delays.sort()
            late = f"{delays[len(delays) // 2]} reviews later (median), {delays[-1]} at most"
            missed = given.streams - false - len(delays)
            print(f", {len(delays)} alerts {late}, {missed} missed", end="")
        print(f", in {given.streams} streams of {before + behind}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    stream = commands.add_parser("stream", help="write a stream of reviews")
    stream.add_argument("path", type=Path)
    stream.add_argument("--seed", type=int, default=0)
    stream.set_defaults(call=lambda given: make_stream(given.path, given.seed))
    one = commands.add_parser("watch", help="read reviews from standard input")
    one.set_defaults(call=watch)
    one.add_argument("run")
    one.add_argument("--plot", help="an image to draw the trend into")
    other = commands.add_parser("measure", help="how soon a rise is told, by a stream's reviews")
    other.set_defaults(call=measure)
    other.add_argument("run")
    other.add_argument("path", type=Path)
    other.add_argument("--streams", type=int, default=200)
    other.add_argument("--seed", type=int, default=1)
    for command in (one, other):
        command.add_argument("--storage", default="./runs")
        command.add_argument(
            "--learn", type=int, default=200, help="reviews that say what is usual"
        )
        command.add_argument("--risen", type=float, default=0.5, help="the share to look for")
        command.add_argument("--quiet", type=int, default=2000, help="reviews to a false alarm")
    given = parser.parse_args()
    given.call(given)


if __name__ == "__main__":
    main()
