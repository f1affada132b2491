"""The nodes of the connected cluster: what they have, which are gone, what they see."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from dray.errors import PlanError
from dray.plan import (
    Accelerator,
    Card,
    Shape,
    find_cards,
    local_shape,
    make_accelerator,
    match_accelerator,
)

CARDS_SECONDS = 30.0
"""How long the nodes may take to say which GPUs they have."""
SIGHT_SECONDS = 60.0
"""How long all nodes together may take to say whether they see the storage."""
ANSWER_SECONDS = 3.0
"""A node that cannot be connected to for so long is lost."""


def live_shape(cpus_per_worker: float, gpus_per_worker: int) -> Shape:
    """The shape of the connected cluster, by the smallest live node of those that can hold a
    worker, if any can."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    if not alive:
        raise PlanError("cluster", "no node is alive", way_out="ray start --head")
    nodes = [
        node for node in alive if can_hold(node["Resources"], cpus_per_worker, gpus_per_worker)
    ] or alive
    spare = [node["Resources"].get("CPU", 0.0) for node in alive if node not in nodes]

    def least(resource: str) -> float:
        return min(float(node["Resources"].get(resource, 0.0)) for node in nodes)

    shape = local_shape().model_copy(
        update={  # the instruction sets are this machine's
            "num_nodes": len(nodes),
            "cpus_per_node": least("CPU"),
            "memory_bytes_per_node": int(least("memory")),
            "spare_cpus": max(spare, default=0.0),
            "oversubscribe": False,
            "name": "the cluster",
            "accelerators_per_node": int(least("GPU")),
            "accelerator": None,
        }
    )
    if not shape.accelerators_per_node:
        return shape
    label = "accelerator_type:"
    kinds = [
        key.removeprefix(label)
        for node in nodes
        for key in node["Resources"]
        if key.startswith(label)
    ]
    kind = min(kinds, default="unknown")
    card = _ask_accelerator([node["NodeID"] for node in nodes]) if gpus_per_worker else None
    unknown = Accelerator(name=kind, memory_bytes=None, half_flops=None, fp32_flops=None)
    return shape.model_copy(update={"accelerator": card or match_accelerator(kind) or unknown})


def _ask_accelerator(node_ids: Sequence[str]) -> Accelerator | None:
    """What the drivers of these nodes say of their cards, the least of all; None where none answers
    in time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def ask(node_id: str) -> Any:
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(find_cards).remote()

    asked = [ask(node_id) for node_id in node_ids]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=CARDS_SECONDS)
    cards: list[Card] = []
    for answer in answered:
        with suppress(
            ray.exceptions.RayError
        ):  # a node that went away, or whose environment lacks dray
            cards += ray.get(answer)
    return make_accelerator(cards) if cards else None


def can_hold(resources: Mapping[str, float], cpus_per_worker: float, gpus_per_worker: int) -> bool:
    return (
        resources.get("CPU", 0.0) >= cpus_per_worker
        and resources.get("GPU", 0.0) >= gpus_per_worker
    )


def find_lost_nodes(node_ids: Collection[str]) -> list[str]:
    """Those of the nodes that are dead, or on which no Ray answers: Ray itself takes half a minute
    to be sure."""
    import ray

    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    return sorted(
        node_id
        for node_id in node_ids
        if (node := nodes.get(node_id)) is None
        or not answers(node["NodeManagerAddress"], node["NodeManagerPort"])
    )


def find_nodes_without(
    sees: Callable[[], bool], cpus_per_worker: float, gpus_per_worker: int
) -> list[str]:
    """Addresses of the nodes that may hold a rank, and on which `sees()` is false; of a cluster of
    one node nobody is asked. A node that gives no answer is left to find out itself."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    nodes = {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"]
        and node["NodeID"] != here
        and can_hold(node["Resources"], cpus_per_worker, gpus_per_worker)
    }

    def look() -> bool:
        return sees()

    task = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote(): address
        for node_id, address in nodes.items()
    }
    done, _ = (
        ray.wait(list(asked), num_returns=len(asked), timeout=SIGHT_SECONDS) if asked else ([], [])
    )
    blind = []
    for ref in done:
        with suppress(ray.exceptions.RayError):
            if not ray.get(ref):
                blind.append(asked[ref])
    return sorted(blind)


def head_is_gone() -> bool:
    """Whether the connected cluster's head, and with it the cluster's memory, no longer answers."""
    import ray

    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    return not answers(host, int(port))


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
    except OSError:
        return False
    return True
