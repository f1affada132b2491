"""Nodes that an autoscaler may still add to the connected cluster.

Its limits are in the cluster's memory where a provider reports them there; Ray's own autoscaler
reports none, and is asked for the file that it was started with, on the head. Without either (on
Kubernetes the limits are the operator's) a cluster is what is there. Only version 2 of Ray's
autoscaler goes by labels: version 1 adds whatever has the resources.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import yaml

from dray.cluster.needs import Node

HEAD_RESOURCE = "node:__internal_head__"
ANSWER_SECONDS = 30.0
"""How long the head may take to say what its autoscaler may do."""
_SAID = b"__autoscaling_status"
_VERSION_2 = "autoscaler/v2/monitor.py"
"""Stands in the command line of the autoscaler's process."""
_GROUP_LABEL = "ray.io/node-group"
_DEFAULT_MOST = 2
"""Nodes beside the head where the file does not say how many, as Ray's autoscaler has it."""


@dataclass(frozen=True)
class NodeType:
    """One kind of node, and how many of them there may be."""

    name: str
    node: Node
    most: int


@dataclass(frozen=True)
class Limits:
    """What an autoscaler may do."""

    types: tuple[NodeType, ...]
    most: int
    """Nodes of all types beside the head."""


Serves = Callable[[Node], bool]
"""Whether such a node is of any use."""


def find_addable(nodes: Sequence[Mapping[str, Any]], most: int, serves: Serves) -> list[Node]:
    """Each node of use that may still join those that are alive (as `ray.nodes()` has them), but
    for no more than `most` of a type."""
    limits = _reported_limits() or _configured_limits(nodes)
    return [] if limits is None else count_addable(limits, nodes, most, serves)


def count_addable(
    limits: Limits, nodes: Sequence[Mapping[str, Any]], most: int, serves: Serves
) -> list[Node]:
    """As `find_addable`, of known limits."""
    workers = [node for node in nodes if HEAD_RESOURCE not in node["Resources"]]
    there = Counter(_type_of(node, limits.types) for node in workers)
    found: list[Node] = []
    for kind in limits.types:
        if not serves(kind.node):
            continue
        room = limits.most - len(workers) - len(found)
        count = min(kind.most - there[kind.name], room, most)
        found += [kind.node] * max(0, count)
    return found


def _type_of(node: Mapping[str, Any], types: Sequence[NodeType]) -> str:
    """By its label, else by what it has."""
    label = (node.get("Labels") or {}).get(_GROUP_LABEL, "")
    if label:
        return str(label)
    has = node["Resources"]
    alike = (
        kind.name
        for kind in types
        if all(has.get(name, 0.0) == kind.node.resources.get(name, 0.0) for name in ("CPU", "GPU"))
    )
    return next(alike, "")


def _reported_limits() -> Limits | None:
    config = import_module("ray._private.state").state.get_cluster_config()
    if config is None or not config.node_group_configs:
        return None
    many = 1_000_000
    types = [
        NodeType(
            group.name,
            Node({name: float(amount) for name, amount in group.resources.items()}, None),
            many if group.max_count < 0 else group.max_count,
        )
        for group in config.node_group_configs
    ]
    return Limits(tuple(types), many)


def _configured_limits(nodes: Sequence[Mapping[str, Any]]) -> Limits | None:
    """What the autoscaler's file says, read on the head."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    context = ray.get_runtime_context()
    head = next((n["NodeID"] for n in nodes if HEAD_RESOURCE in n["Resources"]), None)
    if head is None:
        return None
    if head == context.get_node_id():
        return read_limits(context.gcs_address)
    there = NodeAffinitySchedulingStrategy(head, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(read_limits)
    with suppress(ray.exceptions.RayError):  # a head without this package, or a busy one
        found: Limits | None = ray.get(task.remote(context.gcs_address), timeout=ANSWER_SECONDS)
        return found
    return None


def read_limits(gcs_address: str) -> Limits | None:
    """The limits of the autoscaler that works for a cluster on this machine; none if there is
    none, or its file cannot be read."""
    port = gcs_address.rpartition(":")[2]
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        options = dict(word.partition("=")[::2] for word in words)
        file = options.get("--autoscaling-config")
        if file and options.get("--gcs-address", "").rpartition(":")[2] == port:
            # A file that is being written, or is none of Ray's.
            with suppress(OSError, yaml.YAMLError, ValueError, TypeError, AttributeError):
                config = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
                return make_limits(config, with_labels=any(_VERSION_2 in word for word in words))
    return None


def make_limits(config: Mapping[str, Any], *, with_labels: bool) -> Limits:
    """The limits of an autoscaler's configuration, as `ray up` takes it."""
    most, head = int(config.get("max_workers", _DEFAULT_MOST)), config.get("head_node_type")
    types = [
        NodeType(
            name,
            Node(
                {key: float(amount) for key, amount in (kind.get("resources") or {}).items()},
                (kind.get("labels") or {}) if with_labels else None,
            ),
            int(kind.get("max_workers", most)),
        )
        for name, kind in (config.get("available_node_types") or {}).items()
        if name != head
    ]
    return Limits(tuple(types), most)


def autoscaler_says() -> str:
    """What the cluster's autoscaler has last said of nodes that are to come and of those that
    failed, to end a sentence with; empty: there is none, or it has nothing to say."""
    kv = import_module("ray.experimental.internal_kv")
    with suppress(Exception):  # another version of Ray may say it otherwise: it is a remark
        told = json.loads(kv._internal_kv_get(_SAID) or b"{}")
        report = told.get("autoscaler_report") or {}
        coming = Counter(report.get("pending_launches") or {})
        coming.update(kind for _, kind, _ in report.get("pending_nodes") or ())
        failed = Counter(kind for _, kind in report.get("failed_nodes") or ())
        parts = [
            f"{number} of {kind} {what}"
            for counts, what in ((coming, "on their way"), (failed, "failed"))
            for kind, number in sorted(counts.items())
        ]
        return f"; its autoscaler: {', '.join(parts)}" if parts else ""
    return ""
