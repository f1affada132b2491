"""This machine as a shape: CPUs, memory and instruction sets from /proc and /sys, GPUs from their
driver (NVML).

It imports neither torch nor ray, and makes no CUDA context. Where there is no NVIDIA driver, there
are no GPUs for it: those of AMD are known by Ray's label on a cluster.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dray.plan.hardware import Accelerator, Shape, match_accelerator

# Tensor cores' dense half precision speed (fp32 sums) over that of the plain cores in fp32, by
# compute capability.
_HALF_OVER_FP32 = {
    (6, 0): 2.0,
    (7, 0): 8.0,
    (7, 5): 8.0,
    (8, 0): 16.0,
    (8, 6): 2.0,
    (8, 7): 4.0,
    (8, 9): 2.0,
    (9, 0): 14.0,
    (10, 0): 30.0,
    (10, 3): 30.0,
    (12, 0): 2.0,
}
_LEAST_BF16 = (8, 0)


@dataclass(frozen=True)
class Card:
    """What one GPU says of itself; what it does not say is None."""

    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]
    num_cores: int | None = None
    core_hertz: float | None = None
    memory_bytes_per_second: float | None = None


def local_shape() -> Shape:
    """This machine: CPUs and memory (cgroup limits heeded), instruction sets, and the GPUs that
    this process may see.

    Cards that differ count as the least of them.
    """
    flags = _cpu_flags()
    amx, avx512_bf16, avx512 = "amx_bf16" in flags, "avx512_bf16" in flags, "avx512f" in flags
    cards = find_cards(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Shape(
        name="this machine",
        cpus_per_node=_num_cpus(),
        memory_bytes_per_node=_machine_memory_bytes(),
        accelerators_per_node=len(cards),
        accelerator=make_accelerator(cards) if cards else None,
        cpu_bf16=amx or avx512_bf16,
        cpu_amx=amx,
        has_compiler=has_compiler(),
        cpu_core_fp32_flops=115e9 if avx512 else 78e9,
        cpu_core_bf16_flops=850e9 if amx else 230e9 if avx512_bf16 else None,
        oversubscribe=True,
    )


def find_cards(visible: str | None = None) -> list[Card]:
    """The GPUs of this machine by their driver, of those that `visible` (as CUDA_VISIBLE_DEVICES
    has it) names; none without a driver."""
    try:
        import pynvml
    except ImportError:  # a node of a cluster whose environment lacks it
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = _visible_handles(pynvml, visible)
        return [_read_card(pynvml, handle) for handle in handles]
    except pynvml.NVMLError:  # a driver that is being exchanged, a card that has fallen off the bus
        return []
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def make_accelerator(cards: Sequence[Card]) -> Accelerator:
    """Cards of a node as an accelerator: the table's figures where it has the name, else what the
    card reports; the memory is always the card's own, the least of all."""
    least = min(cards, key=lambda card: card.memory_bytes)
    known = match_accelerator(least.name)
    if known is not None:
        return known.model_copy(update={"memory_bytes": least.memory_bytes})
    fp32 = (
        2.0 * least.num_cores * least.core_hertz if least.num_cores and least.core_hertz else None
    )
    ratio = _HALF_OVER_FP32.get(least.compute_capability, 2.0)
    return Accelerator(
        name=least.name,
        memory_bytes=least.memory_bytes,
        fp32_flops=fp32,
        half_flops=fp32 and fp32 * ratio,
        has_bf16=least.compute_capability >= _LEAST_BF16,
        memory_bytes_per_second=least.memory_bytes_per_second,
    )


def _visible_handles(nvml: Any, visible: str | None) -> Iterator[Any]:
    """Device handles in the order of `visible`: indices, or UUIDs, which may be cut short. As in
    CUDA, the list ends at the first entry that names no device."""
    everything = [
        nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())
    ]
    if visible is None:
        yield from everything
        return
    for entry in (item.strip() for item in visible.split(",")):
        if entry.isdigit() and int(entry) < len(everything):
            yield everything[int(entry)]
        elif entry.startswith("MIG-"):
            yield nvml.nvmlDeviceGetHandleByUUID(entry)
        else:
            named = [
                handle
                for handle in everything
                if entry and nvml.nvmlDeviceGetUUID(handle).startswith(entry)
            ]
            if not named:
                return
            yield named[0]


def _read_card(nvml: Any, handle: Any) -> Card:
    def ask(question: Any, *arguments: Any) -> Any:
        try:
            return question(handle, *arguments)
        except nvml.NVMLError:  # an older card or driver, or a slice of a card
            return None

    core_mhz = ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM)
    memory_mhz = ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_MEM)
    bus_bits = ask(nvml.nvmlDeviceGetMemoryBusWidth)
    capability = ask(nvml.nvmlDeviceGetCudaComputeCapability)
    return Card(
        name=str(nvml.nvmlDeviceGetName(handle)),
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        compute_capability=tuple(capability) if capability else (0, 0),
        num_cores=ask(nvml.nvmlDeviceGetNumGpuCores),
        core_hertz=core_mhz and core_mhz * 1e6,
        # Two transfers a clock, as the clock is told.
        memory_bytes_per_second=memory_mhz and bus_bits and 2.0 * memory_mhz * 1e6 * bus_bits / 8,
    )


def has_compiler() -> bool:
    """Whether torch.compile would find a compiler: $CXX, else the usual ones."""
    return any(
        shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++", "c++")
    )


def _num_cpus() -> float:
    """CPUs that this process may use at once: its affinity, or the share that its cgroup gives
    it."""
    count = float(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return min(count, max(0.1, float(quota) / float(period)))
    return count


def _cpu_flags() -> set[str]:
    try:
        for line in (
            Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        ):
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()


_CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", ""),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
"""Of both versions: the folder, its limit, what is in use, and how the names of what is a cache of
files begin."""


def _machine_memory_bytes() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder, limit, _, _ in _CGROUPS:
        with suppress(OSError):
            text = Path(folder, limit).read_text(encoding="utf-8").strip()
            if text.isdigit():
                return min(total, int(text))
    return total


def free_memory_bytes() -> int:
    """Bytes of this machine's memory, or of its cgroup's, that are not in use."""
    return max(0, int((1 - used_memory_share()) * _machine_memory_bytes()))


def free_disk_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes that are free on the disk of a path, or of the nearest folder above it that is
    there."""
    existing = os.path.abspath(os.path.expanduser(path))
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    return shutil.disk_usage(existing).free


def used_memory_share() -> float:
    """Share of this machine's memory, or of its cgroup's, that is in use, without files that could
    be dropped: at 1 the kernel kills."""
    total = _machine_memory_bytes()
    if total < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        for folder, _, usage, prefix in _CGROUPS:
            with suppress(OSError, ValueError, KeyError):
                used = int(Path(folder, usage).read_text(encoding="utf-8"))
                lines = Path(folder, "memory.stat").read_text(encoding="utf-8").splitlines()
                found = dict(line.split() for line in lines)
                files = sum(int(found[f"{prefix}{kind}_file"]) for kind in ("inactive", "active"))
                return max(0, used - files) / total
    import psutil

    memory = psutil.virtual_memory()
    return 1.0 - float(memory.available) / float(memory.total)
