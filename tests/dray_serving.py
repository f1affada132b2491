"""A `dray serve` of its own process, from its start to its end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from ports import free_ports
from waiting import wait_for


@dataclass
class Serving:
    process: psutil.Popen
    url: str


@contextmanager
def dray_serving(home: Path, *words: str) -> Iterator[Serving]:
    """One that is ready, for the time of the block, with its storage in `home`/runs."""
    (port,) = free_ports(1)
    environment = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
    places = ["--port", str(port), "--storage", str(home / "runs")]
    with (home / "out").open("wb") as out:
        process = psutil.Popen(
            [sys.executable, "-m", "dray.cli", "serve", *words, *places],
            env=environment,
            stdout=out,
            stderr=out,
        )
    url = f"http://127.0.0.1:{port}"

    def is_there() -> bool:
        assert process.poll() is None, (home / "out").read_text()
        try:
            return requests.get(f"{url}/ready", timeout=10).json() == {"status": "ready"}
        except (requests.RequestException, ValueError):
            return False

    try:
        wait_for(is_there, "the service", 400, (home / "out").read_text)
        yield Serving(process, url)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(120)
