"""Ray Train's controller and worker groups, in places that dray chooses.

Ray Train makes a group of bundles for the workers alone, and always one of its own. Here the bundle
of those who read belongs to it, so that workers never hold every CPU while they wait for rows; and
a group that the caller of `train` made is used as it is, and left to its maker.
"""

from __future__ import annotations

import copy
import math
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ray
from ray.train.v2._internal.callbacks import StateManagerCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import (
    DefaultPlacementGroupHandle,
)
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from dray.cluster.gauges import has_dashboard
from dray.cluster.nodes import find_lost_nodes
from dray.cluster.placement import Placement, Seats, Site

LOOK_SECONDS = 1.0
"""How often a group that lost a node is looked at."""


class Place(WorkerGroupCallback):  # type: ignore[misc]
    """The place of a run's worker groups, one after the other. It travels to Ray Train's controller
    among its callbacks."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._seats = site.seats
        self._group: Any = None

    def take(
        self,
        num_workers: int,
        worker: dict[str, float],
        selectors: list[dict[str, str]] | None,
        strategy: str,
    ) -> Any:
        """A place for a worker group, which Ray Train waits for. `selectors`: which labels the
        nodes of each worker must have."""
        site = self._site
        if site.placement is not None:
            self._group = site.placement.group
            return _Given(site.placement)
        readers = [{"CPU": site.reader_cpus}] if site.reader_cpus else []
        self._seats = Seats(tuple(range(num_workers)), num_workers if readers else -1)
        self._group = placement_group(
            [dict(worker) for _ in range(num_workers)] + readers,
            strategy=strategy,
            bundle_label_selector=selectors and [*selectors, *({} for _ in readers)],
            name=f"{site.name}-{uuid.uuid4().hex[:12]}",
        )
        return DefaultPlacementGroupHandle(self._group)

    @property
    def is_own(self) -> bool:
        """Whether groups are made for the run, and not by its caller."""
        return self._site.placement is None

    def seats_of_workers(self, num_workers: int) -> list[int]:
        assert self._seats is not None, "workers come after their place"
        return list(self._seats.workers[:num_workers])

    def with_readers(self, dataset: Any) -> tuple[Any, dict[str, Any]]:
        """A data set, and Ray's options of the tasks that read it beside the present group."""
        site, seats = self._site, self._seats
        if not site.reader_cpus or seats is None:
            # Tasks that ask for no CPU are counted by nobody else.
            return dataset, {"num_cpus": 0.0, "concurrency": site.readers_at_once}
        return dataset, {
            "num_cpus": site.reader_cpus / max(site.readers_at_once, math.ceil(site.reader_cpus)),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=seats.reader
            ),
        }


class _Given(DefaultPlacementGroupHandle):  # type: ignore[misc]
    """A group that somebody else made, and takes away."""

    def __init__(self, placement: Placement) -> None:
        super().__init__(placement.group)
        self._placement = placement

    def wait(self, timeout_seconds: float = 30) -> bool:
        """Whether all of it is there, on nodes that live and stay: to start a worker on another
        one would wait for ever, or be over soon."""
        deadline = time.monotonic() + timeout_seconds
        while not super().wait(LOOK_SECONDS) or self._is_going():
            if self._placement.is_removed() or time.monotonic() > deadline:
                return False
            time.sleep(LOOK_SECONDS)
        return True

    def _is_going(self) -> bool:
        nodes = self._placement.node_ids()
        draining = ray._private.state.state.get_draining_nodes()
        return bool(nodes & set(draining) or find_lost_nodes(nodes))

    def shutdown(self) -> None:
        """Nothing: Ray Train has ended the workers by now."""


class _PlacedGroup(WorkerGroup):  # type: ignore[misc]
    def _create_placement_group(self, scaling_config: Any, context: Any) -> Any:
        return self._place().take(
            context.num_workers,
            context.resources_per_worker,
            context.label_selector,
            context.placement_strategy,
        )

    def _create_workers(
        self, num_workers: int, placement_group: Any, resources_per_worker: Any, **settings: Any
    ) -> Any:
        settings = {
            "placement_group_bundle_indices": self._place().seats_of_workers(num_workers),
            **settings,
        }
        return super()._create_workers(
            num_workers, placement_group, resources_per_worker, **settings
        )

    def _place(self) -> Place:
        return next(callback for callback in self._callbacks if isinstance(callback, Place))


class PlacedTrainController(TrainController):  # type: ignore[misc]
    """Its process is called so, and found by that name."""

    worker_group_cls = _PlacedGroup


class _Shown(StateManagerCallback):  # type: ignore[misc]
    """The run on the dashboard's Train page: what it is, instead of all that its workers are
    given."""

    def __init__(self, datasets: Any, settings: Mapping[str, Any]) -> None:
        super().__init__(datasets)
        self._settings = dict(settings)

    def after_controller_start(self, train_run_context: Any) -> None:
        shown = copy.copy(train_run_context)
        object.__setattr__(shown, "train_loop_config", self._settings)  # it is frozen
        super().after_controller_start(shown)


class Trainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray Train's trainer for groups in a place of their own. Its controller is told as it starts:
    who ends that ends the run."""

    def __init__(
        self,
        work: Callable[[dict[str, Any]], None],
        *,
        site: Site,
        datasets: dict[str, Any],
        started: Callable[[Any], None],
        controller_environment: dict[str, str],
        shown: Mapping[str, Any],
        **settings: Any,
    ) -> None:
        self._place, self._shown = Place(site), shown
        self._started, self._controller_environment = started, controller_environment
        # Made anew for each group: Ray pickles them together with the place, which is their own.
        makers = {name: partial(self._place.with_readers, data) for name, data in datasets.items()}
        super().__init__(work, datasets=makers, **settings)

    def _create_default_callbacks(self) -> list[Any]:
        """Ray Train's own, but for the cleaner of groups that a killed controller leaves: whoever
        called `train` removes those, and a driver that was killed takes them along. Only an actor
        that was killed while its job lives can do neither."""
        callbacks = [self._place, *super()._create_default_callbacks()]
        is_actor = ray.get_runtime_context().worker.mode != ray.SCRIPT_MODE
        others = () if is_actor and self._place.is_own else (PlacementGroupCleanerCallback,)
        kept = [item for item in callbacks if not isinstance(item, (StateManagerCallback, *others))]
        return [*kept, *([_Shown(self.datasets, self._shown)] if has_dashboard() else [])]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        environment = {
            "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
            **get_env_vars_to_propagate(),
            **self._controller_environment,
        }
        controller = ray.remote(
            num_cpus=0, scheduling_strategy=here, runtime_env={"env_vars": environment}
        )(PlacedTrainController).remote(**settings)
        self._started(controller)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())
