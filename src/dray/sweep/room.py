"""How many trials there is room for at once: on this machine, or on a cluster and what may join it.

A trial is a placement group, which Ray gives as a whole or not at all, so that trials which wait
hold nothing. What could never be given is refused before anything starts.
"""

from __future__ import annotations

import os

from dray.cluster.needs import count_in, has_room
from dray.cluster.nodes import growing_nodes
from dray.cluster.placement import format_bundles, make_needs
from dray.errors import PlanError
from dray.plan import Plan, format_bytes, local_shape
from dray.spec import Resources

MOST_PACKED = 4
"""Trials that share a GPU by themselves: more wait for each other's kernels."""
MOST_AT_ONCE = 512
"""Trials at once of one driver: each is a thread of it."""


def fixed(resources: Resources) -> Resources:
    """A trial's resources: of an elastic group the fewest workers, so that more trials fit."""
    return resources.model_copy(update={"workers": resources.min_workers})


def at_once(room: int, concurrency: int | str) -> int:
    """How many trials run at once where there is room for so many."""
    return room if isinstance(concurrency, str) else min(room, concurrency)


def most_packed(resources: Resources, packing: int | str) -> int:
    """How many trials may come to share what one worker has."""
    if packing == "auto":
        return MOST_PACKED if resources.workers == 1 and resources.gpus_per_worker else 1
    return int(packing)


def check_packing(resources: Resources, packing: int | str) -> None:
    """Raise PlanError for trials of several workers that are to share what one has."""
    if packing not in ("auto", 1) and resources.workers != 1:
        raise PlanError(
            f"packing = {packing}",
            f"a trial has {resources.max_workers} workers",
            "trials of one worker alone share a GPU or CPUs: two ranks of a trial would come to "
            "lie on one GPU",
            "leave packing out, or give resources.workers=1",
        )


def pack(resources: Resources, plan: Plan, packing: int | str) -> Resources:
    """The resources of trials like the planned one, so many of which share what one worker has.

    Raises PlanError for more than fit, and as `check_packing` does.
    """
    check_packing(resources, packing)
    if packing == 1 or (packing == "auto" and (resources.workers != 1 or not plan.on_gpu)):
        return resources
    if not plan.on_gpu:
        share = resources.cpus_per_worker / int(packing)
        return resources.model_copy(update={"cpus_per_worker": share})
    limit, needed = plan.memory_limit_bytes, plan.memory.total
    fits = MOST_PACKED if limit is None else max(1, int(limit // needed))
    if packing != "auto" and int(packing) > fits:
        raise PlanError(
            f"packing = {packing}",
            f"a trial takes {format_bytes(needed)} of a GPU's {format_bytes(limit or 0)}",
            f"{fits} of them fit",
            f"give packing={fits} or less",
        )
    number = min(fits, MOST_PACKED) if packing == "auto" else int(packing)
    share = resources.gpus_per_worker / number
    return resources.model_copy(update={"gpus_per_worker": share})


def count_here(resources: Resources) -> int:
    """How many trials of these resources this machine can run at once. Readers come on top, as for
    a run of its own: they mostly wait. Raises PlanError for none."""
    cpus = float(os.cpu_count() or 1)
    gpus = float(local_shape().accelerators_per_node)
    wanted = _wanted(resources)
    fits = count_in({"CPU": cpus, "GPU": gpus}, wanted)
    if fits < 1:
        has = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if wanted["GPU"] else "")
        raise _impossible(resources, f"this machine has {has}")
    return min(fits, MOST_AT_ONCE)


def count_in_memory(plan: Plan) -> int:
    """How many trials like the planned one this machine's memory can hold at once; 1 at least,
    since one alone is planned like any run."""
    needed, has = plan.memory.host_bytes, plan.host_limit_bytes
    return max(1, int(has // needed)) if needed and has else MOST_AT_ONCE


def count_in_cluster(resources: Resources) -> int:
    """How many trials of these resources the connected cluster can run at once, with all nodes that
    its autoscaler may add. Raises PlanError for none."""
    bundles = make_needs(resources)
    nodes = growing_nodes(bundles)
    least, most = 0, 1
    while most <= MOST_AT_ONCE and has_room(nodes, bundles * most):
        least, most = most, most * 2
    while most - least > 1:  # the greatest number that fits lies between the two
        middle = (least + most) // 2
        least, most = (middle, most) if has_room(nodes, bundles * middle) else (least, middle)
    if not least:
        cpus = sum(node.resources.get("CPU", 0.0) for node in nodes)
        gpus = sum(node.resources.get("GPU", 0.0) for node in nodes)
        raise _impossible(
            resources,
            f"{len(nodes)} nodes, those counted that may still join, have {cpus:g} CPUs and "
            f"{gpus:g} GPUs, and no room for its bundles {format_bundles(bundles)}",
        )
    return min(least, MOST_AT_ONCE)


def _wanted(resources: Resources) -> dict[str, float]:
    return {
        "CPU": resources.max_workers * resources.cpus_per_worker,
        "GPU": float(resources.max_workers * resources.gpus_per_worker),
    }


def _impossible(resources: Resources, there: str) -> PlanError:
    wanted = _wanted(resources)
    gpus = f" and {wanted['GPU']:g} GPUs" if wanted["GPU"] else ""
    return PlanError(
        "resources",
        f"a trial needs {resources.max_workers} workers × {resources.cpus_per_worker:g} CPUs = "
        f"{wanted['CPU']:g} CPUs{gpus}; {there}",
        "a trial that can never start is refused",
        "give fewer resources.workers, or --address of a larger cluster",
    )
