"""What Prometheus reads of a service."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from dray.serve.api import make_api
from dray.serve.events import Event
from dray.serve.held_keys import Ring, create_key
from dray.serve.keys import OneKey
from dray.serve.limits import Bodies, Limits
from dray.serve.metering import METRICS, PREFIX, Live, Meter
from dray.serve.observing import observe
from dray.serve.refusals import Refusal
from dray.serve.request_log import Logged
from dray.serve.routing import Full, Lost, Router
from dray.serve.schemas import Card
from dray.serve.served import Served
from dray.serve.shares import Plan, Versioned
from served_here import Address, served_here
from small_writer import save_small_writer
from waiting import wait_for

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def read(text: str) -> Samples:
    """Every sample by its name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((PREFIX + name, frozenset(labels.items())))


class Says:
    """A target that answers, refuses, breaks off, or waits until it is let go."""

    def __init__(self, *events: Event | Exception, free: asyncio.Event | None = None) -> None:
        self.events, self.free = events, free

    async def card(self) -> Card:
        return Card(
            id="x",
            created=0,
            routes=["predict", "completions"],
            fields=["text"],
            row_tokens=None,
            run=None,
            step=None,
        )

    async def write(self, kind: str, body: dict[str, Any]) -> Event:
        if self.free is not None:
            await self.free.wait()
        return {"choices": [], "usage": [7, 0], "prompts": [[7, 0]]}

    async def stream(self, kind: str, body: dict[str, Any]) -> AsyncIterator[Event]:
        for event in self.events:
            if isinstance(event, Exception):
                raise event
            yield event

    async def predict(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        for event in self.events:
            if isinstance(event, Exception):
                raise event
        found = {"prediction": "good", "scores": {"good": 1.0}}
        return [{**found, "size": [5, 1]} for _ in records]

    async def reference(self, version: int) -> list[dict[str, Any]]:
        return []


class InProcess:
    """A service without HTTP. Targets by version."""

    def __init__(self, targets: Mapping[int, Says], plan: Plan) -> None:
        model = Versioned("chat")
        model.follow(plan, targets)
        router = Router({"chat": model}, Limits())
        observer = observe(router, lambda: {"chat": model.agreement})
        api = make_api(router, OneKey(b""), Bodies(Limits()), observer)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://here")

    async def ask(self, path: str, **body: Any) -> httpx.Response:
        return await self.client.post(path, json={"model": "chat", **body})

    async def metrics(self) -> Samples:
        return read((await self.client.get("/metrics")).text)


def test_every_answer_is_counted_by_what_is_served_alone():
    async def work() -> tuple[list[int], str]:
        service = InProcess({3: Says(), 4: Says()}, Plan(3, shadow=4))
        records = [{"text": "a secret"}]
        asked = [
            await service.ask("/predict", records=records, model=name)
            for name in ("chat", "chat@4", "nobody", "chat@9")
        ]
        await service.client.get("/v1/models/some")
        await service.client.get("/made/up")
        return [one.status_code for one in asked], (await service.client.get("/metrics")).text

    statuses, text = asyncio.run(work())
    assert statuses == [200, 200, 404, 404]
    samples, about = read(text), {"model": "chat", "route": "/predict"}
    for version in ("3", "4"):
        told = {**about, "version": version}
        assert value(samples, "requests_total", **told, status="200") == 1
        assert value(samples, "seconds_count", **told) == 1
        assert value(samples, "first_byte_seconds_count", **told) == 1
        of = {"model": "chat", "version": version}
        assert value(samples, "tokens_total", **of, direction="in") == 5
    assert value(samples, "shadow_answers_total", model="chat", agreement="same") == 1
    assert value(samples, "refusals_total", code="model_not_found", status="404") == 3
    nothing = {"model": "", "version": "", "status": "404"}
    assert value(samples, "requests_total", route="other", **nothing) == 1
    assert value(samples, "requests_total", route="/v1/models/{model}", **nothing) == 1
    assert value(samples, "under_way") == 1  # the one for these metrics
    assert value(samples, "queue", model="chat") == 0
    assert value(samples, "ready", model="chat") == 1
    for word in ("nobody", "made", "secret", "some"):
        assert f'"{word}' not in text


PIECES = {"pieces": [[0, "a", None, None]]}
BEGIN = {"begin": 2, "prompts": [[2, 0]]}
USAGE = {"usage": [2, 1]}
LATE = {"refusal": Refusal(504, "late", code="too_slow").told()}


@pytest.mark.parametrize(
    ("events", "status", "first", "whole"),
    [
        ((BEGIN, PIECES, USAGE), "200", 1, 1),
        ((BEGIN, USAGE), "200", None, 1),
        ((Full(),), "429", None, None),
        ((BEGIN, PIECES, Lost()), "503", None, None),
        ((BEGIN, PIECES, LATE), "504", None, None),
    ],
)
def test_of_a_stream_the_first_token_is_measured_and_what_breaks_it_off(
    events: tuple[Event | Exception, ...], status: str, first: int | None, whole: int | None
):
    async def work() -> Samples:
        service = InProcess({1: Says(*events)}, Plan(1))
        await service.ask("/v1/completions", prompt="a", stream=True)
        return await service.metrics()

    samples = asyncio.run(work())
    about = {"model": "chat", "version": "1", "route": "/v1/completions"}
    assert value(samples, "requests_total", **about, status=status) == 1
    assert value(samples, "first_byte_seconds_count", **about) == first
    assert value(samples, "seconds_count", **about) == whole
    refused = [labels for name, labels in samples if name == f"{PREFIX}refusals_total"]
    assert len(refused) == (status != "200")


def test_who_is_with_a_replica_is_in_the_queue_and_a_model_without_one_is_not_ready():
    class Nobody(Says):
        async def card(self) -> Card:
            raise Lost

    async def work() -> tuple[Samples, Samples, Samples]:
        free = asyncio.Event()
        service = InProcess({1: Says(free=free)}, Plan(1))
        asking = [asyncio.create_task(service.ask("/v1/completions", prompt="a")) for _ in range(3)]
        while (during := await service.metrics()) and value(during, "queue", model="chat") != 3:
            await asyncio.sleep(0)
        asking[0].cancel()
        await asyncio.gather(asking[0], return_exceptions=True)
        free.set()
        await asyncio.gather(*asking[1:])
        lost = InProcess({1: Nobody()}, Plan(1))
        return during, await service.metrics(), await lost.metrics()

    during, after, lost = asyncio.run(work())
    assert value(during, "under_way") == 4
    assert value(during, "ready", model="chat") == 1
    assert value(after, "queue", model="chat") == 0
    assert value(after, "under_way") == 1
    about = {"model": "chat", "version": "1", "route": "/v1/completions"}
    assert value(after, "requests_total", **about, status="499") == 1
    assert value(after, "requests_total", **about, status="200") == 2
    assert value(after, "tokens_total", model="chat", version="1", direction="in") == 14
    assert value(lost, "ready", model="chat") == 0


def test_drift_is_told_once_there_is_enough_of_it():
    async def work() -> Samples:
        service = InProcess({1: Says()}, Plan(1))
        records = [{"text": "a"}] * 40  # 32 of which are looked at
        for _ in range(16 + 7):
            assert (await service.ask("/predict", records=records)).status_code == 200
            await asyncio.sleep(0)  # without HTTP nothing else gives way to others
        return await service.metrics()

    samples = asyncio.run(work())
    about = {"model": "chat", "version": "1", "reference": "first_requests"}
    for of in ("input_length", "unknown_tokens", "class", "top_score"):
        drift = value(samples, "drift", **about, of=of)
        assert drift is not None, of
        assert 0 <= drift < 0.1


def test_what_is_documented_is_what_is_exposed():
    """Of a meter that has counted one of everything."""
    from dray.serve.asked import Asked
    from dray.serve.drift import Drifted

    live = Live(
        queue=lambda: {"chat": 1},
        agreements=lambda: {"chat": {"same": 1}},
        drift=lambda: [Drifted("chat", 1, "class", 0.1, "held_out")],
        feedback=lambda: {("chat", "1", "right"): 1},
        log_lost=lambda: 0,
    )
    meter = Meter(live)
    one = Asked(model="chat", version=1, status=200, is_whole=True, tokens_in=1, tokens_out=1)
    one.note_first()
    for request in (one, Asked(refusal=Refusal(400, "no"))):
        meter.begin()
        meter.end(request, "/predict")
    labels: dict[str, set[str]] = {}
    for name, pairs in read(meter.text({"chat": True}).decode()):
        if name.endswith(("_bucket", "_sum")):
            continue
        name = name.removeprefix(PREFIX).removesuffix("_count")
        labels.setdefault(name, set()).update(key for key, _ in pairs)
    assert labels == {name: set(keys) for name, (keys, _) in METRICS.items()}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, storage: Path) -> Iterator[Address]:
    home = tmp_path_factory.mktemp("served")
    folder = save_small_writer(home / "writer")
    ring, logged = Ring(str(storage), poll_seconds=0.1), Logged(file=str(home / "log"))
    with served_here([Served(folder=str(folder))], ring=ring, logged=logged) as address:
        yield address
    ring.close()


def test_a_key_for_metrics_reads_them_and_nothing_else(service: Address, storage: Path):
    reads = create_key(str(storage), "prometheus", scopes=["metrics"])
    writes = create_key(str(storage), "team")

    def get(token: str, path: str) -> requests.Response:
        headers = {"Authorization": f"Bearer {token}"}
        return requests.get(service.url + path, headers=headers, timeout=60)

    wait_for(lambda: get(writes, "/v1/models").ok, "the keys", 30)
    found = get(reads, "/metrics")
    assert found.status_code == 200
    assert found.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert get(reads, "/v1/models").status_code == 403
    assert get(writes, "/metrics").status_code == 403
    assert requests.get(f"{service.url}/metrics", timeout=60).status_code == 401

    body = {"model": "writer", "prompt": "what is", "max_tokens": 5, "logit_bias": {"0": -100}}

    def write(stream: bool) -> None:
        headers = {"Authorization": f"Bearer {writes}"}
        asked = {**body, "stream": stream}
        found = requests.post(
            f"{service.url}/v1/completions", json=asked, headers=headers, timeout=60
        )
        assert found.status_code == 200

    threads = [threading.Thread(target=write, args=[bool(n % 2)]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    samples = read(get(reads, "/metrics").text)
    about = {"model": "writer", "version": "1"}
    route = {**about, "route": "/v1/completions"}
    assert value(samples, "requests_total", **route, status="200") == 4
    assert value(samples, "first_byte_seconds_count", **route) == 4
    assert value(samples, "tokens_total", **about, direction="out") == 20
    assert value(samples, "log_lost_total") == 0
