"""Goodput under a random fault every 20 to 60 seconds, beside the stock arm: `python -m bench.soak`
(`make soak`).

Both arms train one small Llama with 2 workers on a Ray cluster of a head without CPUs and two
nodes, each of which has room for both workers and a reader. They checkpoint every 10 steps, and
meet the same schedule of faults: a worker killed, a worker stopped, a worker's node gone without a
word, or after a notice of 15 seconds, a full storage. The stock arm is ../shared/stock/train.py
with --max-failures 100. Time counts from an arm's first step. Goodput is steps committed at the end
× the step time of a run without faults ÷ seconds.

A node that went is replaced after REPLACE_SECONDS. What an arm does not survive by itself is done
by hand and counted: a stopped worker is killed after OPERATOR_SECONDS, a command that ended is
typed again. --keep says where the arms' logs and dray's run, without its checkpoints, are copied
to.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from bench.recovery import (
    EVERY,
    SPEC,
    Steps,
    make_stock_flags,
    rank_processes,
    read_dray_steps,
    read_stock_steps,
)
from bench.report import write_section
from bench.training import ROOT, STOCK
from dray.cluster.local_ray import OPEN_CLUSTER
from dray.runs import Run

STEPS, MICRO_ROWS, WORKERS = 1_000_000, 16, 2
CONTROL_SECONDS = 90
NOTICE_SECONDS, REPLACE_SECONDS, FULL_SECONDS, OPERATOR_SECONDS = 15, 5, 8, 120
STORAGE_BYTES = 4 * 2**30
# The stock script starts a Ray of its own: here it takes the cluster that RAY_ADDRESS names.
RUN_STOCK = """
import runpy, sys, ray
start = ray.init
ray.init = lambda num_cpus, **options: start(**options)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens, and when, in seconds after an arm's first step. `choice` chooses among workers
    or nodes."""

    at: float
    kind: str
    choice: int


def make_schedule(seconds: float, kinds: list[str], seed: int) -> list[Fault]:
    """A fault every 20 to 60 seconds; none in the last minute, so that each arm can show how it
    recovers."""
    draw, at, faults = random.Random(seed), 0.0, []
    while (at := at + draw.uniform(20, 60)) < seconds - 60:
        faults.append(Fault(at, draw.choice(kinds), draw.randrange(100)))
    return faults


class Arm:
    """One arm: its cluster, its command, and the faults that befall it."""

    def __init__(
        self,
        name: str,
        folder: Path,
        command: Callable[[], list[str]],
        read_steps: Callable[[], Steps],
    ) -> None:
        from ray.cluster_utils import Cluster

        self.name, self.folder, self.command, self.read_steps = name, folder, command, read_steps
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.nodes = [self.add_node() for _ in range(WORKERS)]
        self.by_hand: list[str] = []
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.process = self.start()

    def add_node(self) -> Any:
        return self.cluster.add_node(num_cpus=WORKERS + 1)

    def start(self) -> subprocess.Popen[bytes]:
        with (self.folder / f"{self.name}.log").open("ab") as log:
            return subprocess.Popen(
                self.command(),
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "RAY_ADDRESS": self.cluster.address,
                    OPEN_CLUSTER: self.cluster.address.rpartition(":")[0],
                    "OMP_NUM_THREADS": "1",
                },
            )

    def follow(self, seconds: float, faults: list[Fault]) -> tuple[Steps, float]:
        """Let the faults happen. Returns the steps done, and when the first one was."""
        first, deadline, waiting = 0.0, time.time() + 300, list(faults)
        while time.time() < deadline:
            if not first:
                steps = self.read_steps()
                if steps:
                    first, deadline = steps[0][1], steps[0][1] + seconds
            elif waiting and time.time() >= first + waiting[0].at:
                self.befall(waiting.pop(0))
            due = [item for item in self.later if item[0] <= time.time()]
            for item in due:
                self.later.remove(item)
                item[1]()
            if self.process.poll() is not None:
                self.by_hand.append(f"command ended with {self.process.returncode}, typed again")
                self.process = self.start()
            time.sleep(0.2)
        if not first:
            said = (self.folder / f"{self.name}.log").read_text(errors="replace")
            raise SystemExit(f"{self.name} did no step:\n{said[-3000:]}")
        return [(step, at) for step, at in self.read_steps() if at <= deadline], first

    def befall(self, fault: Fault) -> None:
        print(
            f"{self.name} at {fault.at:.0f} s, {len(self.read_steps())} steps: {fault.kind}",
            file=sys.stderr,
            flush=True,
        )
        ranks = rank_processes(os.getpid())
        if fault.kind in ("kill", "hang") and ranks:
            rank = ranks[fault.choice % len(ranks)]
            rank.send_signal(signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
            if fault.kind == "hang":
                self.do_later(OPERATOR_SECONDS, lambda: self.end_stopped(rank))
        elif fault.kind == "node":
            self.remove(self.choose_node(ranks, fault.choice))
        elif fault.kind == "preemption":
            node = self.choose_node(ranks, fault.choice)
            self.give_notice(node)
            self.do_later(NOTICE_SECONDS, lambda: self.remove(node))
        elif fault.kind == "storage":
            filler = self.folder / "storage" / "filler"
            free = os.statvfs(filler.parent)
            with filler.open("wb") as file, contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)
            self.do_later(FULL_SECONDS, filler.unlink)

    def choose_node(self, ranks: list[psutil.Process], choice: int) -> Any:
        """The node of one of the workers; any of them while there are none."""
        above = {parent.pid for parent in ranks[choice % len(ranks)].parents()} if ranks else set()
        there = [
            node
            for node in self.nodes
            if {
                entry.process.pid
                for processes in node.all_processes.values()
                for entry in processes
            }
            & above
        ]
        return (there or self.nodes)[choice % len(there or self.nodes)]

    def do_later(self, seconds: float, work: Callable[[], None]) -> None:
        self.later.append((time.time() + seconds, work))

    def end_stopped(self, process: psutil.Process) -> None:
        if process.is_running() and process.status() == psutil.STATUS_STOPPED:
            self.by_hand.append("stopped worker killed")
            process.kill()

    def remove(self, node: Any) -> None:
        if node in self.nodes:
            self.nodes.remove(node)
            self.cluster.remove_node(node, allow_graceful=False)
            self.do_later(REPLACE_SECONDS, lambda: self.nodes.append(self.add_node()))

    def give_notice(self, node: Any) -> None:
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        deadline = int((time.time() + NOTICE_SECONDS) * 1000)
        GcsClient(self.cluster.address).drain_node(
            node.node_id, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "soak", deadline
        )

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.cluster.shutdown()


@contextlib.contextmanager
def full_able_storage(folder: Path) -> Iterator[bool]:
    """`folder/storage` on a small file system of its own, which a fault may fill; False where none
    can be mounted."""
    place = folder / "storage"
    place.mkdir()
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={STORAGE_BYTES}", "tmpfs", str(place)],
            check=False,
            capture_output=True,
        ).returncode
        == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(place)], check=False)


def dray_command(folder: Path, name: str) -> list[str]:
    return [
        f"{sys.prefix}/bin/dray",
        "train",
        str(folder / "spec.yaml"),
        f"duration.steps={STEPS}",
        "--storage",
        str(folder / "storage" / "runs"),
        "--run",
        name,
    ]


def stock_command(folder: Path) -> list[str]:
    flags = make_stock_flags(
        folder / "storage" / "runs" / "corpora",
        folder / "stock.jsonl",
        folder / "storage" / "stock",
        STEPS,
    )
    return [sys.executable, "-c", RUN_STOCK, str(STOCK), *flags]


def stock_rows_repeated(steps: Steps) -> int:
    """Its epoch begins anew at every start: rows that the surviving steps of a start share with
    earlier ones."""
    starts: list[list[int]] = []
    for step, _ in steps:
        if not starts or step <= starts[-1][-1]:
            starts.append([])
        starts[-1].append(step)
    repeated = longest = 0
    for number, start in enumerate(starts):
        follows = starts[number + 1][0] if number + 1 < len(starts) else start[-1] + 1
        surviving = sum(step < follows for step in start)
        repeated += min(surviving, longest)
        longest = max(longest, surviving)
    return repeated * WORKERS * MICRO_ROWS


def summarize(
    arm: Arm, steps: Steps, seconds: float, control_step: float, faults: list[Fault]
) -> dict[str, Any]:
    committed = steps[-1][0] // EVERY * EVERY
    return {
        "faults": len(faults),
        "steps": committed,
        "goodput": committed * control_step / seconds,
        "steps_redone": len(steps) - len({step for step, _ in steps}),
        "by_hand": arm.by_hand,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    seconds = options.minutes * 60
    with tempfile.TemporaryDirectory(prefix="dray-soak-") as name:
        folder = Path(name)
        with full_able_storage(folder) as can_fill:
            kinds = ["kill", "hang", "node", "preemption", *(["storage"] if can_fill else [])]
            faults = make_schedule(seconds, kinds, options.seed)
            (folder / "spec.yaml").write_text(SPEC)
            try:
                figures = measure(folder, seconds, faults)
            finally:
                if options.keep:
                    keep(folder, options.keep)
    counts = ", ".join(f"{sum(fault.kind == kind for fault in faults)} {kind}" for kind in kinds)
    lines = [
        f"{options.minutes:g} minutes an arm, {len(faults)} faults ({counts}), seed "
        f"{options.seed}; a step takes {figures['control']['step_seconds']:.3f} s where nothing "
        "happens"
        + (
            "."
            if can_fill
            else "; the storage could not be filled here: mounting is not permitted."
        ),
        "",
        "| arm | steps committed | goodput | steps redone | rows repeated | rows skipped | done "
        "by hand |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for arm in ("dray", "stock"):
        row = figures[arm]
        by_hand = "; ".join(f"{what} ({n} ×)" for what, n in Counter(row["by_hand"]).items()) or "–"
        lines.append(
            f"| {arm} | {row['steps']:,} | {row['goodput']:.0%} | {row['steps_redone']:,} "
            f"| {row['repeated']:,} | {row['skipped']} | {by_hand} |"
        )
    ratio = figures["dray"]["goodput"] / max(figures["stock"]["goodput"], 1e-9)
    write_section("soak", "\n".join([*lines, "", f"Goodput, dray ÷ stock: {ratio:.1f}."]), figures)


def keep(folder: Path, to: Path) -> None:
    """Copy what tells how it went."""
    shutil.copytree(
        folder / "storage" / "runs",
        to,
        ignore=shutil.ignore_patterns("checkpoints", "corpora"),
        dirs_exist_ok=True,
    )
    for path in [*folder.glob("*.log"), *folder.glob("*.jsonl")]:
        shutil.copy(path, to)


def measure(folder: Path, seconds: float, faults: list[Fault]) -> dict[str, Any]:
    """The control, dray, and the stock arm, one after the other."""
    from dray.ledger import verify_ledger

    subprocess.run(
        [
            f"{sys.prefix}/bin/dray",
            "prepare",
            str(folder / "spec.yaml"),
            "--storage",
            str(folder / "storage" / "runs"),
        ],
        check=True,
        capture_output=True,
    )
    figures: dict[str, Any] = {}
    runs = folder / "storage" / "runs"
    control = Arm(
        "control",
        folder,
        lambda: dray_command(folder, "control"),
        lambda: read_dray_steps(runs / "control"),
    )
    try:
        steps, _ = control.follow(CONTROL_SECONDS, [])
    finally:
        control.end()
    control_step = statistics.median(b[1] - a[1] for a, b in itertools.pairwise(steps))
    figures["control"] = {"step_seconds": control_step, "steps": len(steps)}
    arms = (
        ("dray", lambda: dray_command(folder, "dray"), lambda: read_dray_steps(runs / "dray")),
        ("stock", lambda: stock_command(folder), lambda: read_stock_steps(folder / "stock.jsonl")),
    )
    for name, command, read in arms:
        arm = Arm(name, folder, command, read)
        try:
            done, _ = arm.follow(seconds, faults)
        finally:
            arm.end()
        figures[name] = summarize(arm, done, seconds, control_step, faults)
        if name == "dray":
            ledger = verify_ledger(Run.open(str(runs), "dray"))
            figures[name] |= {
                "repeated": ledger.repeated,
                "skipped": ledger.skipped,
                "ledger_ok": ledger.ok,
                "problems": ledger.problems,
            }
        else:
            figures[name] |= {"repeated": stock_rows_repeated(done), "skipped": "not known"}
        print(figures[name], file=sys.stderr, flush=True)
    return figures


if __name__ == "__main__":
    main()
