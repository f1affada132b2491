"""The loop from a served model's mistakes to a better one that answers in its place:

    python docs/applications/feedback_loop.py

serves the run `mood`, sends it reviews as guests write them, lets some of the guests say whether
the answer was right, watches the share of wrong ones, and, once that has risen, goes on training
with what they said and promotes the new run. The same guests' next reviews go to the new version.

The reviews are real, and the model has not seen them; what changes is made. From the 301st on
guests write in the words of the net: WORDS says which take the place of which.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import requests

from dray.corpus.cleaning import hash_texts, held_out, normalize

REVIEWS = Path("../shared/data/chnsenticorp_hotel/ChnSentiCorp_htl_all.csv.gz")
HELD_OUT = 0.2
"""As in the spec: what the model has not seen."""
BEFORE, CHANGED, LAST = 300, 900, 300
"""Reviews in usual words, then in those of the net, and of these the last after the promotion."""
SPEAKS, HONEST = 0.7, 0.97
"""Share of the guests who say something of an answer, and how many of them say the truth."""
WINDOW, RISEN = 80, 1.5
"""Newest words of guests that are looked at, and by how much the share of wrong ones must have
risen, over that of the first window, for an alert."""
WORDS = {
    "不错": "绝绝子", "满意": "赞爆", "舒服": "巴适", "方便": "丝滑", "干净": "透亮",
    "热情": "暖爆", "推荐": "安利", "喜欢": "上头", "很好": "很顶", "较好": "较顶",
    "好的": "顶的", "便宜": "白菜价", "失望": "破防", "不好": "翻车", "太差": "太拉胯",
    "很差": "很拉胯", "差": "拉胯", "脏": "辣眼", "吵": "炸耳", "旧": "出土",
    "贵": "割韭菜", "投诉": "开撕", "态度": "脸色", "再也不": "拉黑",
    "一般": "平平", "没": "木", "不": "布", "好": "顶", "很": "狠", "太": "忒", "非常": "巨",
}  # fmt: skip
URL, NAME, DATASET = "http://127.0.0.1:8017", "mood", "guests"


def read_reviews(seed: int = 0) -> list[tuple[str, str]]:
    """Reviews that training has not seen, with their labels, in an order that is made."""
    with gzip.open(REVIEWS, "rt", encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.DictReader(file) if len(row["review"].strip()) > 3]
    texts = normalize(pa.array([row["review"] for row in rows], pa.large_string()), "NFC")
    held = held_out(hash_texts(texts)[1], HELD_OUT)
    found = [(row["review"], row["label"]) for row, one in zip(rows, held, strict=True) if one]
    random.Random(seed).shuffle(found)
    return found[: BEFORE + CHANGED + LAST]


def in_words_of_the_net(review: str) -> str:
    """A review as its writer would put it now."""
    for old, new in WORDS.items():
        review = review.replace(old, new)
    return review


class Guests:
    """They ask, and some of them say whether the answer was right."""

    def __init__(self) -> None:
        self._drawn = random.Random(1)
        self._said: deque[bool] = deque(maxlen=WINDOW)
        self._usual: float | None = None
        self.num_said = self.num_asked = 0
        self.alerts: list[int] = []

    def send(self, reviews: Sequence[tuple[str, str]], model: str = NAME) -> float:
        """The share of right answers. Nothing is said of those of a model that is asked by name."""
        right = 0
        for review, label in reviews:
            self.num_asked += 1
            body = {"model": model, "input": review}
            answer = requests.post(f"{URL}/classify", json=body, timeout=60)
            answer.raise_for_status()
            guess = answer.json()["predictions"][0]["prediction"]
            right += guess == label
            if model == NAME and self._drawn.random() < SPEAKS:
                self._say(answer.headers["x-request-id"], guess, label)
        return right / len(reviews)

    def _say(self, request: str, guess: str, label: str) -> None:
        """A thumb up, or the right label; a few say the opposite of what is right."""
        if self._drawn.random() > HONEST:
            label = "1" if label == "0" else "0"
        said = {"rating": "up"} if guess == label else {"rating": "down", "label": label}
        found = requests.post(f"{URL}/v1/feedback", json={"id": request, **said}, timeout=60)
        found.raise_for_status()
        self.num_said += 1
        self._said.append(guess != label)
        if len(self._said) < WINDOW:
            return
        share = sum(self._said) / WINDOW
        if self._usual is None:
            self._usual = share
        elif not self.alerts and share > RISEN * max(self._usual, 1 / WINDOW):
            self.alerts.append(self.num_asked)
            print(
                f"ALERT at review {self.num_asked}: of the last {WINDOW} guests who said something "
                f"{share:.0%} found the answer wrong, {self._usual:.0%} at first"
            )


def dray(*words: str) -> Any:
    """A command of dray's, and the JSON that it prints."""
    done = subprocess.run(
        [f"{sys.prefix}/bin/dray", *words, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"dray {' '.join(words)} ended with {done.returncode}\n{done.stdout}")
    return json.loads(done.stdout)


def version() -> int:
    """That answers now; 0 while none does."""
    try:
        found = requests.get(f"{URL}/v1/models", timeout=5).json()["data"]
    except (requests.RequestException, ValueError, KeyError):
        return 0
    return next(
        (one["version"] for card in found for one in card["versions"] if one["role"] == "promoted"),
        0,
    )


def wait_for(wanted: int, service: subprocess.Popen[bytes]) -> None:
    """Wait until a version answers."""
    end = time.monotonic() + 300
    while version() < wanted:
        if service.poll() is not None or time.monotonic() > end:
            raise SystemExit("the service does not answer")
        time.sleep(1)


def main() -> None:
    reviews = read_reviews()
    usual = reviews[:BEFORE]
    changed = [(in_words_of_the_net(review), label) for review, label in reviews[BEFORE:]]
    touched = sum(new != old for (new, _), (old, _) in zip(changed, reviews[BEFORE:], strict=True))
    print(f"{touched} of {len(changed)} reviews have words of the net")
    first, rest = changed[:CHANGED], changed[CHANGED:]
    words = [NAME, "--port", URL.rpartition(":")[2], "--feedback", DATASET]
    service = subprocess.Popen(
        [f"{sys.prefix}/bin/dray", "serve", *words], env={**os.environ, "DRAY_OPEN_SERVICE": "1"}
    )
    try:
        wait_for(1, service)
        begun, guests = version(), Guests()
        print(f"usual words:          {guests.send(usual):.1%} right of {len(usual)}")
        print(f"words of the net:     {guests.send(first):.1%} right of {len(first)}")
        print(f"{guests.num_said} of {guests.num_asked} guests said something")
        if not guests.alerts:
            raise SystemExit("no alert: the share of wrong answers has not risen")
        old = guests.send(rest, f"{NAME}@{begun}")  # of which nothing is said
        more = ("--continue", NAME, "--data", f"feedback:{DATASET}", "--promote", NAME)
        done = dray("train", *more, "optimizer.learning_rate=3.0e-4", "duration.steps=160")
        wait_for(begun + 1, service)
        for kind, told in (("old", "held-out reviews"), ("new", "feedback that was kept out")):
            values = done["metrics"][kind]["values"]
            before, after = (values[when]["accuracy"] for when in ("before", "after"))
            number = done["metrics"][kind]["num_rows"]
            print(f"{told} ({number}): {before:.1%} before, {after:.1%} after")
        print(f"{done['run']} is {done['promoted']}")
        print(
            f"words of the net now: {guests.send(rest):.1%} right of {len(rest)}, {old:.1%} before"
        )
        print(f"usual words now:      {guests.send(usual):.1%} right of {len(usual)}")
    finally:
        service.send_signal(signal.SIGINT)
        service.wait(60)
    listed = dray("feedback", "list", DATASET, "--run", done["run"])
    learnt = [steps for steps in listed["learnt"].values() if steps]
    given, times = done["datasets"][DATASET]["given"], sum(map(len, learnt)) / len(learnt)
    print(
        f"by its ledger {done['run']} has learnt {len(learnt)} of the {given} entries that it was "
        f"given, each at {times:.1f} steps"
    )


if __name__ == "__main__":
    main()
