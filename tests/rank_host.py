"""Ranks for tests of the engine: one process imports torch and DeepSpeed once, and forks the ranks
of each case.

Importing them takes seconds of CPU a process, building a tiny engine a tenth of that.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

SECONDS = 180.0


class RankHost:
    """Runs a function of a test module in a group of ranks over gloo: `function(ranks,
    *arguments)`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def run(self, function: Callable[..., Any], num_ranks: int, *arguments: Any) -> list[Any]:
        """What each rank returned, in their order. Raises AssertionError with the first traceback
        of a failed one."""
        self._connection.send((function, num_ranks, arguments))
        assert self._connection.poll(SECONDS + 30), "the host of the ranks does not answer"
        ok, found = self._connection.recv()
        assert ok, found
        return list(found)


@contextmanager
def rank_host() -> Iterator[RankHost]:
    """A host, ended with the context."""
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_serve, args=(there,))
    process.start()
    there.close()
    try:
        yield RankHost(here)
    finally:
        here.close()  # the host reads the end of its orders
        process.join(30)
        if process.is_alive():
            process.terminate()


def _serve(connection: Connection) -> None:
    from dray.rank.loop import preload

    torch.set_num_threads(1)  # no pool of threads, which a fork would lose
    preload()
    import transformers.models.llama.modeling_llama  # noqa: F401

    while True:
        try:
            function, num_ranks, arguments = connection.recv()
        except EOFError:
            return
        connection.send(_run_group(function, num_ranks, arguments))


def _run_group(function: Callable[..., Any], num_ranks: int, arguments: Any) -> tuple[bool, Any]:
    fork = get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [fork.Pipe(duplex=False) for _ in range(num_ranks)]
        processes = [
            fork.Process(
                target=_run_rank,
                args=(pipes[rank][1], function, rank, num_ranks, folder, arguments),
            )
            for rank in range(num_ranks)
        ]
        for process, (_, theirs) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()
        found: dict[int, Any] = {}
        waiting = {pipe[0]: rank for rank, pipe in enumerate(pipes)}
        failed = None
        while waiting and failed is None:
            ready = wait(list(waiting), timeout=SECONDS)
            failed = (
                None
                if ready
                else f"ranks {sorted(waiting.values())} said nothing for {SECONDS:g} seconds"
            )
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                try:
                    ok, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    ok, value = False, f"rank {rank} died"
                found[rank] = value
                failed = failed if ok else value
        for process in processes:
            if failed is not None:
                process.terminate()
            process.join(10)
        return (
            (True, [found[rank] for rank in range(num_ranks)])
            if failed is None
            else (False, failed)
        )


def _run_rank(
    pipe: Connection,
    function: Callable[..., Any],
    rank: int,
    num_ranks: int,
    folder: str,
    arguments: Any,
) -> None:
    import torch.distributed as dist

    from dray.rank.group import build_ranks

    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
        store = dist.FileStore(f"{folder}/rendezvous", num_ranks)
        dist.init_process_group("gloo", rank=rank, world_size=num_ranks, store=store)
        value = function(build_ranks(torch.device("cpu"), SECONDS), *arguments)
        dist.barrier()  # a rank that leaves early breaks its neighbours' connections
        pipe.send((True, value))
    except BaseException:
        pipe.send((False, f"rank {rank} of {num_ranks}:\n{traceback.format_exc()}"))
    # torch 2.13: a gloo thread that drops its last tensor while Python finalises aborts the
    # process.
    os._exit(0)
