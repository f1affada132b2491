"""10,000 connections at once that say half a request: a bounded number is held, for a bounded time,
and the service answers afterwards as before."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from dray.serve.guard import HEADER_SECONDS, MAX_CONNECTIONS
from dray_serving import Serving, dray_serving
from small_writer import save_small_writer
from waiting import processes_named, wait_for

NEEDS_RAY = "local_ray"  # starts one of its own: tests/conftest.py deals by this word
NUM_CONNECTIONS = 10_000

pytestmark = pytest.mark.slow


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Serving]:
    folder = save_small_writer(tmp_path / "writer")
    with dray_serving(tmp_path, "--name", f"chat={folder}") as serving:
        yield serving


async def flood(port: int, during: list[float], proxy: psutil.Process) -> tuple[int, int]:
    """How many of the connections the service has closed: at once, and in the end. `during` gets
    the memory of its proxy meanwhile."""
    closed = 0

    async def hold(turn: asyncio.Semaphore, over: asyncio.Event) -> None:
        nonlocal closed
        try:
            async with turn:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-Half: ")
            ended = asyncio.create_task(reader.read())
            waiting = asyncio.create_task(over.wait())
            await asyncio.wait({ended, waiting}, return_when=asyncio.FIRST_COMPLETED)
            closed += ended.done()
            for task in (ended, waiting):
                task.cancel()
            writer.close()
        except OSError:
            closed += 1

    turn, over = asyncio.Semaphore(200), asyncio.Event()
    some = [asyncio.create_task(hold(turn, over)) for _ in range(NUM_CONNECTIONS)]
    deadline = time.monotonic() + 120
    while closed < NUM_CONNECTIONS - MAX_CONNECTIONS and time.monotonic() < deadline:
        during.append(proxy.memory_info().rss)
        await asyncio.sleep(0.2)
    at_once = closed
    deadline = time.monotonic() + 4 * HEADER_SECONDS
    while closed < NUM_CONNECTIONS and time.monotonic() < deadline:
        during.append(proxy.memory_info().rss)
        await asyncio.sleep(0.2)
    over.set()
    await asyncio.gather(*some)
    return at_once, closed


def test_ten_thousand_connections_are_bounded_in_number_and_time(service: Serving) -> None:
    def complete() -> requests.Response:
        body = {"model": "chat", "prompt": "what is", "max_tokens": 4, "seed": 1}
        return requests.post(f"{service.url}/v1/completions", json=body, timeout=60)

    before = complete().json()["choices"]
    (proxy,) = processes_named("ProxyActor", service.process)
    memory = [proxy.memory_info().rss]
    port = int(service.url.rpartition(":")[2])
    at_once, in_the_end = asyncio.run(flood(port, memory, proxy))
    assert at_once >= NUM_CONNECTIONS - MAX_CONNECTIONS
    assert in_the_end == NUM_CONNECTIONS
    assert max(memory) - memory[0] < 300_000_000
    wait_for(lambda: requests.get(f"{service.url}/health", timeout=60).ok, "a connection", 60)
    assert complete().json()["choices"] == before
