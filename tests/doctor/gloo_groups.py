"""Real gloo groups of three ranks, one for each fault that rank 1 meets at step 4: `gloo_groups.py
FOLDER FAULT …`.

Every rank is a process forked from this one (torch is imported once), writes down its own error as
dray's ranks do, and its stacks while it waits. Below FOLDER/FAULT lie error-R.json, stacks-R.txt
and exit-R.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dray.runs.evidence import make_rank_failure

NUM_RANKS, CULPRIT, FAULT_STEP = 3, 1, 4
STACKS_AFTER, TIMEOUT = 3.0, 6.0


def read_slowly() -> None:
    time.sleep(600)


def meet_fault(fault: str) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "raise":
        raise ValueError("a label that is none")
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "stuck":
        read_slowly()


def train(fault: str, rank: int) -> None:
    for step in range(1, 10):
        if step == FAULT_STEP and rank == CULPRIT:
            meet_fault(fault)
        dist.all_reduce(torch.ones(1000))


def run_rank(fault: str, rank: int, port: int, folder: Path) -> None:
    patient = timedelta(seconds=60)
    store = dist.TCPStore(
        "127.0.0.1", port, is_master=rank == 0, wait_for_workers=False, timeout=patient
    )
    dist.init_process_group("gloo", rank=rank, world_size=NUM_RANKS, store=store, timeout=patient)
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT), dist.group.WORLD)
    with (folder / f"stacks-{rank}.txt").open("w") as stacks:
        if fault in ("stop", "stuck"):
            faulthandler.dump_traceback_later(STACKS_AFTER, file=stacks)
        try:
            train(fault, rank)
        except Exception as error:
            record = make_rank_failure(
                rank, error, pid=os.getpid(), node="10.0.0.7", time=time.time(), step=FAULT_STEP
            )
            (folder / f"error-{rank}.json").write_text(json.dumps(record.to_json()))
            if rank == 0:
                time.sleep(
                    1
                )  # it holds the store: the others shall see the culprit go, not this rank


def fork_rank(fault: str, rank: int, port: int, folder: Path) -> int:
    if (pid := os.fork()) == 0:
        try:
            run_rank(fault, rank, port, folder)
        finally:
            os._exit(0)
    return pid


def begin_group(fault: str, folder: Path) -> list[int]:
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [fork_rank(fault, rank, port, folder) for rank in range(NUM_RANKS)]


def end_group(pids: list[int], folder: Path) -> None:
    """Wait for the others, then end the culprit where it still lives; write down every exit."""
    for rank in (0, 2, CULPRIT):
        if rank == CULPRIT:
            os.kill(
                pids[rank], signal.SIGKILL
            )  # unreaped until now, so it is nobody else's process
        _, status = os.waitpid(pids[rank], 0)
        (folder / f"exit-{rank}").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    root = Path(sys.argv[1])
    begun = {fault: begin_group(fault, root / fault) for fault in sys.argv[2:]}
    for name, ranks in begun.items():
        end_group(ranks, root / name)
