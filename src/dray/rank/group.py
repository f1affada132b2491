"""The processes of one attempt as each of them sees it: who am I, how many are we, and what we
agree on.

Small agreements (counts, digests, flags) go over gloo on the CPU, so that they never wait for a
GPU's queue. Gradients are not exchanged here: that is DeepSpeed's work.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

_CONTROL = "dray: agreements"
"""What torch calls the groups that carry nothing but small agreements."""


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of its attempt."""

    rank: int
    num_ranks: int
    device: torch.device
    control: Any
    """The gloo group of small agreements."""

    def sum(self, values: Sequence[int]) -> list[int]:
        """Elementwise sum over all ranks of 64-bit integers, modulo 2^64 (two's complement)."""
        wrapped = [(value + 2**63) % 2**64 - 2**63 for value in values]
        tensor = torch.tensor(wrapped, dtype=torch.int64)
        dist.all_reduce(tensor, group=self.control)
        return [int(value) for value in tensor.tolist()]

    def total(self, value: Tensor) -> Tensor:
        """Sum over all ranks of a number on the device, in fp64, the same bits on each; not finite
        if any of them is not. On a GPU it is queued there, and nothing waits for it."""
        found = value.detach().double().clone()
        dist.all_reduce(
            found, group=self.control if found.device.type == "cpu" else dist.group.WORLD
        )
        return found

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_to_first(self, value: Any) -> list[Any] | None:
        """Every rank's value, in rank order, on rank 0, and none elsewhere: what is large is not
        sent to all."""
        values: list[Any] | None = [None] * self.num_ranks if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        holder = [value]
        dist.broadcast_object_list(holder, src=0, group=self.control)
        return holder[0]

    def join_rows(self, mine: Tensor) -> Tensor:
        """What all ranks have, each a tensor of the same shape on the device, one after the
        other."""
        parts = [torch.empty_like(mine) for _ in range(self.num_ranks)]
        dist.all_gather(parts, mine.contiguous())
        return torch.cat(parts)

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def apart(self, timeout_seconds: float) -> Ranks:
        """The same processes with a group of their own for agreements, which another thread may use
        meanwhile."""
        return replace(self, control=_build_control_group(timeout_seconds))

    def bound(self, *, compute_seconds: float, agree_seconds: float) -> None:
        """From now on a collective that takes longer raises on every rank that waits in it.

        `compute_seconds`: one of gradients or weights, in whichever groups DeepSpeed has made by
        now: all ranks come to it together. `agree_seconds`: a small agreement, which waits for
        whatever a rank does before it: rows, storage.
        """
        for group in list(dist.distributed_c10d._world.pg_map):
            agrees = group is self.control or group.group_desc == _CONTROL
            seconds = agree_seconds if agrees else compute_seconds
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def join(
    device: torch.device,
    *,
    rank: int,
    num_ranks: int,
    local_rank: int,
    host: str,
    announce: Callable[[tuple[str, int] | None], tuple[str, int]],
    timeout_seconds: float,
) -> Ranks:
    """Make the process group of a launcher's workers.

    `announce` gives every worker what rank 0 passes: where it listens. `host` is this node's
    address.
    """
    choose_interface(host)
    timeout = timedelta(seconds=timeout_seconds)
    build_store: Any = dist.TCPStore  # type: ignore[attr-defined]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(num_ranks))
    # Rank 0 listens before it tells where, so no port is guessed and lost to another program.
    store = None
    if rank == 0:
        store = build_store(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
    address, port = announce((host, store.port) if store else None)
    store = store or build_store(address, port, is_master=False, timeout=timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=rank,
        world_size=num_ranks,
        store=store,
        timeout=timeout,
    )
    return build_ranks(device, timeout_seconds)


def choose_interface(host: str) -> None:
    """Let gloo use the network interface of this node's address, unless a person has named one.

    By itself it takes the one that the host's name leads to, which on Debian is 127.0.1.1: other
    nodes cannot reach it.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == host for address in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def leave() -> None:
    """End the process group, at the end of an attempt that went well; a broken one is left to the
    operating system."""
    dist.destroy_process_group()


def build_ranks(device: torch.device, timeout_seconds: float) -> Ranks:
    """The process group that is there, as this process sees it."""
    control = (
        dist.group.WORLD if dist.get_backend() == "gloo" else _build_control_group(timeout_seconds)
    )
    return Ranks(dist.get_rank(), dist.get_world_size(), device, control)


def _build_control_group(timeout_seconds: float) -> Any:
    return dist.new_group(
        backend="gloo", timeout=timedelta(seconds=timeout_seconds), group_desc=_CONTROL
    )


def join_alone(device: torch.device) -> None:
    """Make this process a group of one, for training without Ray. Raises RuntimeError inside a
    larger group.

    The group stays until the process ends: DeepSpeed keeps references to it that outlive an engine.
    """
    if dist.is_initialized():
        if dist.get_world_size() != 1:
            raise RuntimeError(
                f"this process belongs to a group of {dist.get_world_size()} ranks already"
            )
        return
    # DeepSpeed reads these; the rendezvous itself is in memory, so no port is opened.
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1, store=store
    )
    atexit.register(dist.destroy_process_group)
