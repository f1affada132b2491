"""Workers as forks, nodes that are warm before they are needed, and the one place that starts
worker groups."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from dray.cluster.needs import Needs, Node
from dray.cluster.nodes import head_is_gone
from dray.cluster.notices import pass_on
from dray.cluster.placement import Site
from dray.errors import RunFailed
from dray.processes import forkserver
from dray.processes.heap import HEAP_ENVIRONMENT
from dray.processes.signals import note_in_this_process

MAX_GROUP_STARTS = 10
"""Starts of a worker group in vain, each as long as RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S, before
a run fails."""
RESIZE_SECONDS = 30.0
"""How often an elastic group is compared with what the cluster has."""
WARM_SECONDS = 5.0
"""How often new nodes are looked for."""
_OWN_PYTHON = (
    "pip",
    "uv",
    "conda",
    "container",
    "image_uri",
    "nsight",
    "rocprof_sys",
    "py_executable",
)
"""What in a runtime environment chooses the Python of its workers."""
_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"


def fork_environment(kind: str, job: Mapping[str, Any]) -> dict[str, str]:
    """The runtime environment of workers that are forks (`kind`: forkserver.make_command); empty
    where the `job`'s runtime environment brings a Python of its own. A node that cannot have forks
    finds that out itself."""
    own = any(name in job and not forkserver.is_command(str(job[name])) for name in _OWN_PYTHON)
    return {} if own else {"py_executable": forkserver.make_command(kind)}


def server_of_ranks(gpus_per_worker: float) -> str:
    """What has touched CUDA cannot be forked, and libraries do so when they are imported."""
    return "light" if gpus_per_worker else "full"


def environment_of_ranks(gpus_per_worker: float) -> dict[str, str]:
    """The runtime environment of the connected job's workers that compute as ranks do."""
    import ray

    job = ray.get_runtime_context().runtime_env
    return fork_environment(server_of_ranks(gpus_per_worker), job)


class WarmNodes:
    """Fork servers on the nodes that can hold a rank, so that one that comes to a node need not
    wait for imports; and somebody there who hears that the node is to be taken away.

    A server stays for as long as it has a child: the keeper of its node.
    """

    def __init__(self, worker: Needs) -> None:
        import ray

        self._worker = worker
        context = ray.get_runtime_context()
        self.environment = fork_environment(
            f"light:{server_of_ranks(worker.gpus)}", context.runtime_env
        )
        """The runtime environment of an actor that keeps its node's servers."""
        self._keepers: dict[str, Any] = {context.get_node_id(): None}  # the mailbox is there
        self._looked_at = -math.inf

    def close(self) -> None:
        """Let the other nodes' servers go, which end once they have no children."""
        import ray

        for keeper in filter(None, self._keepers.values()):
            ray.kill(keeper)

    def look(self) -> None:
        """Take care of the nodes that have joined, every few seconds at most."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if time.monotonic() - self._looked_at < WARM_SECONDS:
            return
        self._looked_at = time.monotonic()
        if head_is_gone():  # to ask it blocks for a minute, and then Ray ends the process
            return

        class Keeper:
            def __init__(self, gcs_address: str, node_id: str) -> None:
                threading.Thread(target=pass_on, args=(gcs_address, node_id), daemon=True).start()

        for node in ray.nodes():
            node_id, holds = node["NodeID"], self._worker.count_on(Node.of(node))
            if node["Alive"] and holds and node_id not in self._keepers:
                there = NodeAffinitySchedulingStrategy(node_id, soft=False)
                actor = ray.remote(
                    num_cpus=0, scheduling_strategy=there, runtime_env=self.environment or None
                )(Keeper)
                gcs_address = ray.get_runtime_context().gcs_address
                self._keepers[node_id] = actor.remote(gcs_address, node_id)


def max_wait_seconds() -> float:
    """How long a run waits for a worker group that cannot start, e.g. for a node that went away,
    before it fails; where nodes are to be added for it, the spec says that."""
    from ray.train.v2._internal import constants

    seconds = os.environ.get(constants.WORKER_GROUP_START_TIMEOUT_S_ENV_VAR)
    return MAX_GROUP_STARTS * float(seconds or constants.DEFAULT_WORKER_GROUP_START_TIMEOUT_S)


def run_workers(
    work: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    *,
    site: Site,
    datasets: dict[str, Any],
    data_config: Any,
    num_workers: int | tuple[int, int],
    worker: Needs,
    recovery: Any,
    name: str,
    shown: Mapping[str, Any],
    scratch: str,
    is_local: bool,
    started: Callable[[Any], None],
) -> None:
    """Run `work(config)` on a group of Ray Train workers until it ends. Raises RunFailed with the
    workers' errors.

    The group starts anew for as long as `recovery`, a callback of Ray Train's controller, does not
    object. `site`: where it may be. `data_config` gets each data set with Ray's options of the
    tasks that are to read it. `shown`: what the dashboard tells of the run. `scratch` is a local
    folder for Ray Train's own notes, which dray does not read. `is_local`: Ray ends with this
    process. `started` is given the controller, with which the workers end.
    """
    from ray.exceptions import RayActorError
    from ray.train import BackendConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.backend import Backend
    from ray.train.v2.api.exceptions import TrainingFailedError

    from dray.cluster.groups import Trainer

    # The workers make their process group themselves: Ray's torch backend would import torch here
    # and in its controller.
    class SharedDevices(Backend):  # type: ignore[misc]
        share_cuda_visible_devices = True

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(
                note_in_this_process
            )  # in the main thread, which alone may handle signals

    class Processes(BackendConfig):  # type: ignore[misc]
        backend_cls = SharedDevices

    trainer = Trainer(
        work,
        site=site,
        started=started,
        shown=shown,
        # Nobody takes a laptop's node away; the watcher is one more process.
        controller_environment={_WATCHER: "0"} if is_local and _WATCHER not in os.environ else {},
        train_loop_config=config,
        datasets=datasets,
        dataset_config=data_config,
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=bool(worker.gpus),
            resources_per_worker=dict(worker.resources),
            label_selector=dict(worker.labels) or None,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        backend_config=Processes(),
        run_config=RunConfig(
            name=name,
            storage_path=scratch,
            callbacks=[recovery],
            worker_runtime_env={
                "env_vars": HEAP_ENVIRONMENT,
                **environment_of_ranks(worker.gpus),
            },
            failure_config=FailureConfig(
                max_failures=-1, max_preemption_failures=-1, controller_failure_limit=-1
            ),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise RunFailed(f"the workers failed: {_root_cause(error)}") from error
    except RayActorError as error:  # Ray never restarts it, and the workers end with it
        raise RunFailed(
            f"Ray Train's controller was lost: {str(error).partition(chr(10))[0]}"
        ) from error


def _root_cause(error: BaseException) -> str:
    """The last line of the first worker's traceback: what a person wants to read first."""
    failures = getattr(error, "worker_failures", None) or {}
    first = next((failures[rank] for rank in sorted(failures)), error)
    lines = [line for line in str(first).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else repr(first)
