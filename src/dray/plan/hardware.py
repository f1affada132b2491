"""What a plan is made for: accelerators by name, and the shape of a cluster (`2x8xH100`).

Figures are the makers' for dense matrices (no sparsity). Prices are `prices.yaml`'s, with their
date. Nothing here looks at a device: `machine.py` does, for the machine that it runs on.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from dray.errors import PlanError

GB, GIB, TERA = 10**9, 2**30, 10**12
PCIE = 25.0
"""GB/s one way of cards without a link of their own: PCIe 4 with 16 lanes, less its overhead."""
GRAMMAR = (
    "shapes read NODESxCOUNTxNAME, e.g. 2x8xH100, 1x4x(memory=48GB,tflops=180) or "
    "4xCPU(cpus=16,memory=64GB)"
)
MOST_MACHINES = 1_000_000
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
    memory_bytes_per_second: float | None = None
    link_bytes_per_second: float | None = None
    """To another card of the same node, one way: NVLink, Infinity Fabric, or PCIe."""


def _gpu(  # noqa: PLR0917
    name: str,
    memory_gib: float,
    half: float,
    fp32: float,
    memory_rate: float,
    link_rate: float = PCIE,
    *,
    bf16: bool = True,
) -> tuple[str, Accelerator]:
    return name.lower(), Accelerator(
        name=name,
        memory_bytes=int(memory_gib * GIB),
        half_flops=half * TERA,
        fp32_flops=fp32 * TERA,
        has_bf16=bf16,
        memory_bytes_per_second=memory_rate * GB,
        link_bytes_per_second=link_rate * GB,
    )


# name, GiB, dense half precision TFLOP/s, fp32 TFLOP/s, memory GB/s, link GB/s one way: the makers'
# data sheets, SXM where there is a choice. A card that is there tells its own memory (machine.py).
ACCELERATORS: Mapping[str, Accelerator] = dict([
    _gpu("GB300", 277, 2500, 80, 8000, 900), _gpu("B300", 268, 2250, 75, 8000, 900),
    _gpu("GB200", 185, 2500, 80, 8000, 900), _gpu("B200", 180, 2250, 75, 8000, 900),
    _gpu("H200", 141, 989, 67, 4800, 450), _gpu("GH200", 96, 989, 67, 4000, 450),
    _gpu("H100", 80, 989, 67, 3350, 450), _gpu("H100-PCIe", 80, 756, 51, 2000),
    _gpu("H100-NVL", 94, 835, 60, 3900, 300), _gpu("H800", 80, 989, 67, 3350, 200),
    _gpu("H20", 96, 148, 44, 4000, 450),
    _gpu("A100", 40, 312, 19.5, 1555, 300), _gpu("A100-40G", 40, 312, 19.5, 1555, 300),
    _gpu("A100-80G", 80, 312, 19.5, 2039, 300), _gpu("A800", 80, 312, 19.5, 2039, 200),
    _gpu("A10G", 24, 70, 31.2, 600), _gpu("A10", 24, 125, 31.2, 600),
    _gpu("A30", 24, 165, 10.3, 933),
    _gpu("A40", 48, 150, 37.4, 696), _gpu("A6000", 48, 155, 38.7, 768),
    _gpu("L4", 24, 121, 30.3, 300), _gpu("L40", 48, 181, 90.5, 864),
    _gpu("L40S", 48, 362, 91.6, 864), _gpu("RTX6000-Ada", 48, 364, 91.1, 960),
    _gpu("RTX3090", 24, 71, 35.6, 936), _gpu("RTX4090", 24, 165, 82.6, 1008),
    _gpu("RTX5090", 32, 210, 104.8, 1792),
    _gpu("V100", 16, 125, 15.7, 900, 150, bf16=False),
    _gpu("V100-32G", 32, 125, 15.7, 900, 150, bf16=False),
    _gpu("T4", 16, 65, 8.1, 320, bf16=False), _gpu("P100", 16, 18.7, 9.3, 732, bf16=False),
    _gpu("MI250X", 64, 191.5, 23.9, 1638, 100), _gpu("MI300X", 192, 1307, 163, 5300, 448),
    _gpu("MI325X", 256, 1307, 163, 6000, 448),
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
    """Whether the CPU multiplies bf16 matrices in hardware; without it bf16 is some 200 times
    slower than fp32."""
    cpu_amx: bool = False
    """Whether the CPU has matrix units, with which everything around the matrix products is worth
    compiling."""
    has_compiler: bool = True
    """Whether there is a C++ compiler, without which torch.compile makes nothing."""
    cpu_core_fp32_flops: float = 78e9
    cpu_core_bf16_flops: float | None = None
    spare_cpus: float = 0.0
    """CPUs of a node besides, too small for a worker, e.g. the head: those who read may have
    them."""
    num_addable: int = 0
    """Of the nodes, how many an autoscaler has still to add: they count, and are waited for."""
    network_bytes_per_second: float = 12.5e9
    """Of a node to the others, one way; 100 Gbit/s unless it is told."""
    oversubscribe: bool = False
    """Whether more workers than CPUs may be started: yes on one's own machine, no on a cluster."""

    @property
    def num_accelerators(self) -> int:
        return self.num_nodes * self.accelerators_per_node

    @property
    def num_cpus(self) -> float:
        return self.num_nodes * self.cpus_per_node


def parse_shape(text: str) -> Shape:
    """A shape from `2x8xH100`, `1x4x(memory=48GB,tflops=180)` or `4xCPU(cpus=16,memory=64GB)`.
    Raises PlanError.

    Settings in parentheses: memory (of one accelerator; of a node for CPU), tflops (dense half
    precision), fp32_tflops, bandwidth (of its memory), link (to the next card) and network (of a
    node) in bytes a second, cpus and host_memory (of a node), bf16 (0 or 1). An accelerator named
    `unknown` is not checked for memory.
    """
    match = re.fullmatch(
        r"\s*(\d+)\s*[x×]\s*(?:(\d+)\s*[x×]\s*)?([A-Za-z][\w.-]*)?\s*(?:\(([^()]*)\))?\s*", text
    )
    if match is None or not (match[3] or match[4]):
        raise PlanError("--shape", f"{text!r} is not a shape", GRAMMAR)
    num_nodes, count, name, settings = (
        int(match[1]),
        match[2],
        match[3] or "",
        _read_settings(text, match[4] or ""),
    )
    if num_nodes < 1 or count == "0":
        raise PlanError("--shape", f"{text!r} has no machine in it", GRAMMAR)
    if num_nodes * int(count or 1) > MOST_MACHINES:
        raise PlanError(
            "--shape", f"{text[:99]!r} is no cluster", f"{MOST_MACHINES:,} cards at most", GRAMMAR
        )
    if name.lower() == "cpu":
        return _cpu_shape(text, num_nodes * int(count or 1), settings)
    accelerator = _read_accelerator(text, name, settings)
    per_node = int(count or 1)
    # Clouds pair a training GPU with 12 to 26 vCPUs and 100 to 256 GB; the lower end is assumed
    # unless it is told.
    return Shape(
        name=text,
        num_nodes=num_nodes,
        accelerators_per_node=per_node,
        accelerator=accelerator,
        cpus_per_node=settings.get("cpus", 12.0 * per_node),
        memory_bytes_per_node=int(settings.get("host_memory", 128.0 * GB * per_node)),
        cpu_core_fp32_flops=115e9,
        network_bytes_per_second=settings.get("network", 12.5 * GB),
    )


def _cpu_shape(text: str, num_nodes: int, settings: dict[str, float]) -> Shape:
    missing = [name for name in ("cpus", "memory") if name not in settings]
    if missing:
        raise PlanError(
            "--shape",
            f"{text!r} lacks {' and '.join(missing)}",
            "a CPU node is described by numbers",
            "e.g. 4xCPU(cpus=16,memory=64GB)",
        )
    has_bf16 = bool(settings.get("bf16", 0.0))
    return Shape(
        name=text,
        num_nodes=num_nodes,
        cpus_per_node=settings["cpus"],
        memory_bytes_per_node=int(settings["memory"]),
        cpu_bf16=has_bf16,
        cpu_core_fp32_flops=115e9,
        cpu_core_bf16_flops=850e9 if has_bf16 else None,
        network_bytes_per_second=settings.get("network", 12.5 * GB),
    )


def _read_accelerator(text: str, name: str, settings: dict[str, float]) -> Accelerator:
    known = find_accelerator(name)
    if (
        known is None
        and name
        and name.lower() != "unknown"
        and not {"memory", "tflops"} <= settings.keys()
    ):
        near = difflib.get_close_matches(name.lower(), ACCELERATORS, n=1)
        names = ", ".join(card.name for card in ACCELERATORS.values())
        hint = f"did you mean {ACCELERATORS[near[0]].name}?" if near else f"known: {names}"
        raise PlanError(
            "--shape",
            f"{text!r}: no accelerator {name!r}",
            "unknown ones take memory and tflops",
            hint,
        )
    if not name and not {"memory", "tflops"} <= settings.keys():
        raise PlanError(
            "--shape",
            f"{text!r} lacks memory or tflops",
            "unknown accelerators take both",
            "e.g. 1x4x(memory=48GB,tflops=180)",
        )
    base = known or Accelerator(
        name=name or "accelerator", memory_bytes=None, half_flops=None, fp32_flops=None
    )
    half = settings["tflops"] * TERA if "tflops" in settings else base.half_flops
    fp32 = base.fp32_flops or (half / 8 if half else None)
    fp32 = settings["fp32_tflops"] * TERA if "fp32_tflops" in settings else fp32
    memory = int(settings["memory"]) if "memory" in settings else base.memory_bytes
    has_bf16 = bool(settings["bf16"]) if "bf16" in settings else base.has_bf16
    return Accelerator(
        name=base.name,
        memory_bytes=memory,
        half_flops=half,
        fp32_flops=fp32,
        has_bf16=has_bf16,
        memory_bytes_per_second=settings.get("bandwidth", base.memory_bytes_per_second),
        link_bytes_per_second=settings.get("link", base.link_bytes_per_second or PCIE * GB),
    )


def find_accelerator(name: str) -> Accelerator | None:
    """The accelerator of the table by its name, or by what a driver calls it; None: it is not
    there."""
    return ACCELERATORS.get(name.lower()) or match_accelerator(name)


def match_accelerator(reported: str) -> Accelerator | None:
    """The accelerator of the table that a driver or Ray calls `reported`, e.g. `NVIDIA
    A100-SXM4-80GB`, `RTX-A6000` or `AMD-Instinct-MI300X-OAM`; the longest name that stands in it as
    whole words. None for a card that is not there."""
    words = re.findall(r"[a-z0-9]+", reported.lower())
    runs = {"".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    found = [
        card
        for card in ACCELERATORS.values()
        if re.sub(r"[^a-z0-9]", "", card.name.lower()) in runs
    ]
    return max(found, key=lambda card: len(card.name), default=None)


def check_accelerator(asked: str | None, shape: Shape) -> None:
    """Raise PlanError for a shape whose GPUs are others than those that Ray calls `asked`. Ray has
    one name for a kind in all its sizes: H100 is an H100-PCIe, too."""
    card = shape.accelerator
    if not asked or card is None or card.name.lower() in ("unknown", "accelerator"):
        return
    words, of_card = (re.findall(r"[a-z0-9]+", name.lower()) for name in (asked, card.name))
    known = match_accelerator(asked)
    if set(words) <= set(of_card) or (known is not None and known.name == card.name):
        return
    raise PlanError(
        f"resources.accelerator = {asked}",
        f"{shape.name or 'this machine'} has {card.name}",
        "a run starts on no other GPU than its own",
        f"give resources.accelerator={card.name}, or null for any",
    )


def _read_settings(text: str, inside: str) -> dict[str, float]:
    units = {"": 1, "gb": GB, "gib": GIB, "tb": 10**12, "tib": 2**40, "mb": 10**6, "mib": 2**20}
    names = (
        "memory",
        "tflops",
        "fp32_tflops",
        "bandwidth",
        "link",
        "cpus",
        "host_memory",
        "network",
        "bf16",
    )
    settings: dict[str, float] = {}
    for part in filter(None, (item.strip() for item in inside.split(","))):
        match = re.fullmatch(r"(\w+)\s*=\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)", part)
        if match is None or match[1] not in names:
            raise PlanError(
                "--shape",
                f"{part!r} in {text!r} is not a setting",
                f"settings: {', '.join(names)}",
                "e.g. memory=48GB",
            )
        sized = match[1] in ("memory", "host_memory", "bandwidth", "link", "network")
        if match[3].lower() not in (units if sized else ("",)) or (sized and not match[3]):
            raise PlanError(
                "--shape",
                f"{part!r} in {text!r}: unit {match[3]!r}",
                "bytes (a second) take MB, GB, GiB, TB or TiB; the others no unit",
            )
        settings[match[1]] = float(match[2]) * units[match[3].lower()]
        if settings[match[1]] <= 0 and match[1] != "bf16":
            raise PlanError(
                "--shape", f"{part!r} in {text!r}: nothing there", "numbers are above zero"
            )
    return settings
