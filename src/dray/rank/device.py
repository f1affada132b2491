"""What a rank's device and its host hand to each other without waiting: batches, numbers, times and
states.

A GPU works through a queue, and a host that asks for a result waits until the queue has come to it.
Here a number is read when it is there, a time is what the device measured, and copies run from and
to pinned memory. On a CPU, where everything is there as soon as it was computed, each of these is
the plain thing: the loop that uses them is the same.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

cuda: Any = torch.cuda  # of which torch annotates little


def is_queued(device: torch.device) -> bool:
    """Whether work for this device is queued, so that asking for its results means waiting."""
    return device.type == "cuda"


def pin(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors in memory from which they can be copied to the device beside its work. For the
    thread that makes batches."""
    if not is_queued(device):
        return dict(batch)
    cuda.set_device(
        device
    )  # each thread has its own; pinning on another device would open a context there
    return {name: tensor.pin_memory() for name, tensor in batch.items()}


def send(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A pinned batch on the device. Torch keeps the pinned memory until the copy is done."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


class Reading:
    """A few numbers that are still being computed: `read` waits for them, and for no work that was
    queued later."""

    def __init__(self, numbers: Tensor) -> None:
        self._host, self._ready = numbers.detach(), None
        if is_queued(numbers.device):
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers.detach(), non_blocking=True)
            self._ready = cuda.Event()
            self._ready.record()

    def read(self) -> list[float]:
        """The numbers."""
        if self._ready is not None:
            self._ready.synchronize()
        found: list[float] = self._host.tolist()
        return found


class Clock:
    """Time by the device: a mark in a GPU's queue is passed once the work before it is done.

    The host's clock would tell how long launching takes, the same on a slow GPU as on a fast one.
    """

    def __init__(self, device: torch.device) -> None:
        self._queued = is_queued(device)

    def mark(self) -> Any:
        """This moment, as the device comes to it."""
        if not self._queued:
            return time.perf_counter()
        event = cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begun: Any, ended: Any) -> float:
        """Seconds between two marks, which must have been passed: a number of after them has been
        read."""
        if not self._queued:
            return float(ended - begun)
        return float(begun.elapsed_time(ended)) / 1000


class HostCopy:
    """Copies of tensors in host memory of their own, made beside the device's work.

    On a GPU they travel on a stream of their own: `finish` waits for them, in whatever thread, and
    `hold_back` keeps the device, and not the host, from changing the originals before that.
    """

    def __init__(self, tensors: Mapping[str, Tensor], stream: Any = None) -> None:
        self._done: Any = None
        self._copies: dict[str, Tensor] = {}
        if stream is None:
            self._copies = {
                name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()
            }
            return
        self._originals: Mapping[str, Tensor] = (
            tensors  # whose memory must not be given to others meanwhile
        )
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            for name, tensor in tensors.items():
                on_gpu = is_queued(tensor.device)  # with offload, states lie in host memory already
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
                self._copies[name] = copy.copy_(tensor.detach(), non_blocking=on_gpu)
            self._done = cuda.Event()
            self._done.record()

    def hold_back(self) -> None:
        """Whatever is queued from now on waits for the copies."""
        if self._done is not None:
            cuda.current_stream().wait_event(self._done)

    def finish(self) -> dict[str, Tensor]:
        """The copies, once they are whole. They are the caller's then."""
        if self._done is not None:
            self._done.synchronize()
            self._originals = {}
        copies, self._copies = self._copies, {}
        return copies


def build_copy_stream(device: torch.device) -> Any:
    """The stream that `HostCopy` takes on this device; none on a CPU."""
    return cuda.Stream(device) if is_queued(device) else None
