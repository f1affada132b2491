"""What the connected cluster has for a run, looked at before anything starts: room for its workers
on the nodes that are there and on those that may still join, which GPUs they have, and how full the
disks are on which Ray keeps its logs and spills what does not fit into memory.
"""

from __future__ import annotations

import shutil
from collections import Counter
from contextlib import suppress
from importlib import import_module
from typing import Any

from pydantic import BaseModel, ConfigDict

from dray.cluster.autoscaler import find_addable
from dray.cluster.needs import Node, make_worker_needs
from dray.cluster.nodes import alive_nodes, ask_nodes
from dray.plan import format_bytes
from dray.spec import Resources

SURVEY_SECONDS = 30.0
"""How long the nodes may take to answer."""
FULL_SHARE = 0.95
"""Of a disk: from there on Ray spills nothing to it (`RAY_local_fs_capacity_threshold`)."""


class NodeRoom(BaseModel):
    """One node, as far as it was found out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    workers: int
    """So many of the run's have room there, if nobody else held anything."""
    gpus: float
    accelerator: str = ""
    """What Ray calls its GPUs."""
    scratch_bytes: int | None = None
    """Of the disk where Ray keeps its session; None: it did not say."""
    scratch_free_bytes: int | None = None

    @property
    def is_full(self) -> bool:
        """Whether Ray spills nothing there any more."""
        size, free = self.scratch_bytes, self.scratch_free_bytes
        return bool(size) and free is not None and free < (1 - FULL_SHARE) * (size or 0)


class Survey(BaseModel):
    """The cluster, as a run sees it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nodes: tuple[NodeRoom, ...]
    wanted_workers: int
    """The fewest that the run goes on with."""
    addable_nodes: int
    """That an autoscaler may still add, and that can hold a worker; no more are counted than would
    be wanted."""
    addable_workers: int
    """Of the run's, on those."""

    @property
    def workers(self) -> int:
        """Of the run's, for which there is room on the nodes that are there."""
        return sum(node.workers for node in self.nodes)

    def describe(self) -> list[str]:
        """Lines for a person."""
        kinds = Counter(node.accelerator or "GPUs" for node in self.nodes if node.gpus)
        gpus = ", ".join(f"{kind} on {count}" for kind, count in sorted(kinds.items()))
        lines = [
            f"{len(self.nodes)} nodes{f' ({gpus})' if gpus else ''} with room for {self.workers} "
            f"workers; {self.wanted_workers} are wanted at least"
        ]
        if self.addable_nodes:
            lines.append(
                f"an autoscaler may add {self.addable_nodes} nodes or more, with room for "
                f"{self.addable_workers}"
            )
        return lines + self.remarks()

    def remarks(self) -> list[str]:
        """What a person should know before the run starts."""
        found = []
        if self.workers < self.wanted_workers and self.addable_nodes:
            found.append(
                f"{self.workers} of {self.wanted_workers} workers have room by now: nodes that the "
                "autoscaler may add are waited for"
            )
        kinds = {node.accelerator for node in self.nodes if node.gpus and node.workers}
        if len(kinds) > 1:
            found.append(
                f"the nodes have different GPUs ({', '.join(sorted(kinds))}): the plan goes by the "
                "least of them, and all wait for the slowest"
            )
        found += [
            f"node {node.address}: the disk of Ray's session has "
            f"{format_bytes(node.scratch_free_bytes or 0)} free of "
            f"{format_bytes(node.scratch_bytes or 0)}; from {FULL_SHARE:.0%} on Ray spills nothing "
            "there, and tasks fail for want of memory"
            for node in self.nodes
            if node.is_full
        ]
        return found


def survey_cluster(resources: Resources) -> Survey:
    """Look at the connected cluster for workers of these resources."""
    seats = make_worker_needs(resources).count_on
    alive = alive_nodes()
    disks = ask_nodes(find_scratch, [node["NodeID"] for node in alive], SURVEY_SECONDS)
    nodes = tuple(
        _make_room(node, seats(Node.of(node)), disks.get(node["NodeID"])) for node in alive
    )
    lacking = resources.max_workers - sum(node.workers for node in nodes)
    coming = find_addable(alive, lacking, lambda node: seats(node) > 0) if lacking > 0 else []
    return Survey(
        nodes=nodes,
        wanted_workers=resources.min_workers,
        addable_nodes=len(coming),
        addable_workers=sum(map(seats, coming)),
    )


def _make_room(node: dict[str, Any], workers: int, disk: tuple[int, int] | None) -> NodeRoom:
    kinds = Node.of(node).kinds
    size, free = disk or (None, None)
    return NodeRoom(
        address=node["NodeManagerAddress"],
        workers=workers,
        gpus=node["Resources"].get("GPU", 0.0),
        accelerator=kinds[0] if kinds else "",
        scratch_bytes=size,
        scratch_free_bytes=free,
    )


def find_scratch() -> tuple[int, int] | None:
    """Size and free bytes of the disk of Ray's session on the node that this runs on."""
    with suppress(OSError, AttributeError):
        session = import_module("ray._private.worker")._global_node.get_session_dir_path()
        usage = shutil.disk_usage(session)
        return usage.total, usage.free
    return None
