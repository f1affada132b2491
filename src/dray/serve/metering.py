"""What a gateway counts of its requests, as Prometheus reads it.

Labels are of what is served alone, so that no caller makes series of its own, and nothing of what a
request says is in them. What is counted elsewhere is read as Prometheus asks (`Live`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dray.serve.asked import Asked
from dray.serve.drift import Drifted

Made = TypeVar("Made", Counter, Gauge, Histogram)
PREFIX = "dray_serve_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Upper bounds of histograms."""
_ABOUT = ("model", "version", "route")
METRICS: Mapping[str, tuple[Sequence[str], str]] = {
    "requests_total": (
        (*_ABOUT, "status"),
        "Requests that have ended. A stream that broke off has the status of what broke it, 499 is "
        "who went away before the end.",
    ),
    "seconds": (_ABOUT, "Histogram: from a request's headers to the end of its answer."),
    "first_byte_seconds": (
        _ABOUT,
        "Histogram: from a request's headers to the first of its answer; of a stream, to its first "
        "token.",
    ),
    "under_way": ((), "Requests that have not ended."),
    "queue": (("model",), "Requests that are with replicas: waiting there, or worked on."),
    "ready": (("model",), "1 where a replica answers within 5 s as Prometheus asks, else 0."),
    "tokens_total": (
        ("model", "version", "direction"),
        "Tokens of requests that were answered, `in` and `out`.",
    ),
    "refusals_total": (("code", "status"), "Requests that were refused, or whose stream broke."),
    "shadow_answers_total": (
        ("model", "agreement"),
        "Answers of shadows: `same` as what was given out, `other`, `failed`, or `left_out`.",
    ),
    "drift": (
        ("model", "version", "of", "reference"),
        "Population stability index of the newest 500 values against the reference.",
    ),
    "feedback_total": (
        ("model", "version", "verdict"),
        "What people said of answers: `right`, by a thumb up or the same label, or `wrong`.",
    ),
    "log_lost_total": ((), "Lines of the request log that were lost; absent without a log."),
}
"""Metric → its labels, and what it says."""


@dataclass(frozen=True)
class Live:
    """What is known elsewhere, as functions that tell it now."""

    queue: Callable[[], Mapping[str, int]] = dict
    agreements: Callable[[], Mapping[str, Mapping[str, int]]] = dict
    drift: Callable[[], Iterable[Drifted]] = tuple
    feedback: Callable[[], Mapping[tuple[str, str, str], int]] = dict
    log_lost: Callable[[], int | None] = field(default=lambda: None)


class Meter:
    """Counts of one gateway."""

    def __init__(self, live: Live | None = None) -> None:
        # When each series began: as many gauges again, of no use here.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._live = _Reader(live or Live())
        self._registry.register(self._live)
        self._requests = self._made(Counter, "requests_total")
        self._refusals = self._made(Counter, "refusals_total")
        self._tokens = self._made(Counter, "tokens_total")
        self._whole = self._made(Histogram, "seconds")
        self._first = self._made(Histogram, "first_byte_seconds")
        self._under_way = self._made(Gauge, "under_way")

    def _made(self, kind: type[Made], name: str) -> Made:
        labels, says = METRICS[name]
        # Only histograms have bounds, and all of them these.
        bounds: dict[str, Any] = {"buckets": SECONDS} if issubclass(kind, Histogram) else {}
        return kind(PREFIX + name, says, labels, registry=self._registry, **bounds)

    def begin(self) -> None:
        """A request comes."""
        self._under_way.inc()

    def end(self, request: Asked, route: str) -> None:
        """It has ended. `route`: one that there is, or `other`."""
        self._under_way.dec()
        version = "" if request.version is None else str(request.version)
        about = (request.model or "", version, route)
        self._requests.labels(*about, str(request.outcome)).inc()
        if (refusal := request.refusal) is not None:
            self._refusals.labels(refusal.word, str(refusal.status)).inc()
            return
        if request.version is None:
            return
        if request.first is not None:
            self._first.labels(*about).observe(request.first - request.began)
        if request.is_whole:
            self._whole.labels(*about).observe(request.seconds)
        for direction, number in (("in", request.tokens_in), ("out", request.tokens_out)):
            if number is not None:
                self._tokens.labels(*about[:2], direction).inc(number)

    def text(self, readiness: Mapping[str, bool]) -> bytes:
        """All of it. `readiness`: which models have a replica that answers."""
        self._live.readiness = readiness
        return generate_latest(self._registry)


class _Reader(Collector):
    """What is known elsewhere, in Prometheus' form."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self.readiness: Mapping[str, bool] = {}

    def describe(self) -> Iterator[Metric]:
        yield from ()  # nothing is asked before there is anything

    def collect(self) -> Iterator[Metric]:
        yield _family("queue", {(name,): n for name, n in self.live.queue().items()})
        yield _family("ready", {(name,): is_so for name, is_so in self.readiness.items()})
        counted: dict[tuple[str, ...], float] = {
            (model, agreement): number
            for model, numbers in self.live.agreements().items()
            for agreement, number in numbers.items()
        }
        yield _family("shadow_answers_total", counted)
        drifts: dict[tuple[str, ...], float] = {
            (one.model, str(one.version), one.of, one.source): one.value
            for one in self.live.drift()
        }
        yield _family("drift", drifts)
        said: dict[tuple[str, ...], float] = dict(self.live.feedback().items())
        yield _family("feedback_total", said)
        if (lost := self.live.log_lost()) is not None:
            yield _family("log_lost_total", {(): lost})


def _family(name: str, values: Mapping[tuple[str, ...], float]) -> Metric:
    labels, says = METRICS[name]
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    found = kind(PREFIX + name, says, labels=labels)
    for label, value in values.items():
        found.add_metric(label, value)
    return found
