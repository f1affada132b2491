"""Runs that real faults befall, and what is measured of each: the same for every fault.

A run is either `dray.train.train` in this process, on the Ray of all tests, or a `dray train`
process of its own, which a test may kill together with everything that belongs to it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from dray.cluster.local_ray import OPEN_CLUSTER
from dray.cluster.nodes import answers
from dray.ledger import verify_ledger
from dray.runs import Run, verify_checkpoint
from dray.runs.evidence import load_failures
from dray.spec import make_spec
from dray.train.driver import train
from ports import free_ports
from tiny import tiny_tree
from waiting import kill_all, rank_processes, wait_for

STEPS, EVERY = 24, 6
SAVE_STEPS = 6
"""Steps that may be done while a checkpoint is still being written."""
INJECTED = Path(__file__).parent / "injected"


def make_case(corpus: Path, **sections: Any) -> dict[str, Any]:
    """A few steps a second, so that a fault can fall into one."""
    return tiny_tree(
        corpus,
        **{
            "duration": {"steps": STEPS},
            "batch": {"global_rows": 48, "micro_rows": 6},
            "checkpoint": {"every_steps": EVERY, "keep_last": 4},
            "watchdog": {
                "silent_seconds": 6,
                "long_silence_seconds": 40,  # steps are so short that a last beat may be of a save
                "stuck_seconds": 8,
                "stuck_steps": 4,
            },
            **sections,
        },
    )


def kill(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)


def steps_of(storage: str, name: str) -> int:
    """The newest step in a run's metrics."""
    run = Run.find(storage, name)
    rows = run.metrics() if run else []
    return int(rows[-1]["step"]) if rows else 0


def ask_own_ray() -> None:
    """A head that this process started made itself the one whose memory it asks, and asking a dead
    one ends the process after a minute: ask the Ray of all tests again."""
    import ray
    from ray.experimental import internal_kv

    if ray.is_initialized():
        internal_kv._initialize_internal_kv(ray._private.worker.global_worker.gcs_client)


class Nodes:
    """A local Ray of several nodes, each with processes of its own: a head for the readers, and
    nodes for a rank each.

    This process is not connected to it.
    """

    RANK_CPUS = 1.5
    """A rank fits on a node of two CPUs, and neither another one nor a reader fits beside it."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster()
        self.nodes: list[Any] = []

    def start(self, *, with_jobs: bool = False) -> None:
        """`with_jobs`: with the server that takes jobs, at `jobs`, and the agent that starts
        them."""
        (port,) = free_ports(1)
        self.cluster.add_node(
            num_cpus=1,
            include_dashboard=with_jobs,
            dashboard_port=0,
            dashboard_agent_listen_port=port,  # the usual one may be another Ray's
        )
        if with_jobs:
            wait_for(lambda: answers("127.0.0.1", port), "the agent of the head")

    @property
    def jobs(self) -> str:
        return f"http://{self.cluster.webui_url}"

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, count: int = 1) -> None:
        self.nodes += [self.cluster.add_node(num_cpus=2) for _ in range(count)]

    def count(self) -> int:
        """How many nodes have joined, the head among them."""
        from ray._raylet import GcsClient

        return len(GcsClient(address=self.address).get_all_node_info())

    def remove(self) -> str:
        """Kill all processes of the oldest node (SIGKILL), as when it loses its power; returns its
        id."""
        node = self.nodes.pop(0)
        self.cluster.remove_node(node, allow_graceful=False)
        return str(node.node_id)

    def remove_head(self) -> None:
        """Kill all processes of the head (SIGKILL), the cluster's memory among them."""
        self.cluster.remove_node(self.cluster.head_node, allow_graceful=False)

    def drain(self, seconds: float) -> None:
        """Give notice, as a cloud does, that the oldest node will be taken away after so many
        seconds."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        accepted, reason = GcsClient(address=self.address).drain_node(
            self.nodes[0].node_id,
            DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "",
            int((time.time() + seconds) * 1000),
        )
        assert accepted, reason

    def shut_down(self) -> None:
        while self.nodes:
            self.remove()
        if self.cluster.head_node is not None:
            self.remove_head()
        ask_own_ray()


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["kind"] == kind]


def nodes_lost(run: Run) -> list[str]:
    """The nodes that the documents of its failures say were lost."""
    return [node for failure in load_failures(run) for node in failure["nodes_lost"]]


def random_rank() -> psutil.Process:
    return random.choice(rank_processes())


@contextmanager
def befalling(
    storage: str, name: str, faults: Mapping[int, Callable[[], object]]
) -> Iterator[None]:
    """While the block trains a run, each fault happens once its step is in the run's metrics."""

    def befall() -> None:
        for step, fault in faults.items():
            wait_for(lambda step=step: steps_of(storage, name) >= step, f"step {step}", 300)
            fault()
            time.sleep(2)

    thread = threading.Thread(target=befall, daemon=True)
    thread.start()
    yield
    thread.join(timeout=10)
    assert not thread.is_alive(), "a fault never happened"


def disturbed(
    storage: str,
    corpus: Path,
    name: str,
    faults: Mapping[int, Callable[[], object]],
    **sections: Any,
) -> Run:
    """A run, trained here to its end, that the faults befall."""
    with befalling(storage, name, faults):
        return train(make_spec(make_case(corpus, **sections)), storage=storage, run_name=name).run


def causes(run: Run) -> list[str]:
    """The causes in the record, one a failed attempt."""
    return [event["cause"] for event in events(run, "attempt_failed")]


def copy_storage(storage: str, to: Path, *runs: str) -> str:
    """A storage of its own with the same corpus, and with some of the runs."""
    for name in ("corpora", *runs):
        shutil.copytree(Path(storage, name), to / name)
    return str(to)


def fill(disk: Path, *, left: int) -> Path:
    """Write a file that leaves so many bytes free on the disk, whatever else is being written
    there."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(2**16))
    os.truncate(ballast, ballast.stat().st_size - left)
    return ballast


@contextmanager
def slowed(process: psutil.Process, share: float) -> Iterator[None]:
    """While the block runs, the process gets that share of the time, a fiftieth of a second at
    once."""
    ended = threading.Event()

    def brake() -> None:
        with suppress(psutil.NoSuchProcess):
            while not ended.is_set():
                process.send_signal(signal.SIGSTOP)
                time.sleep(0.02 * (1 - share))
                process.send_signal(signal.SIGCONT)
                time.sleep(0.02 * share)

    thread = threading.Thread(target=brake, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10)


class Training:
    """A `dray train` process of its own, in a session of its own."""

    def __init__(
        self,
        case: Mapping[str, Any],
        storage: str,
        name: str,
        folder: Path,
        *,
        address: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.storage, self.name = storage, name
        spec, self.log = folder / f"{name}.yaml", folder / f"{name}.log"
        spec.write_text(yaml.safe_dump(dict(case)))
        command = [
            sys.executable,
            "-m",
            "dray.cli",
            "train",
            str(spec),
            "--storage",
            storage,
            "--run",
            name,
        ]
        # The clusters of these tests ask for no token, and not all are on loopback.
        named = {OPEN_CLUSTER: address.rpartition(":")[0]} if address else {}
        with self.log.open("ab") as log:
            self.process = psutil.Popen(
                [*command, *(("--address", address) if address else ())],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **named, **(environment or {})},
                start_new_session=True,
            )

    @property
    def run(self) -> Run:
        return Run.open(self.storage, self.name)

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def ranks(self) -> list[psutil.Process]:
        """The ranks of the local Ray that this process started; those of a cluster are not its
        children."""
        return rank_processes(self.process)

    def wait_for_step(self, step: int, seconds: float = 300) -> None:
        def reached() -> bool:
            if self.process.poll() is not None and steps_of(self.storage, self.name) < step:
                raise AssertionError(
                    f"ended with {self.process.returncode} before step "
                    f"{step}:\n{self.output[-3000:]}"
                )
            return steps_of(self.storage, self.name) >= step

        wait_for(reached, f"step {step}", seconds)

    def finish(self, seconds: float = 400) -> int:
        """Wait for its end; returns the exit code."""
        return int(self.process.wait(timeout=seconds))

    def kill_all(self) -> None:
        """SIGKILL to the process and all that descends from it, as when a machine loses its
        power."""
        psutil.wait_procs(kill_all(self.process), timeout=20)


@dataclass(frozen=True)
class Measured:
    """What a fault cost."""

    causes: list[str]
    steps_redone: int
    seconds: float | None
    """From the last step before a failure to the next new one, the longest; None if no driver lived
    through it."""
    weights: str
    repeated: int
    skipped: int


def measure(run: Run, undisturbed: Run, *, exact: bool = True, interval: int = EVERY) -> Measured:
    """Assert that nothing was lost, and return what it took.

    One metrics row a step; the rows of the undisturbed run, step by step; no row repeated or
    skipped; at most one interval (and the steps done while the save before was still being written)
    redone a failure; the final weights and optimiser states equal bit for bit, or, where the number
    of ranks changed, all losses within 1e-5.
    """
    rows, expected = run.metrics(), undisturbed.metrics()
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    assert [row["rows_digest"] for row in rows] == [row["rows_digest"] for row in expected]
    ledger = verify_ledger(run)
    assert ledger.ok, ledger.problems
    assert (ledger.repeated, ledger.skipped) == (0, 0)
    ours, theirs = (verify_checkpoint(each, each.checkpoints()[-1]) for each in (run, undisturbed))
    assert (ours.ok, ours.step) == (True, theirs.step)
    if exact:
        assert (ours.weights_sha256, ours.optimizer_sha256) == (
            theirs.weights_sha256,
            theirs.optimizer_sha256,
        )
        weights = "equal bit for bit"
    else:
        greatest = max(abs(a["loss"] - b["loss"]) for a, b in zip(rows, expected, strict=True))
        assert greatest < 1e-5
        weights = f"losses within {greatest:.0e}"
    causes, seconds = (
        [],
        [event["seconds"] for event in run.events() if event["kind"] == "recovered"],
    )
    for event in run.events():
        if event["kind"] in ("attempt_failed", "failed"):
            causes.append(event["cause"])
        if event["kind"] == "attempt_failed":
            after = next(a for a in run.attempts() if a.number > event["attempt"])
            lost = event["step"] - after.start_step
            assert lost <= interval + 1 + SAVE_STEPS
    return Measured(
        causes,
        ledger.redone_steps,
        max(seconds, default=None),
        weights,
        ledger.repeated,
        ledger.skipped,
    )
