"""A head of a Ray cluster with a token and a server of jobs, as `ray start --head` makes it."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dray.cluster.nodes import answers
from ports import free_ports

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    address: str
    """Of the cluster."""
    jobs: str
    """Of its server of jobs."""
    token: Path


@contextmanager
def started_head(*, num_cpus: int = 4, seconds: float = 120) -> Iterator[Head]:
    """A head for the time of the block; it ends with all of its processes."""
    gcs, jobs, agent = free_ports(3)
    folder = Path(tempfile.mkdtemp(prefix="dh"))  # short: sockets lie below it
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_worker_niceness": "0",
    }
    words = [
        *(str(BIN / "ray"), "start", "--head", "--block", f"--port={gcs}"),
        *(f"--dashboard-port={jobs}", f"--dashboard-agent-listen-port={agent}"),
        *("--dashboard-host=127.0.0.1", f"--num-cpus={num_cpus}", "--disable-usage-stats"),
        f"--temp-dir={folder}/r",
    ]
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, env=environment)
    try:
        deadline = time.monotonic() + seconds
        while not all(answers("127.0.0.1", port) for port in (gcs, jobs, agent)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the head did not start: {(folder / 'out').read_text()}")
            time.sleep(0.2)
        yield Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{jobs}", token)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        shutil.rmtree(folder, ignore_errors=True)
