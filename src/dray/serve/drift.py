"""Whether what a version is asked, and what it answers, are still what they were: the population
stability index between a reference and a sliding window, of each of a few numbers and names.

The reference of a version is what it makes of held-out rows of its own corpus, where its replica
has them; else its first requests since the gateway began. Kept are numbers of bins, never a text.
This file knows neither requests nor models.
"""

from __future__ import annotations

import asyncio
import logging
import math
from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Value = float | str
Look = Mapping[str, Value | list[str]]
"""What is looked at of a record or an answer, by name: a number, a name, or names."""
Source = Literal["held_out", "first_requests"]
Fetch = Callable[[str, int], Awaitable[Sequence[Look] | None]]

NUM_BINS = 10
"""Tenths of the reference's numbers; or its most frequent names, and all others."""
REFERENCE = 500
"""Values of a reference that is made of requests."""
WINDOW = 500
"""Newest values that are compared with it."""
LEAST = 200
"""Values of both before anything is told. Where nothing has changed, the index of B bins is about
(B − 1)(1/N + 1/M), and by chance beyond 0.2 once in a thousand windows at most (chi-squared;
Yurdakul and Naranjo, Statistical properties of the population stability index, 2020)."""
MOST_VERSIONS = 32
"""Whose windows are kept: those that were asked last."""
FETCH_SECONDS = 120.0
_OTHERS = "others"
_log = logging.getLogger("dray.serve")


def look_at_prompt(size: Sequence[int]) -> Look:
    """Of a prompt with so many tokens, and so many unknown ones among them."""
    num_tokens, num_unknown = size
    return {
        "input_length": float(num_tokens),
        "unknown_tokens": num_unknown / max(1, num_tokens),
    }


def look_at_prediction(prediction: Mapping[str, Any], size: Sequence[int]) -> Look:
    """Of a record with so many tokens and unknown ones, and of what was predicted: `class` (or the
    tags, or the classes) and `top_score`; a number as `value`; of a text that was written, its
    length in characters. Of a record that could not be read, nothing."""
    if "prediction" not in prediction:
        return {}
    found, scores = prediction["prediction"], prediction.get("scores")
    look: dict[str, Value | list[str]] = dict(look_at_prompt(size))
    numbers = scores.values() if isinstance(scores, Mapping) else scores or ()
    if numbers:
        look["top_score"] = float(max(numbers))
    if isinstance(found, str):
        look |= {"class": found} if scores else {"written_length": float(len(found))}
    elif isinstance(found, bool | int | float):
        look["value"] = float(found)
    elif _are_names(found) and not isinstance(scores, list):  # classes, or tags of words
        look["class"] = [name or "none" for name in found[:REFERENCE]] or ["none"]
    return look


def _are_names(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(name, str | None) for name in found)


def population_stability(expected: Sequence[float], actual: Sequence[float]) -> float:
    """Σ (a − e) ln(a / e) over two series of shares, each of which is more than 0 (Siddiqi, Credit
    Risk Scorecards, 2006): the divergence of Kullback and Leibler in both directions. Below 0.1 is
    usually taken as no change, above 0.25 as a great one."""
    return math.fsum((a - e) * math.log(a / e) for e, a in zip(expected, actual, strict=True))


def smoothed(counts: Sequence[int]) -> list[float]:
    """Counts as shares, half of one added to each (Krichevsky and Trofimov 1981): a bin that is
    empty by chance has no infinite index."""
    whole = sum(counts) + len(counts) / 2
    return [(count + 0.5) / whole for count in counts]


class Sketch:
    """A reference as counts of bins, and the newest values as numbers of bins."""

    def __init__(self, reference: Sequence[Value]) -> None:
        self._edges = _tenths([value for value in reference if not isinstance(value, str)])
        named = Counter(value for value in reference if isinstance(value, str))
        self._names = [name for name, _ in named.most_common(NUM_BINS - 1)]
        size = len(self._names) + 1 if named else len(self._edges) + 1
        self.expected, self.actual = [0] * size, [0] * size
        for value in reference:
            self.expected[self._bin(value)] += 1
        self._window: deque[int] = deque()

    def add(self, value: Value) -> None:
        """The newest one; the oldest of a full window goes."""
        place = self._bin(value)
        self._window.append(place)
        self.actual[place] += 1
        if len(self._window) > WINDOW:
            self.actual[self._window.popleft()] -= 1

    def drift(self) -> float | None:
        """The index; none where there are too few values."""
        if min(len(self._window), sum(self.expected)) < LEAST:
            return None
        return population_stability(smoothed(self.expected), smoothed(self.actual))

    def _bin(self, value: Value) -> int:
        if isinstance(value, str):
            return self._names.index(value) if value in self._names else len(self.expected) - 1
        return min(bisect_left(self._edges, value), len(self.expected) - 1)


def _tenths(numbers: Sequence[float]) -> list[float]:
    """The upper bounds of the tenths, each once: fewer where many numbers are the same."""
    ordered, size = sorted(numbers), len(numbers)
    if not size:
        return []
    found = [ordered[math.ceil(size * part / NUM_BINS) - 1] for part in range(1, NUM_BINS)]
    return sorted(set(found))


class _Feature:
    """One of the numbers or names of a version."""

    def __init__(self) -> None:
        self.source: Source | None = None
        self.sketch: Sketch | None = None
        self._early: deque[Value] = deque(maxlen=REFERENCE)

    def add(self, value: Value, *, waits: bool) -> None:
        """`waits`: a reference may come yet."""
        if self.sketch is not None:
            self.sketch.add(value)
            return
        self._early.append(value)
        if not waits and len(self._early) == REFERENCE:
            self.sketch, self.source = Sketch(self._early), "first_requests"
            self._early.clear()

    def refer(self, reference: Sequence[Value]) -> None:
        """The reference is here; what was asked before it came is in the window."""
        self.sketch, self.source = Sketch(reference), "held_out"
        for value in self._early:
            self.sketch.add(value)
        self._early.clear()


class VersionDrift:
    """What is known of one version."""

    def __init__(self) -> None:
        self._features: dict[str, _Feature] = {}
        self._waits = True

    def add(self, look: Look) -> None:
        """One record or answer."""
        for name, value in _values(look):
            self._features.setdefault(name, _Feature()).add(value, waits=self._waits)

    def refer(self, looks: Sequence[Look] | None) -> None:
        """The reference, or that there is none but the first requests."""
        self._waits = False
        values: dict[str, list[Value]] = {}
        for look in looks or ():
            for name, value in _values(look):
                values.setdefault(name, []).append(value)
        for name, some in values.items():
            if len(some) >= LEAST:
                self._features.setdefault(name, _Feature()).refer(some)

    def read(self) -> Iterator[tuple[str, float, Source]]:
        """What can be told: the name of what has drifted, how far, and from which reference."""
        for name, feature in self._features.items():
            drift = None if feature.sketch is None else feature.sketch.drift()
            if drift is not None and feature.source is not None:
                yield name, drift, feature.source


def _values(look: Look) -> Iterator[tuple[str, Value]]:
    for name, value in look.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) or math.isfinite(one):
                yield name, one


@dataclass(frozen=True)
class Drifted:
    """One number of the index."""

    model: str
    version: int
    of: str
    value: float
    source: Source


class Drift:
    """The versions of a gateway. `fetch` asks a version's replica for its reference, once, in the
    background of the first request to it."""

    def __init__(self, fetch: Fetch | None = None) -> None:
        self._fetch = fetch
        self._versions: OrderedDict[tuple[str, int], VersionDrift] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    def note(self, model: str, version: int, looks: Sequence[Look]) -> None:
        """What was looked at of a request."""
        if not looks:
            return
        pair = (model, version)
        if pair not in self._versions:
            self._begin(pair)
        self._versions.move_to_end(pair)
        for look in looks:
            self._versions[pair].add(look)

    def read(self) -> Iterator[Drifted]:
        """All that can be told."""
        for (model, version), drift in self._versions.items():
            for of, value, source in drift.read():
                yield Drifted(model, version, of, value, source)

    def _begin(self, pair: tuple[str, int]) -> None:
        drift = self._versions[pair] = VersionDrift()
        if len(self._versions) > MOST_VERSIONS:
            self._versions.popitem(last=False)
        if self._fetch is None:
            drift.refer(None)
            return
        task = asyncio.create_task(self._refer(drift, *pair))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _refer(self, drift: VersionDrift, model: str, version: int) -> None:
        assert self._fetch is not None
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                looks = await self._fetch(model, version)
        except Exception as error:  # whatever it is: requests are a reference, too
            why = type(error).__name__
            _log.warning("%s@%d: no held-out rows for its drift (%s)", model, version, why)
            looks = None
        drift.refer(looks)
