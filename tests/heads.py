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
from pathlib import Path

import psutil

from dray.cluster.nodes import answers
from ports import free_ports
from waiting import kill_all

BIN = Path(sys.executable).parent


class Head:
    """A head with a server of jobs, in a folder of its own."""

    def __init__(
        self, folder: Path, num_cpus: int, variables: Mapping[str, str], *, is_open: bool
    ) -> None:
        self.folder = folder
        """Ray's own files lie in `r` below it."""
        self._process: psutil.Popen | None = None
        gcs, jobs, agent = self._ports = free_ports(3)
        self.address = f"127.0.0.1:{gcs}"
        """Of the cluster."""
        self.jobs = f"http://127.0.0.1:{jobs}"
        """Of its server of jobs."""
        self.token = folder / "token"
        self.token.touch(0o600)
        self.token.write_text(secrets.token_hex(32))
        guarded = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        self._environment = {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            **({"RAY_AUTH_MODE": "disabled"} if is_open else guarded),
            "RAY_worker_niceness": "0",
            **variables,
        }
        self._words = [
            *(str(BIN / "ray"), "start", "--head", "--block", f"--port={gcs}"),
            *(f"--dashboard-port={jobs}", f"--dashboard-agent-listen-port={agent}"),
            f"--dashboard-host={'0.0.0.0' if is_open else '127.0.0.1'}",
            *(f"--num-cpus={num_cpus}", "--disable-usage-stats"),
            f"--temp-dir={folder}/r",
        ]

    @property
    def process(self) -> psutil.Popen:
        assert self._process is not None, "it was started"
        return self._process

    def start(self, seconds: float = 120) -> None:
        """Start it, or start it again at the same address, and wait until it answers."""
        out = self.folder / "out"
        with out.open("wb") as stream:
            self._process = psutil.Popen(
                self._words, stdout=stream, stderr=stream, env=self._environment
            )
        deadline = time.monotonic() + seconds
        while not all(answers("127.0.0.1", port) for port in self._ports):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the head did not start: {out.read_text()}")
            time.sleep(0.2)

    def kill(self) -> None:
        """End all of its processes at once, as when its machine loses its power."""
        kill_all(self.process)
        self.process.wait()

    def end(self) -> None:
        if self._process is None:
            return
        self.process.terminate()
        with suppress(psutil.TimeoutExpired):
            self.process.wait(30)
        self.kill()


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
    disk: Path | None = None,
    is_open: bool = False,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Head]:
    """A head for the time of the block, its files on a disk; it ends with all of its processes.
    `is_open`: one that asks for no token and listens on all addresses."""
    folder = Path(tempfile.mkdtemp(prefix="dh", dir=disk))  # short: sockets lie below it
    head = Head(folder, num_cpus, variables or {}, is_open=is_open)
    try:
        head.start()
        yield head
    finally:
        head.end()
        shutil.rmtree(folder, ignore_errors=True)
