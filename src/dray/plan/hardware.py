"""What a plan is made for: accelerators by name, and the shape of a cluster (`2x8xH100`) or of this machine.

Figures are the makers' for dense matrices (no sparsity). It holds no prices: they change faster than code. Nothing here
touches a device; this machine is read from /proc alone, so that planning imports neither torch nor ray.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from dray.errors import PlanError

GB, GIB, TERA = 10**9, 2**30, 10**12
GRAMMAR = "shapes read NODESxCOUNTxNAME, e.g. 2x8xH100, 1x4x(memory=48GB,tflops=180) or 4xCPU(cpus=16,memory=64GB)"
Precision = Literal["fp32", "bf16", "fp16"]


class Accelerator(BaseModel):
    """One GPU: memory in bytes, dense matrix speed in FLOP/s."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    memory_bytes: int | None
    """None: unknown, so that nothing can be said about fitting."""
    half_flops: float | None
    """bf16 or fp16 with fp32 accumulation."""
    fp32_flops: float | None
    """fp32, without the shortened mantissa of TF32."""
    has_bf16: bool = True


def _gpu(name: str, memory_gib: float, half: float, fp32: float, *, bf16: bool = True) -> tuple[str, Accelerator]:
    return name.lower(), Accelerator(
        name=name, memory_bytes=int(memory_gib * GIB), half_flops=half * TERA, fp32_flops=fp32 * TERA, has_bf16=bf16)


# name, GiB, dense half precision TFLOP/s, fp32 TFLOP/s: the makers' data sheets, SXM where there is a choice.
ACCELERATORS: Mapping[str, Accelerator] = dict([
    _gpu("B200", 180, 2250, 75), _gpu("H200", 141, 989, 67), _gpu("H100", 80, 989, 67), _gpu("H100-PCIe", 80, 756, 51),
    _gpu("H100-NVL", 94, 835, 60), _gpu("GH200", 96, 989, 67), _gpu("H20", 96, 148, 44), _gpu("H800", 80, 989, 67),
    _gpu("A100", 40, 312, 19.5), _gpu("A100-40G", 40, 312, 19.5), _gpu("A100-80G", 80, 312, 19.5),
    _gpu("A800", 80, 312, 19.5),
    _gpu("A10G", 24, 70, 31.2), _gpu("A10", 24, 125, 31.2), _gpu("A30", 24, 165, 10.3), _gpu("A40", 48, 150, 37.4),
    _gpu("A6000", 48, 155, 38.7), _gpu("L4", 24, 121, 30.3), _gpu("L40", 48, 181, 90.5), _gpu("L40S", 48, 362, 91.6),
    _gpu("RTX6000-Ada", 48, 364, 91.1), _gpu("RTX3090", 24, 71, 35.6), _gpu("RTX4090", 24, 165, 82.6),
    _gpu("RTX5090", 32, 210, 104.8), _gpu("V100", 16, 125, 15.7, bf16=False),
    _gpu("V100-32G", 32, 125, 15.7, bf16=False),
    _gpu("T4", 16, 65, 8.1, bf16=False), _gpu("P100", 16, 18.7, 9.3, bf16=False), _gpu("MI250X", 64, 191.5, 23.9),
    _gpu("MI300X", 192, 1307, 163), _gpu("MI325X", 256, 1307, 163),
])  # fmt: skip


class Shape(BaseModel):
    """Nodes of one kind. Bytes and FLOP/s; a CPU's FLOP/s are those of one core."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = ""
    num_nodes: int = 1
    accelerators_per_node: int = 0
    accelerator: Accelerator | None = None
    cpus_per_node: float
    memory_bytes_per_node: int
    cpu_bf16: bool = False
    """Whether the CPU multiplies bf16 matrices in hardware; without it bf16 is some 200 times slower than fp32."""
    cpu_amx: bool = False
    """Whether the CPU has matrix units, with which everything around the matrix products is worth compiling."""
    cpu_core_fp32_flops: float = 78e9
    cpu_core_bf16_flops: float | None = None
    spare_cpus: float = 0.0
    """CPUs of a node besides, too small for a worker, e.g. the head: those who read may have them."""
    oversubscribe: bool = False
    """Whether more workers than CPUs may be started: yes on one's own machine, no on a cluster."""

    @property
    def num_accelerators(self) -> int:
        return self.num_nodes * self.accelerators_per_node

    @property
    def num_cpus(self) -> float:
        return self.num_nodes * self.cpus_per_node


def parse_shape(text: str) -> Shape:
    """A shape from `2x8xH100`, `1x4x(memory=48GB,tflops=180)` or `4xCPU(cpus=16,memory=64GB)`. Raises PlanError.

    Settings in parentheses: memory (of one accelerator; of a node for CPU), tflops (dense half precision), fp32_tflops,
    cpus and host_memory (of a node), bf16 (0 or 1). An accelerator named `unknown` is not checked for memory.
    """
    match = re.fullmatch(r"\s*(\d+)\s*[x×]\s*(?:(\d+)\s*[x×]\s*)?([A-Za-z][\w.-]*)?\s*(?:\(([^()]*)\))?\s*", text)
    if match is None or not (match[3] or match[4]):
        raise PlanError("--shape", f"{text!r} is not a shape", GRAMMAR)
    num_nodes, count, name, settings = int(match[1]), match[2], match[3] or "", _read_settings(text, match[4] or "")
    if num_nodes < 1 or count == "0":
        raise PlanError("--shape", f"{text!r} has no machine in it", GRAMMAR)
    if name.lower() == "cpu":
        return _cpu_shape(text, num_nodes * int(count or 1), settings)
    accelerator = _find_accelerator(text, name, settings)
    per_node = int(count or 1)
    # Clouds pair a training GPU with 12 to 26 vCPUs and 100 to 256 GB; the lower end is assumed unless it is told.
    return Shape(
        name=text, num_nodes=num_nodes, accelerators_per_node=per_node, accelerator=accelerator,
        cpus_per_node=settings.get("cpus", 12.0 * per_node),
        memory_bytes_per_node=int(settings.get("host_memory", 128.0 * GB * per_node)),
        cpu_core_fp32_flops=115e9,
    )


def local_shape() -> Shape:
    """This machine without its GPUs: CPUs, memory (cgroup limits heeded), instruction sets, from /proc and /sys."""
    flags = _cpu_flags()
    amx, avx512_bf16, avx512 = "amx_bf16" in flags, "avx512_bf16" in flags, "avx512f" in flags
    num_cpus = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return Shape(
        name="this machine", cpus_per_node=num_cpus, memory_bytes_per_node=_machine_memory_bytes(),
        cpu_bf16=amx or avx512_bf16, cpu_amx=amx, cpu_core_fp32_flops=115e9 if avx512 else 78e9,
        cpu_core_bf16_flops=850e9 if amx else 230e9 if avx512_bf16 else None, oversubscribe=True,
    )


def _cpu_shape(text: str, num_nodes: int, settings: dict[str, float]) -> Shape:
    missing = [name for name in ("cpus", "memory") if name not in settings]
    if missing:
        raise PlanError("--shape", f"{text!r} lacks {' and '.join(missing)}", "a CPU node is described by numbers",
                        "e.g. 4xCPU(cpus=16,memory=64GB)")
    has_bf16 = bool(settings.get("bf16", 0.0))
    return Shape(name=text, num_nodes=num_nodes, cpus_per_node=settings["cpus"],
                 memory_bytes_per_node=int(settings["memory"]), cpu_bf16=has_bf16, cpu_core_fp32_flops=115e9,
                 cpu_core_bf16_flops=850e9 if has_bf16 else None)


def _find_accelerator(text: str, name: str, settings: dict[str, float]) -> Accelerator:
    known = ACCELERATORS.get(name.lower())
    if known is None and name and name.lower() != "unknown" and not {"memory", "tflops"} <= settings.keys():
        near = difflib.get_close_matches(name.lower(), ACCELERATORS, n=1)
        names = ", ".join(card.name for card in ACCELERATORS.values())
        hint = f"did you mean {ACCELERATORS[near[0]].name}?" if near else f"known: {names}"
        raise PlanError("--shape", f"{text!r}: no accelerator {name!r}", "unknown ones take memory and tflops", hint)
    if not name and not {"memory", "tflops"} <= settings.keys():
        raise PlanError("--shape", f"{text!r} lacks memory or tflops", "unknown accelerators take both",
                        "e.g. 1x4x(memory=48GB,tflops=180)")
    base = known or Accelerator(name=name or "accelerator", memory_bytes=None, half_flops=None, fp32_flops=None)
    half = settings["tflops"] * TERA if "tflops" in settings else base.half_flops
    fp32 = base.fp32_flops or (half / 8 if half else None)
    fp32 = settings["fp32_tflops"] * TERA if "fp32_tflops" in settings else fp32
    memory = int(settings["memory"]) if "memory" in settings else base.memory_bytes
    has_bf16 = bool(settings["bf16"]) if "bf16" in settings else base.has_bf16
    return Accelerator(name=base.name, memory_bytes=memory, half_flops=half, fp32_flops=fp32, has_bf16=has_bf16)


def _read_settings(text: str, inside: str) -> dict[str, float]:
    units = {"": 1, "gb": GB, "gib": GIB, "tb": 10**12, "tib": 2**40, "mb": 10**6, "mib": 2**20}
    settings: dict[str, float] = {}
    for part in filter(None, (item.strip() for item in inside.split(","))):
        match = re.fullmatch(r"(\w+)\s*=\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)", part)
        if match is None or match[1] not in ("memory", "tflops", "fp32_tflops", "cpus", "host_memory", "bf16"):
            raise PlanError("--shape", f"{part!r} in {text!r} is not a setting",
                            "settings: memory, tflops, fp32_tflops, cpus, host_memory, bf16", "e.g. memory=48GB")
        sized = match[1].endswith("memory")
        if match[3].lower() not in (units if sized else ("",)) or (sized and not match[3]):
            raise PlanError("--shape", f"{part!r} in {text!r}: unit {match[3]!r}",
                            "memory takes GB, GiB, TB or TiB; the others no unit")
        settings[match[1]] = float(match[2]) * units[match[3].lower()]
        if settings[match[1]] <= 0 and match[1] != "bf16":
            raise PlanError("--shape", f"{part!r} in {text!r}: nothing there", "numbers are above zero")
    return settings


def _cpu_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()


def _machine_memory_bytes() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(path).read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if limit.isdigit():
            return min(total, int(limit))
    return total
