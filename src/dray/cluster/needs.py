"""What a worker of a run takes of its node, and which nodes have it: amounts of Ray's resources,
among them the kind of its GPU, and labels. Nothing here asks a cluster.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from dray.errors import PlanError
from dray.spec import Resources

KIND = "accelerator_type:"
"""How Ray's resources begin that say which GPUs a node has; there is one of each."""
KIND_SHARE = 0.001
"""What a worker takes of one, as in Ray's own `ScalingConfig.accelerator_type`."""
_OWN_LABEL = "ray.io/node-id"


@dataclass(frozen=True)
class Node:
    """What a node has, be it there or still to be added."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] | None = field(default_factory=dict)
    """None: whoever adds it does not go by labels."""

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Node:
        """A node as `ray.nodes()` tells of it."""
        return cls(told["Resources"], told.get("Labels") or {})

    @property
    def kinds(self) -> list[str]:
        """What Ray calls its GPUs."""
        return sorted(key.removeprefix(KIND) for key in self.resources if key.startswith(KIND))


@dataclass(frozen=True)
class Needs:
    """What a bundle of a placement group takes of one node; nothing, if nothing is said."""

    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    """Ray's label selector."""

    @property
    def cpus(self) -> float:
        return self.resources.get("CPU", 0.0)

    @property
    def gpus(self) -> float:
        return self.resources.get("GPU", 0.0)

    @property
    def accelerator(self) -> str:
        """Ray's name of the GPU that it must be; empty: any."""
        return next(iter(Node(self.resources).kinds), "")

    def count_on(self, node: Node) -> int:
        """How often the node could hold it, if nobody else held anything."""
        return count_in(node.resources, self.resources) if self.matches(node.labels) else 0

    def matches(self, labels: Mapping[str, str] | None) -> bool:
        """Whether a node with these labels is one of those that are asked for."""
        if not self.labels or labels is None:
            return not self.labels
        ray = import_module("ray._raylet")
        return bool(ray.node_labels_match_selector(dict(labels), dict(self.labels)))

    def __str__(self) -> str:
        parts = [f"{amount:g} {name}" for name, amount in self.resources.items()]
        return ", ".join([
            *(part for part in parts if KIND not in part),
            *([self.accelerator] if self.accelerator else ()),
            *(f"{name}={value}" for name, value in self.labels.items()),
        ])  # fmt: skip


def make_worker_needs(resources: Resources) -> Needs:
    """What one worker takes."""
    gpus = {"GPU": float(resources.gpus_per_worker)} if resources.gpus_per_worker else {}
    kind = {f"{KIND}{resources.accelerator}": KIND_SHARE} if resources.accelerator else {}
    return Needs({"CPU": resources.cpus_per_worker, **gpus, **kind}, resources.labels)


def count_in(has: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    """How often `wanted` can be taken from what there is; 1 where nothing is wanted."""
    return min(
        (int((has.get(name, 0.0) + 1e-9) // amount) for name, amount in wanted.items() if amount),
        default=1,
    )


def has_room(nodes: Sequence[Node], bundles: Sequence[Needs]) -> bool:
    """Whether these nodes could hold all bundles, if nobody else held anything."""
    left = [Node(dict(node.resources), node.labels) for node in nodes]
    for needs in sorted(bundles, key=lambda b: (bool(b.labels), b.gpus, b.cpus), reverse=True):
        node = next((index for index, node in enumerate(left) if needs.count_on(node)), None)
        if node is None:
            return False
        rest = {
            name: amount - needs.resources.get(name, 0.0)
            for name, amount in left[node].resources.items()
        }
        left[node] = Node(rest, left[node].labels)
    return True


def check_offered(needs: Needs, nodes: Sequence[Node]) -> None:
    """Raise PlanError where a worker asks for a GPU or for labels of which none of the nodes has
    all, or only nodes that could not hold it."""
    kind, fit = needs.accelerator, [*nodes]
    if kind:
        kinds = sorted({kind for node in nodes for kind in node.kinds})
        fit = [node for node in nodes if kind in node.kinds]
        if not fit:
            near = difflib.get_close_matches(kind, kinds, n=1, cutoff=0.5)
            raise PlanError(
                f"resources.accelerator = {kind}",
                "no node has one, and none with one may be added",
                f"there are {', '.join(kinds)}" if kinds else "no node names its GPUs",
                f"did you mean {near[0]}?" if near else "accelerator=null takes any",
            )
    for name, value in needs.labels.items():
        before, fit = fit, [n for n in fit if Needs(labels={name: value}).matches(n.labels)]
        if not fit:
            raise _unlabelled(f"resources.labels: {name}={value}", name, before, kind)
    if (kind or needs.labels) and not any(needs.count_on(node) for node in fit):
        raise PlanError(
            "resources",
            f"a worker takes {needs}",
            "no node with that GPU and those labels has room for one, there or still to be added",
            "give workers less",
        )


def _unlabelled(where: str, name: str, nodes: Sequence[Node], kind: str) -> PlanError:
    """No node has such a label: what else there is."""
    values = sorted({node.labels[name] for node in nodes if node.labels and name in node.labels})
    names = sorted({key for node in nodes for key in node.labels or () if key != _OWN_LABEL})
    near = difflib.get_close_matches(name, names, n=1)
    return PlanError(
        where,
        f"no node{f' with {kind}' if kind else ''} has it, and none with it may be added",
        f"of {name} there are {', '.join(values)}"
        if values
        else f"there are the labels {', '.join(names)}"
        if names
        else "no node has a label",
        "an autoscaler that goes by labels is version 2: RAY_enable_autoscaler_v2=1 on the head"
        if any(node.labels is None for node in nodes)
        else f"did you mean {near[0]}?"
        if near and not values
        else "labels={} takes any node",
    )
