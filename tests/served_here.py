"""The routes of a service over real HTTP, with what stands before them, and models in this very
process: all but Ray."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import uvicorn

from dray.corpus.redacting import Redactor
from dray.serve.answering import Answerer
from dray.serve.api import make_api
from dray.serve.events import Event, joined
from dray.serve.guard import BodyGuard, BoundedProtocol
from dray.serve.held_keys import Ring
from dray.serve.keys import OneKey
from dray.serve.limits import Bodies, Limits
from dray.serve.loading import load_served
from dray.serve.observing import observe
from dray.serve.recalling import Recall
from dray.serve.request_log import Logged
from dray.serve.routing import Router
from dray.serve.schemas import Card
from dray.serve.served import Served
from dray.serve.shares import Plan, Versioned
from waiting import wait_for


class Here:
    """A target of the router's without replicas."""

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer

    async def card(self) -> Card:
        return Card.model_validate(self.answerer.card())

    async def write(self, kind: str, body: dict[str, Any]) -> Event:
        return joined([event async for event in self.answerer.write(kind, body)])

    async def stream(self, kind: str, body: dict[str, Any]) -> AsyncIterator[Event]:
        async for event in self.answerer.write(kind, body):
            yield event

    async def predict(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return self.answerer.predict(records)

    async def reference(self, version: int) -> list[dict[str, Any]]:
        return await asyncio.to_thread(self.answerer.reference)


class Address:
    recall: Recall | None = None
    """Where a test gave one."""

    def __init__(self, port: int, answerers: Mapping[str, Answerer], router: Router) -> None:
        self.port, self.answerers, self.router = port, answerers, router
        self.url = f"http://127.0.0.1:{port}"

    def follow(self, name: str, plan: Plan, answerers: Mapping[int, Answerer]) -> None:
        """Other versions of a model from now on."""
        versioned = cast(Versioned, self.router.targets[name])
        versioned.follow(plan, {version: Here(one) for version, one in answerers.items()})
        self.router.set_targets(self.router.targets)


@contextmanager
def served_here(
    models: Sequence[Served],
    limits: Limits | None = None,
    key: bytes = b"",
    ring: Ring | None = None,
    logged: Logged | None = None,
    recall: Recall | None = None,
    redactor: Redactor | None = None,
) -> Iterator[Address]:
    """A service for the time of the block."""
    limits = limits or Limits()
    loaded = [load_served(model) for model in models]
    answerers = {one.served.called: Answerer(one, limits, free_bytes=200_000_000) for one in loaded}
    models_by_name = {name: Versioned(name) for name in answerers}
    for name, model in models_by_name.items():
        model.follow(Plan(1), {1: Here(answerers[name])})
    router = Router(models_by_name, limits)
    observer = observe(
        router,
        lambda: {name: one.agreement for name, one in models_by_name.items()},
        logged,
        recall,
        redactor,
    )
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    config = uvicorn.Config(
        BodyGuard(make_api(router, OneKey(key, ring), Bodies(limits), observer), limits),
        http=BoundedProtocol,
        log_level="critical",
        lifespan="off",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: server.run([listener]), daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started, "the service", 60)
        yield Address(listener.getsockname()[1], answerers, router)
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        observer.close()
        for answerer in answerers.values():
            if answerer.engine is not None:
                answerer.engine.close()
