"""The nodes of the connected cluster: what they have, which are gone, what they see."""

from __future__ import annotations

import math
import os
import socket
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from dray.cluster.autoscaler import find_addable
from dray.cluster.needs import Needs, Node, check_offered
from dray.errors import PlanError
from dray.plan import (
    Accelerator,
    Shape,
    find_cards,
    local_shape,
    make_accelerator,
    match_accelerator,
)

T = TypeVar("T")

CARDS_SECONDS = 30.0
"""How long the nodes may take to say which GPUs they have."""
SIGHT_SECONDS = 60.0
"""How long all nodes together may take to say whether they see the storage."""
HELLO_SECONDS = 10.0
"""So long a head may take for its first words on a machine that has no time for it."""
ANSWER_SECONDS = 3.0
"""A node that cannot be connected to for so long is lost."""


def require_connected(where: str) -> None:
    """Raise PlanError where no Ray is connected: what needs one must not start or join whichever
    Ray there may be, which nobody would end."""
    import ray

    if not ray.is_initialized():
        raise PlanError(
            where,
            "no Ray is connected",
            "its work is done on one",
            "connect Ray first: ray.init(…), or a block of dray.cluster.connection.connect(…)",
        )


def check_connected(worker: Needs) -> None:
    """Raise PlanError where the worker asks for a GPU or labels that no node of the connected
    cluster has, nor one that its autoscaler may add."""
    if worker.accelerator or worker.labels:
        alive = alive_nodes()
        addable = find_addable(alive, 1, lambda node: True)
        check_offered(worker, [*map(Node.of, alive), *addable])


def live_shape(worker: Needs, num_workers: int = 1) -> Shape:
    """The shape of the connected cluster, by the smallest node of those that can hold a worker, if
    any can. Where its nodes cannot hold so many workers, those count too that its autoscaler may
    still add."""
    alive = alive_nodes()
    if not alive:
        raise PlanError("cluster", "no node is alive", way_out="ray start --head")

    seats = worker.count_on
    holding = [node for node in alive if seats(Node.of(node))]
    spare = [node["Resources"].get("CPU", 0.0) for node in alive if node not in holding]
    lacking = num_workers - sum(seats(Node.of(node)) for node in holding)
    cpus = sum(node["Resources"].get("CPU", 0.0) for node in alive)
    if lacking > 0 or cpus < num_workers * worker.cpus + 1:
        lacking += 1  # a CPU for those who read, wherever that is
    # The least of the nodes is planned with: a smaller kind would make all others as small.
    least = min((seats(Node.of(node)) for node in holding), default=1)
    coming = (
        find_addable(alive, lacking, lambda node: seats(node) >= least)
        if worker.resources and lacking > 0
        else []
    )
    added = [node.resources for node in coming]
    there = [node["Resources"] for node in (holding if holding or coming else alive)]
    shape = _shape_of([*there, *added]).model_copy(
        update={"spare_cpus": max(spare, default=0.0), "num_addable": len(coming)}
    )
    if not shape.accelerators_per_node:
        return shape
    ids = [node["NodeID"] for node in holding]
    return _with_accelerator(shape, [*there, *added], ids if worker.gpus else [])


def placed_shape(group: Any, of_workers: Collection[int]) -> Shape:
    """The shape of the bundles `of_workers` of a placement group, once it is there. What fits into
    them is known by then (`placement.find_seats`): here it counts how fast that is, and how much
    memory goes with it, which is a like share of each node's, by all that the group has there."""
    import ray
    from ray.util.placement_group import placement_group_table

    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes()}
    held: dict[str, Counter[str]] = {}
    whole: dict[str, Counter[str]] = {}
    for index, node in placement_group_table(group)["bundles_to_node_id"].items():
        whole.setdefault(node, Counter()).update(group.bundle_specs[index])
        if index in of_workers:
            held.setdefault(node, Counter()).update(group.bundle_specs[index])
    parts = [
        {**amounts, "memory": nodes[node].get("memory", 0.0) * _share(whole[node], nodes[node])}
        for node, amounts in held.items()
    ]
    # Bundles lie as it came: each node is taken for the average one.
    names = ("CPU", "GPU", "memory")
    mean = {name: sum(part.get(name, 0.0) for part in parts) / len(parts) for name in names}
    mean["GPU"] = math.ceil(mean["GPU"])
    shape = _shape_of([mean] * len(parts)).model_copy(
        update={"name": "the placement", "oversubscribe": True}
    )
    if not shape.accelerators_per_node:
        return shape
    return _with_accelerator(shape, [nodes[node] for node in held], list(held))


def _share(held: Mapping[str, float], has: Mapping[str, float]) -> float:
    """Which part of a node is held, by the resource of which most is."""
    shares = [held.get(name, 0.0) / has[name] for name in ("CPU", "GPU") if has.get(name)]
    return min(1.0, max(shares, default=1.0))


def _shape_of(nodes: Sequence[Mapping[str, float]]) -> Shape:
    """By the least of the nodes; what is not known of nodes to come is as it is elsewhere."""

    def least(resource: str) -> float:
        return min(float(node.get(resource, 0.0)) for node in nodes)

    local = local_shape()
    memory = [int(node["memory"]) for node in nodes if node.get("memory")]
    return local.model_copy(
        update={  # the instruction sets are this machine's
            "num_nodes": len(nodes),
            "cpus_per_node": least("CPU"),
            "memory_bytes_per_node": min(memory, default=local.memory_bytes_per_node),
            "oversubscribe": False,
            "name": "the cluster",
            "accelerators_per_node": int(least("GPU")),
            "accelerator": None,
        }
    )


def _with_accelerator(
    shape: Shape, nodes: Sequence[Mapping[str, float]], ask: Sequence[str]
) -> Shape:
    """The shape with its GPUs: as the nodes with the ids `ask` say, else as Ray calls them."""
    kind = min((kind for node in nodes for kind in Node(node).kinds), default="unknown")
    card = _ask_accelerator(ask) if ask else None
    unknown = Accelerator(name=kind, memory_bytes=None, half_flops=None, fp32_flops=None)
    return shape.model_copy(update={"accelerator": card or match_accelerator(kind) or unknown})


def _ask_accelerator(node_ids: Sequence[str]) -> Accelerator | None:
    """What the drivers of these nodes say of their cards, the least of all; None where none answers
    in time."""
    answers = ask_nodes(find_cards, node_ids, CARDS_SECONDS)
    cards = [card for found in answers.values() for card in found]
    return make_accelerator(cards) if cards else None


def may_grow(worker: Needs) -> bool:
    """Whether an autoscaler may still add a node that can hold a worker."""
    return bool(find_addable(alive_nodes(), 1, lambda node: worker.count_on(node) > 0))


def live_nodes() -> list[Node]:
    """The live nodes of the connected cluster."""
    return [Node.of(node) for node in alive_nodes()]


def growing_nodes(bundles: Sequence[Needs]) -> list[Node]:
    """The live nodes, and those that an autoscaler may still add and that could hold one of these
    bundles."""
    nodes = alive_nodes()

    def serves(node: Node) -> bool:
        return any(bundle.count_on(node) for bundle in bundles)

    return [*map(Node.of, nodes), *find_addable(nodes, 1_000, serves)]


def alive_nodes() -> list[dict[str, Any]]:
    """As `ray.nodes()` tells of them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def find_lost_nodes(node_ids: Collection[str]) -> list[str]:
    """Those of the nodes that are dead, or on which no Ray answers: Ray itself takes half a minute
    to be sure."""
    nodes = {node["NodeID"]: node for node in alive_nodes()}
    return sorted(
        node_id
        for node_id in node_ids
        if (node := nodes.get(node_id)) is None
        or not answers(node["NodeManagerAddress"], node["NodeManagerPort"])
    )


def find_nodes_without(
    sees: Callable[[], bool], worker: Needs, among: Collection[str] | None = None
) -> list[str]:
    """Addresses of the nodes that may hold such a worker (`among` those with these ids, if given),
    and on which `sees()` is false; of a cluster of one node nobody is asked. A node that gives no
    answer is left to find out itself."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    nodes = {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in alive_nodes()
        if node["NodeID"] != here
        and (among is None or node["NodeID"] in among)
        and worker.count_on(Node.of(node))
    }
    answers = ask_nodes(sees, list(nodes), SIGHT_SECONDS)
    return sorted(nodes[node_id] for node_id, seen in answers.items() if not seen)


def ask_nodes(work: Callable[[], T], node_ids: Sequence[str], seconds: float) -> dict[str, T]:
    """What `work()` gives on each of these nodes, by their ids; without those that give no answer
    in so many seconds, went away, or whose environment lacks dray."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def ask() -> T:
        return work()

    task = ray.remote(num_cpus=0, max_retries=0)(ask)
    asked = {
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote(): node_id
        for node_id in node_ids
    }
    done = ray.wait(list(asked), num_returns=len(asked), timeout=seconds)[0] if asked else []
    answers: dict[str, T] = {}
    for ref in done:
        with suppress(ray.exceptions.RayError):
            answers[asked[ref]] = ray.get(ref)
    return answers


def head_is_gone() -> bool:
    """Whether the connected cluster's head, and with it the cluster's memory, no longer answers."""
    import ray

    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    return not answers(host, int(port))


def answers(host: str, port: int) -> bool:
    """Whether anything listens there."""
    try:
        socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_SETTINGS = 4


def is_head(host: str, port: int) -> bool:
    """Whether what listens there may be a cluster's head: it begins as HTTP/2 does (RFC 9113,
    section 3.4), or, where this machine's Ray speaks TLS, it listens. Ray itself would ask anything
    else for minutes."""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return answers(host, port)
    try:
        with socket.create_connection((host, port), timeout=ANSWER_SECONDS) as connection:
            connection.settimeout(HELLO_SECONDS)
            connection.sendall(_PREFACE)
            begun = connection.recv(9, socket.MSG_WAITALL)
    except OSError:
        return False
    return len(begun) == 9 and begun[3] == _SETTINGS


def no_answer(address: str) -> PlanError:
    """The error for an address without a cluster."""
    return PlanError(
        "--address",
        f"no Ray cluster answers at {address}",
        "it is HOST:PORT of a head, port 6379 if nothing else was said",
        "ray start --head there",
    )


def check_address(address: str) -> None:
    """Raise PlanError for what is no HOST:PORT of a cluster's head, nor `auto`."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address != "auto" and not (host and "/" not in host and port.isdigit()):
        raise PlanError(
            f"--address {address}"[:200],
            "is no address of a cluster",
            "it is HOST:PORT of its head, port 6379 if nothing else was said; http://HEAD:8265 is "
            "for `dray submit`",
        )
