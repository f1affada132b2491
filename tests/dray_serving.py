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
    certificate: Path | None = None
    """By which it is known, where it speaks HTTPS."""


@contextmanager
def dray_serving(
    home: Path, *words: str, tls: tuple[Path, Path] | None = None
) -> Iterator[Serving]:
    """One that is ready, for the time of the block, with its storage in `home`/runs. `tls`: a
    certificate and its key, for HTTPS."""
    (port,) = free_ports(1)
    environment = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
    places = ["--port", str(port), "--storage", str(home / "runs")]
    if tls is not None:
        places += ["--tls-cert", str(tls[0]), "--tls-key", str(tls[1])]
    with (home / "out").open("wb") as out:
        process = psutil.Popen(
            [sys.executable, "-m", "dray.cli", "serve", *words, *places],
            env=environment,
            stdout=out,
            stderr=out,
        )
    url = f"{'http' if tls is None else 'https'}://127.0.0.1:{port}"
    verify = True if tls is None else str(tls[0])

    def is_there() -> bool:
        assert process.poll() is None, (home / "out").read_text()
        try:
            return requests.get(f"{url}/ready", timeout=10, verify=verify).json() == {
                "status": "ready"
            }
        except (requests.RequestException, ValueError):
            return False

    try:
        wait_for(is_there, "the service", 400, (home / "out").read_text)
        yield Serving(process, url, None if tls is None else tls[0])
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(120)
