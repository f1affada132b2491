"""A rank's process: its compute threads, a heap that keeps what it frees, how a GPU's memory is
managed, and where compiled code is kept.

glibc returns every large block to the system and faults it in again at the next step; keeping them,
in one arena, makes a step on a CPU a tenth shorter (bench/heap.py).
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

_OPTIONS = {
    "MALLOC_ARENA_MAX": (-8, 1),
    "MALLOC_MMAP_THRESHOLD_": (-3, 2**30),
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
}
"""glibc's variables; their numbers in malloc.h, and values."""
GPU_MEMORY = (
    "expandable_segments:True,pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
)
HEAP_ENVIRONMENT = {name: str(value) for name, (_, value) in _OPTIONS.items()}
"""For a process that does not train in its main thread, as Ray Train's workers: another thread has
an arena of its own before anything can be said to the heap, and such an arena returns its blocks
whatever the options say."""


def prepare_process(cpus: float) -> None:
    """Set this process' compute threads, and let its heap keep what it frees in the main thread.

    Ray leaves torch with one thread a core, or one in all, by chance.
    """
    import torch

    prepare_gpu_memory()
    threads = max(1, int(cpus))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    prepare_heap()
    keep_compiled_code()


def prepare_gpu_memory() -> None:
    """Let torch's pool grow in place, where it fragments by a fifth otherwise, and let several
    threads pin host memory, three times as fast (docs/benchmarks.md has both). For use before the
    first tensor on a GPU. What the person has set stays as it is."""
    import torch

    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if torch.cuda.is_available() and not any(name in os.environ for name in names):
        torch.cuda.memory._set_allocator_settings(GPU_MEMORY)


def keep_compiled_code() -> None:
    """Let torch.compile keep its code where the next run finds it, also after /tmp was emptied: a
    compilation on CPUs takes half a minute cold and a few seconds warm. A folder that the person
    has named stays as it is."""
    with suppress(
        OSError, RuntimeError
    ):  # no home, or one that cannot be written: torch's own place in /tmp
        place = (
            Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dray" / "inductor"
        )
        place.mkdir(parents=True, exist_ok=True)
        if os.access(place, os.W_OK):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(place))


def prepare_heap() -> None:
    """Let this process' heap keep what it frees: in the main thread, and in threads that are yet to
    start."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in _OPTIONS.values():
            libc.mallopt(option, value)
