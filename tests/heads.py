"""A head of a Ray cluster with a token and a server of jobs, as `ray start --head` makes it, and
commands of dray's that use it."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
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
    folder: Path
    """Ray's own files lie in `r` below it."""


def environment(token: Path | None, **variables: str) -> dict[str, str]:
    """Of somebody who has that token, or none."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
    # A home without a token, where nothing is written.
    own = {"RAY_AUTH_TOKEN_PATH": str(token)} if token else {"HOME": "/proc"}
    return kept | own | variables


def dray(
    home: Path, token: Path | None, *words: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A command of dray's in a folder, run to its end by somebody who has that token, or none."""
    return subprocess.run(
        [sys.executable, "-m", "dray.cli", *words],
        cwd=home,
        env=environment(token, **variables),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@contextmanager
def started_head(
    *,
    num_cpus: int = 4,
    seconds: float = 120,
    is_open: bool = False,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Head]:
    """A head for the time of the block; it ends with all of its processes. `is_open`: one that asks
    for no token and listens on all addresses."""
    gcs, jobs, agent = free_ports(3)
    folder = Path(tempfile.mkdtemp(prefix="dh"))  # short: sockets lie below it
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    guarded = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    own = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        **({"RAY_AUTH_MODE": "disabled"} if is_open else guarded),
        "RAY_worker_niceness": "0",
        **(variables or {}),
    }
    words = [
        *(str(BIN / "ray"), "start", "--head", "--block", f"--port={gcs}"),
        *(f"--dashboard-port={jobs}", f"--dashboard-agent-listen-port={agent}"),
        f"--dashboard-host={'0.0.0.0' if is_open else '127.0.0.1'}",
        *(f"--num-cpus={num_cpus}", "--disable-usage-stats"),
        f"--temp-dir={folder}/r",
    ]
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, env=own)
    try:
        deadline = time.monotonic() + seconds
        while not all(answers("127.0.0.1", port) for port in (gcs, jobs, agent)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the head did not start: {(folder / 'out').read_text()}")
            time.sleep(0.2)
        yield Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{jobs}", token, folder)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        shutil.rmtree(folder, ignore_errors=True)
