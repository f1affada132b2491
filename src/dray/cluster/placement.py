"""The part of a connected Ray that one run may use: the bundles of a placement group.

Ray gives a placement group as a whole or not at all. So of several runs that together need more
than there is, none ever holds a part of what it needs while it waits for the rest; who waits is
Ray's business, and nobody counts how many runs fit at once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from dray.cluster.autoscaler import autoscaler_says
from dray.cluster.needs import KIND, Needs, Node, count_in, has_room, make_worker_needs
from dray.cluster.nodes import alive_nodes, head_is_gone, live_nodes, require_connected
from dray.errors import PlanError, StoppedWaiting
from dray.spec import Resources

READY_SECONDS = 1.0
"""How often a group that is not there yet is looked at."""
WAITING_SECONDS = 30.0
"""After which it is told that there is no room yet, or that no worker has started."""
MEND_SECONDS, MEND_LOOK_SECONDS = 20.0, 5.0
"""How long Ray may take to put what a group lost with a node elsewhere, and how often that is
looked at."""
GROW_SECONDS = 1800.0
"""How long an autoscaler may take to add the nodes of a group, if nothing else is said."""

_REMOVED, _BROKEN = "REMOVED", "RESCHEDULING"
"""States of a placement group in Ray's words."""


@dataclass(frozen=True)
class Placement:
    """Where the workers of a run, those who read for it and those who prepare its rows are to be.
    Whoever made the group takes it away; all that is in it ends with it."""

    group: Any
    """A `ray.util.placement_group.PlacementGroup`, ready or not."""
    grow_seconds: float = GROW_SECONDS
    """How long nodes that could hold it are waited for."""
    selectors: Sequence[Mapping[str, str]] = ()
    """The `bundle_label_selector` that the group was made with, which Ray does not tell."""

    @property
    def bundles(self) -> tuple[Mapping[str, float], ...]:
        """What each bundle has, by resource."""
        return tuple(self.group.bundle_specs)

    @property
    def needs(self) -> list[Needs]:
        """What each bundle takes of a node."""
        selectors = self.selectors or [{}] * len(self.bundles)
        return [Needs(has, labels) for has, labels in zip(self.bundles, selectors, strict=True)]

    def task_options(self) -> dict[str, Any]:
        """Ray's options of a task that works for the run, in whichever bundle has room: one CPU, or
        as much as the largest bundle has."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        most = max((float(bundle.get("CPU", 0.0)) for bundle in self.bundles), default=0.0)
        place = PlacementGroupSchedulingStrategy(self.group)
        return {"num_cpus": min(1.0, most), "scheduling_strategy": place}

    def is_removed(self) -> bool:
        """Whether somebody has taken the group away."""
        return self._state() == _REMOVED

    def is_broken(self) -> bool:
        """Whether a part of the group was lost with a node, and is not elsewhere yet."""
        return self._state() == _BROKEN

    def _state(self) -> str:
        from ray.util.placement_group import placement_group_table

        return str(placement_group_table(self.group).get("state", _REMOVED))

    def node_ids(self) -> set[str]:
        """The nodes that its bundles are on, once it is there."""
        from ray.util.placement_group import placement_group_table

        return set(placement_group_table(self.group).get("bundles_to_node_id", {}).values())

    def wait(
        self,
        say: Callable[[str], object] = lambda line: None,
        stop: Callable[[], str] = lambda: "",
    ) -> None:
        """Wait until the group is there; `say` gets a line once that takes long. Raises PlanError
        if it has been taken away, or no nodes could hold it for `grow_seconds`, and StoppedWaiting
        if `stop` gives a reason why nobody wants it any more."""
        told, begun = False, time.monotonic()
        roomy = begun
        while self.is_removed() or not self.group.wait(READY_SECONDS):
            state = self._state()
            if state == _REMOVED:
                raise PlanError(
                    "placement",
                    "its group is not there any more",
                    "a run lives in its group",
                    "keep the group until `train` has returned",
                )
            if reason := stop():
                raise StoppedWaiting(f"stopped while it waited for its placement: {reason}")
            now = time.monotonic()
            # Of a broken group the rest may lie where the lost part would fit.
            is_roomy = has_room(live_nodes(), self.needs) and state != _BROKEN
            roomy = now if is_roomy else roomy
            if now - roomy > self.grow_seconds:
                raise PlanError(
                    "placement",
                    f"no nodes could hold its bundles {format_bundles(self.needs)}",
                    f"they were waited for for {self.grow_seconds:.0f} s{autoscaler_says()}",
                    "make the group of make_bundles(spec.resources)",
                )
            if not told and now - begun > WAITING_SECONDS:
                told = True
                say(f"waiting for its placement of {format_bundles(self.needs)}: {_free_now()}")


class Mending:
    """Watches a group that may lose a part with a node.

    Ray looks for another place for the lost part alone. The rest stays, and may lie just where the
    lost part would fit, or be what another broken group waits for: a group that does not become
    whole soon is to be given back for a new one, which Ray gives as a whole or not at all.
    """

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._looked_at = time.monotonic()
        self._broken_since: float | None = None

    def is_hopeless(self) -> bool:
        """Whether the group has been seen broken for MEND_SECONDS. It is looked at every few
        seconds."""
        now = time.monotonic()
        # To ask a head that is gone blocks for a minute.
        if now - self._looked_at > MEND_LOOK_SECONDS and not head_is_gone():
            self._looked_at = now
            is_broken = self._placement.is_broken()
            self._broken_since = (self._broken_since or now) if is_broken else None
        since = self._broken_since
        return since is not None and self._looked_at - since > MEND_SECONDS


@dataclass(frozen=True)
class Seats:
    """Which bundle each worker is in, and which one those who read."""

    workers: tuple[int, ...]
    reader: int


@dataclass(frozen=True)
class Site:
    """What is known of a run's place before its first worker group starts."""

    name: str
    """How the names of its own groups begin."""
    reader_cpus: float
    """Of the bundle for reading; 0: none, those who read ask for no CPU."""
    readers_at_once: int = 1
    placement: Placement | None = None
    seats: Seats | None = None
    """Which bundles of the placement's group are used."""


def make_needs(resources: Resources) -> list[Needs]:
    """What the bundles of a group for a run of these resources take: one a worker, of an elastic
    group for the most it may have, and one for those who read, wherever that is."""
    worker = make_worker_needs(resources)
    return [worker] * resources.max_workers + [Needs({"CPU": resources.reader_cpus})]


def make_bundles(resources: Resources) -> list[dict[str, float]]:
    """The bundles of such a group, as Ray takes them."""
    return [dict(needs.resources) for needs in make_needs(resources)]


def make_selectors(resources: Resources) -> list[dict[str, str]]:
    """The `bundle_label_selector` of such a group."""
    return [dict(needs.labels) for needs in make_needs(resources)]


def format_bundles(bundles: Sequence[Needs]) -> str:
    """Bundles in a line, equal ones together."""
    counts = Counter(map(str, bundles))
    return " + ".join(
        f"{count} × ({text})" if count > 1 else f"({text})" for text, count in counts.items()
    )


def _free_now() -> str:
    """What of the cluster's CPUs and GPUs nobody holds, in words."""
    import ray

    has, free = ray.cluster_resources(), ray.available_resources()
    return "free now are " + " and ".join(
        f"{free.get(name, 0.0):g} of {has[name]:g} {name}s"
        for name in ("CPU", "GPU")
        if name in has
    )


def make_least_needs(resources: Resources) -> list[Needs]:
    """What a run of these resources cannot do without; those who read for an elastic group ask for
    nothing."""
    workers = [make_worker_needs(resources)] * resources.min_workers
    is_elastic = isinstance(resources.workers, tuple)
    return workers if is_elastic else [*workers, Needs({"CPU": resources.reader_cpus})]


@contextmanager
def reserved(resources: Resources) -> Iterator[Placement]:
    """A place for a run of these resources for as long as the block runs.

    It is asked for at once and may come later: `train` waits for it, and so does `Placement.wait`.
    Raises PlanError where no Ray is connected.
    """
    require_connected("reserved")
    from ray.util.placement_group import placement_group, remove_placement_group

    bundles, selectors = make_bundles(resources), make_selectors(resources)
    group = placement_group(bundles, strategy="PACK", bundle_label_selector=selectors)
    try:
        yield Placement(group, resources.wait_minutes * 60, selectors)
    finally:
        remove_placement_group(group)


def find_seats(resources: Resources, bundles: Sequence[Mapping[str, float]]) -> Seats:
    """As many workers as the bundles can hold, of those that are asked for, and a bundle that has
    CPUs left for reading. A bundle may hold several. Raises PlanError for too few."""
    worker = make_worker_needs(resources).resources
    room = [count_in(bundle, worker) for bundle in bundles]

    def seats_lost(index: int) -> int:
        return room[index] - count_in(_less(bundles[index], resources.reader_cpus), worker)

    readers = [i for i, has in enumerate(bundles) if count_in(has, {"CPU": resources.reader_cpus})]
    if not readers:
        raise _does_not_fit(
            resources, f"none of its bundles has {resources.reader_cpus:g} CPUs for reading"
        )
    reader = min(reversed(readers), key=seats_lost)
    room[reader] -= seats_lost(reader)
    seats = [index for index, count in enumerate(room) for _ in range(count)]
    if len(seats) < resources.min_workers:
        workers = f"{len(seats)} worker{'s' * (len(seats) != 1)}"
        raise _does_not_fit(resources, f"beside those who read its bundles have room for {workers}")
    return Seats(tuple(seats[: resources.max_workers]), reader)


def check_labels(placement: Placement, seats: Seats, worker: Needs) -> None:
    """Raise PlanError where a worker would sit on a node without the labels that it asks for: a
    group that is there may have been made without them."""
    from ray.util.placement_group import placement_group_table

    places = placement_group_table(placement.group)["bundles_to_node_id"]
    nodes = {node["NodeID"]: node for node in alive_nodes()}
    for index in seats.workers:
        node = nodes.get(places[index])  # one that went away is waited for
        if node is not None and not worker.matches(Node.of(node).labels):
            raise PlanError(
                "placement",
                f"its bundle {index} is on {node['NodeManagerAddress']}, which is none of the "
                "nodes of resources.labels",
                ", ".join(f"{name}={value}" for name, value in worker.labels.items()),
                "make the group with bundle_label_selector=make_selectors(spec.resources)",
            )


def _does_not_fit(resources: Resources, what: str) -> PlanError:
    name = f"GPU ({KIND}{resources.accelerator})" if resources.accelerator else "GPU"
    gpus = f" and {resources.gpus_per_worker:g} {name}" if resources.gpus_per_worker else ""
    return PlanError(
        "placement",
        what,
        f"{resources.min_workers} workers × {resources.cpus_per_worker:g} CPUs{gpus}, and "
        f"{resources.reader_cpus:g} CPUs in one bundle for reading",
        "make the group of make_bundles(spec.resources), or give fewer resources.workers",
    )


def wait_for_cpu(seconds: float, say: Callable[[str], object]) -> None:
    """Wait until a node has a CPU, where none has: one is asked of the autoscaler. Raises PlanError
    after so many seconds."""
    from ray.util.placement_group import placement_group, remove_placement_group

    if any(Needs({"CPU": 1.0}).count_on(node) for node in live_nodes()):
        return
    say("no node has a CPU: one is waited for")
    # A group, which needs no worker process as a task would.
    group = placement_group([{"CPU": 1.0}])
    try:
        if group.wait(seconds):
            return
    finally:
        remove_placement_group(group)
    raise PlanError(
        "cluster",
        f"no node with a CPU came within {seconds:.0f} s{autoscaler_says()}",
        "rows are prepared by tasks of one CPU each",
        "add a node, or give the autoscaler longer (resources.wait_minutes)",
    )


def remove_groups(prefix: str) -> None:
    """Take away what is left of the groups whose names begin so, with all that is in them."""
    from ray.util.placement_group import (
        get_placement_group,
        placement_group_table,
        remove_placement_group,
    )

    for found in placement_group_table().values():
        if found["name"].startswith(prefix) and found["state"] != _REMOVED:
            with suppress(ValueError):  # gone meanwhile
                remove_placement_group(get_placement_group(found["name"]))


def _less(bundle: Mapping[str, float], cpus: float) -> dict[str, float]:
    return {**bundle, "CPU": bundle.get("CPU", 0.0) - cpus}
