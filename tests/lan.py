"""Machines on this one: network namespaces with addresses of their own on one switch.

Each has a folder for Ray that no other one sees. They share the rest of this machine's disk, but
for what is hidden from one of them. As root, with Debian's iproute2.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from heads import BIN
from waiting import kill_all

JOBS_PORT, GCS_PORT, S3_PORT = 8265, 6379, 5555


def why_none() -> str:
    """Why there can be no such machines here; empty: there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [
        tool for tool in ("ip", "tc", "unshare", "nsenter", "mount") if shutil.which(tool) is None
    ]
    if missing:
        return f"{', '.join(missing)} not installed (Debian's iproute2)"
    made = subprocess.run(["ip", "netns", "add", "draytry"], capture_output=True, check=False)
    if made.returncode != 0:
        return "network namespaces cannot be made here"
    subprocess.run(["ip", "netns", "del", "draytry"], check=False)
    return ""


needs_lan = pytest.mark.skipif(bool(why_none()), reason=why_none() or "never")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass
class Machine:
    """A network namespace; what runs in it reaches the others through the switch alone."""

    name: str
    address: str
    folder: Path
    environment: dict[str, str]
    keeper: psutil.Popen
    """Keeps its namespaces."""
    processes: list[psutil.Popen] = field(default_factory=list)

    def words(self, *words: str) -> list[str]:
        # A process that enters a mount namespace stands in its root.
        there = ["--target", str(self.keeper.pid), "--mount", "--net", f"--wdns={self.folder}"]
        return ["nsenter", *there, *words]

    def hide(self, path: Path) -> None:
        """Let it see an empty folder in the place of this one."""
        subprocess.run(self.words("mount", "-t", "tmpfs", "none", str(path)), check=True)

    def unhide(self, path: Path) -> None:
        subprocess.run(self.words("umount", "--lazy", str(path)), check=True)

    def start(self, *words: str, log: str, **environment: str) -> psutil.Popen:
        with (self.folder / f"{self.name}-{log}").open("ab") as out:
            process = psutil.Popen(
                self.words(*words),
                stdout=out,
                stderr=out,
                env={**self.environment, **environment},
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def run(
        self, *words: str, seconds: float = 400, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.words(*words),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            env={**self.environment, **environment},
        )

    def dray(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "dray.cli", *words, **environment)

    def start_ray(
        self, head: str = "", *more: str, num_cpus: float = 2, **environment: str
    ) -> psutil.Popen:
        """A node, with more words for `ray start`; without a `head` it is one, with a server of
        jobs."""
        role = (
            ["--address", f"{head}:{GCS_PORT}"]
            if head
            else ["--head", "--port", str(GCS_PORT), "--dashboard-host", "127.0.0.1"]
        )
        return self.start(
            *(str(BIN / "ray"), "start", "--block", *role, "--node-ip-address", self.address),
            *("--num-cpus", f"{num_cpus:g}", "--disable-usage-stats"),
            *(() if head else ("--temp-dir", f"{self.folder}/r")),
            *more,
            log="ray",
            **environment,
        )

    def log(self, name: str = "ray") -> str:
        return (self.folder / f"{self.name}-{name}").read_text(errors="replace")

    def kill(self) -> None:
        """End all that runs on it at once, as when it loses its power."""
        for process in self.processes:
            kill_all(process)
            process.wait()
        self.processes.clear()

    @property
    def _port(self) -> list[str]:
        return ["-n", f"{self.name[:-1]}x", "link", "set", f"p{self.name[-1]}"]

    def cut(self) -> None:
        """Take its cable out of the switch: nobody on either side is told."""
        ip(*self._port, "down")

    def heal(self) -> None:
        ip(*self._port, "up")

    def slow(self, rate: str) -> None:
        """Narrow its link to such a rate, in tc's words, where what waits is late by as much as
        200 ms; none: as it was. (netem, which also delays and loses, is not in every kernel.)"""
        rule = ["replace", "dev", "e0", "root", "tbf", "rate", rate, "burst", "32kb"]
        end = ["del", "dev", "e0", "root"]
        words = [*rule, "latency", "200ms"] if rate else end
        subprocess.run(["tc", "-n", self.name, "qdisc", *words], check=True)


@contextmanager
def _machine(
    name: str, address: str, folder: Path, environment: dict[str, str]
) -> Iterator[Machine]:
    ip("netns", "add", name)
    words = ["ip", "netns", "exec", name, "unshare", "--mount", "sleep", "infinity"]
    keeper = psutil.Popen(words)
    machine = Machine(name, address, folder, dict(environment), keeper)
    try:
        deadline = time.monotonic() + 10
        while keeper.name() != "sleep":
            assert time.monotonic() < deadline, "no namespace"
            time.sleep(0.02)
        machine.hide(folder / "r")
        yield machine
    finally:
        machine.kill()
        # What has left its parents, as `ray start` does without --block.
        left = subprocess.run(["ip", "netns", "pids", name], capture_output=True, check=False)
        for pid in left.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        keeper.wait()
        ip("netns", "del", name)


@dataclass(frozen=True)
class Lan:
    machines: list[Machine]
    storage: str
    """On an S3 server that all of them reach, for the environment of each."""


def _environment(token: Path) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
    return {
        **kept,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_worker_niceness": "0",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test-secret-test-secret",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def lan(count: int, network: int = 83) -> Iterator[Lan]:
    """So many machines for the time of the block: a, b, …, at 10.`network`.0.1, 2, …"""
    folder = Path(tempfile.mkdtemp(prefix="dl"))  # short: sockets lie below it
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    prefix = f"dr{network}"
    (folder / "r").mkdir()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        environment = _environment(token)
        switch = stack.enter_context(
            _machine(f"{prefix}x", f"10.{network}.0.254", folder, environment)
        )
        ip("-n", switch.name, "link", "add", "br0", "type", "bridge")
        ip("-n", switch.name, "addr", "add", f"{switch.address}/24", "dev", "br0")
        for device in ("br0", "lo"):
            ip("-n", switch.name, "link", "set", device, "up")
        machines = []
        for number in range(count):
            letter = chr(ord("a") + number)
            address = f"10.{network}.0.{number + 1}"
            machine = stack.enter_context(
                _machine(f"{prefix}{letter}", address, folder, environment)
            )
            cable = ["type", "veth", "peer", "name", f"p{letter}", "netns", switch.name]
            ip("-n", machine.name, "link", "add", "e0", *cable)
            ip("-n", switch.name, "link", "set", f"p{letter}", "master", "br0", "up")
            ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", "e0")
            for device in ("e0", "lo"):
                ip("-n", machine.name, "link", "set", device, "up")
            machines.append(machine)
        switch.start(
            *(sys.executable, "-m", "moto.server", "-H", switch.address, "-p", str(S3_PORT)),
            log="s3",
        )
        endpoint = f"{switch.address}:{S3_PORT}"
        query = f"endpoint_override={endpoint}&scheme=http&region=us-east-1"
        storage = f"s3://bucket/runs?{query}"
        make = (
            "import sys; from dray.storage.filesystem import open_filesystem as o\n"
            "o(sys.argv[1] + '&allow_bucket_creation=true')[0].create_dir('bucket')"
        )
        deadline = time.monotonic() + 60
        while (made := machines[0].run(sys.executable, "-c", make, storage)).returncode:
            assert time.monotonic() < deadline, made.stderr
            time.sleep(0.5)
        yield Lan(machines, storage)


def wait_for_nodes(head: Machine, count: int, seconds: float = 90) -> None:
    """Until so many nodes of the cluster are alive, no more and no fewer."""
    code = (
        "import sys, ray; from ray._raylet import GcsClient\n"
        "nodes = GcsClient(address=sys.argv[1]).get_all_node_info().values()\n"
        "print(sum(node.state == 0 for node in nodes))"
    )
    deadline = time.monotonic() + seconds
    while True:
        done = head.run(sys.executable, "-c", code, f"{head.address}:{GCS_PORT}", seconds=60)
        if done.stdout.strip() == str(count):
            return
        assert time.monotonic() < deadline, (count, done.stdout, done.stderr[-2000:], head.log())
        time.sleep(0.5)
