"""Ray as dray sees it: connect, live resources → cluster shape, and the one place that starts worker groups.

What the workers do is not known here.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from dray.cluster.local_ray import authenticated, local_ray
from dray.errors import PlanError, RunFailed
from dray.plan import Accelerator, Card, Shape, find_cards, local_shape, make_accelerator, match_accelerator
from dray.processes import forkserver
from dray.processes.heap import HEAP_ENVIRONMENT
from dray.processes.signals import kept_handlers, note_in_this_process
from dray.redaction import forget_shared_credentials, share_credentials

MAX_GROUP_STARTS = 10
"""Starts of a worker group in vain, each as long as RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S, before a run fails."""
RESIZE_SECONDS = 30.0
"""How often an elastic group is compared with what the cluster has."""
WARM_SECONDS = 5.0
"""How often new nodes are looked for."""
CARDS_SECONDS = 30.0
"""How long the nodes may take to say which GPUs they have."""
SIGHT_SECONDS = 60.0
"""How long all nodes together may take to say whether they see the storage."""
ANSWER_SECONDS = 3.0
"""A node that cannot be connected to for so long is lost."""
_QUIET = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_DEDUP_LOGS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}


@dataclass(frozen=True)
class Connection:
    """A connected Ray: `local` if it was started here and ends with this process."""

    local: bool
    shape: Shape


@contextmanager
def connect(address: str | None, *, num_cpus: float, cpus_per_worker: float = 0.0, gpus_per_worker: int = 0,
            verbose: bool = False) -> Iterator[Connection]:
    """Connect to `address` (or RAY_ADDRESS), else start a local Ray with at least `num_cpus` logical CPUs.

    Of a cluster only nodes that can hold a worker count: a head is often smaller, or has neither CPUs nor GPUs. A local
    Ray is oversubscribed on purpose: on a laptop two workers and a reader share two cores.
    Raises PlanError when the address does not answer.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if not ray.is_initialized():
        address = _find_cluster(address or os.environ.get("RAY_ADDRESS"))
    threading.Thread(target=importlib.import_module, args=("ray.train",), daemon=True).start()  # while Ray starts
    if ray.is_initialized():  # inside a notebook, a test or a larger program: theirs to end
        share_credentials()
        yield Connection(local=False, shape=live_shape(cpus_per_worker, gpus_per_worker))
        return
    level = logging.INFO if verbose else logging.CRITICAL  # a dead worker is told by the diagnosis
    if not verbose:
        _silence_ray_data()
    if not address:
        # Nobody takes a laptop's node away; the watcher is one more process.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # `ray job submit` hands the job's environment on in this variable.
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    light = fork_environment(f"light:{_server_of_ranks(gpus_per_worker)}" if cpus_per_worker else "light", submitted)
    options = {"log_to_driver": verbose, "logging_level": level, "runtime_env": light}
    if not address:
        num_cpus = max(os.cpu_count() or 1, math.ceil(num_cpus))
        with local_ray(num_cpus=num_cpus, include_dashboard=verbose, **options):
            share_credentials()
            try:
                yield Connection(local=True, shape=local_shape())
            finally:
                forget_shared_credentials()
        return
    with authenticated(address):
        try:
            with kept_handlers():
                ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _no_answer(address) from error
        share_credentials()
        try:
            yield Connection(local=False, shape=live_shape(cpus_per_worker, gpus_per_worker))
        finally:
            forget_shared_credentials()
            ray.shutdown()


_OWN_PYTHON = ("pip", "uv", "conda", "container", "image_uri", "nsight", "rocprof_sys", "py_executable")
"""What in a runtime environment chooses the Python of its workers."""


def fork_environment(kind: str, job: Mapping[str, Any]) -> dict[str, str]:
    """The runtime environment of workers that are forks (`kind`: forkserver.make_command); empty where the `job`'s
    runtime environment brings a Python of its own. A node that cannot have forks finds that out itself."""
    own = any(name in job and not forkserver.is_command(str(job[name])) for name in _OWN_PYTHON)
    return {} if own else {"py_executable": forkserver.make_command(kind)}


def _server_of_ranks(gpus_per_worker: int) -> str:
    """What has touched CUDA cannot be forked, and libraries do so when they are imported."""
    return "light" if gpus_per_worker else "full"


class WarmNodes:
    """Fork servers on the nodes that can hold a rank, so that one that comes to a node need not wait for imports.

    A server stays for as long as it has a child: one on each node does nothing else.
    """

    def __init__(self, cpus_per_worker: float, gpus_per_worker: int) -> None:
        import ray

        self._cpus, self._gpus = cpus_per_worker, gpus_per_worker
        context = ray.get_runtime_context()
        self.environment = fork_environment(f"light:{_server_of_ranks(gpus_per_worker)}", context.runtime_env)
        """The runtime environment of an actor that keeps its node's servers."""
        self._keepers: dict[str, Any] = {context.get_node_id(): None}  # the mailbox is there
        self._looked_at = -math.inf

    def look(self) -> None:
        """Take care of the nodes that have joined, every few seconds at most."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if not self.environment or time.monotonic() - self._looked_at < WARM_SECONDS:
            return
        self._looked_at = time.monotonic()
        if head_is_gone():  # to ask it blocks for a minute, and then Ray ends the process
            return

        class Keeper:
            pass

        for node in ray.nodes():
            node_id, holds = node["NodeID"], _can_hold(node["Resources"], self._cpus, self._gpus)
            if node["Alive"] and holds and node_id not in self._keepers:
                there = NodeAffinitySchedulingStrategy(node_id, soft=False)
                actor = ray.remote(num_cpus=0, scheduling_strategy=there, runtime_env=self.environment)(Keeper)
                self._keepers[node_id] = actor.remote()


def _find_cluster(address: str | None) -> str | None:
    """The address, once something listens there: Ray itself would ask for many minutes. Raises PlanError."""
    if address == "auto":  # the cluster that was started last on this machine, which may have ended
        from ray._private.services import canonicalize_bootstrap_address

        address = canonicalize_bootstrap_address("auto") or address
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if address and port.isdigit() and not _answers(host, int(port)):
        raise _no_answer(address)
    return address


def _no_answer(address: str) -> PlanError:
    return PlanError("--address", f"no Ray cluster answers at {address}", way_out="ray start --head")


def live_shape(cpus_per_worker: float, gpus_per_worker: int) -> Shape:
    """The shape of the connected cluster, by the smallest live node of those that can hold a worker, if any can."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    if not alive:
        raise PlanError("cluster", "no node is alive", way_out="ray start --head")
    nodes = [node for node in alive if _can_hold(node["Resources"], cpus_per_worker, gpus_per_worker)] or alive
    spare = [node["Resources"].get("CPU", 0.0) for node in alive if node not in nodes]

    def least(resource: str) -> float:
        return min(float(node["Resources"].get(resource, 0.0)) for node in nodes)

    shape = local_shape().model_copy(update={  # the instruction sets are this machine's
        "num_nodes": len(nodes), "cpus_per_node": least("CPU"), "memory_bytes_per_node": int(least("memory")),
        "spare_cpus": max(spare, default=0.0), "oversubscribe": False, "name": "the cluster",
        "accelerators_per_node": int(least("GPU")), "accelerator": None})
    if not shape.accelerators_per_node:
        return shape
    label = "accelerator_type:"
    kinds = [key.removeprefix(label) for node in nodes for key in node["Resources"] if key.startswith(label)]
    kind = min(kinds, default="unknown")
    card = _ask_accelerator([node["NodeID"] for node in nodes]) if gpus_per_worker else None
    unknown = Accelerator(name=kind, memory_bytes=None, half_flops=None, fp32_flops=None)
    return shape.model_copy(update={"accelerator": card or match_accelerator(kind) or unknown})


def _ask_accelerator(node_ids: Sequence[str]) -> Accelerator | None:
    """What the drivers of these nodes say of their cards, the least of all; None where none answers in time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def ask(node_id: str) -> Any:
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(find_cards).remote()

    asked = [ask(node_id) for node_id in node_ids]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=CARDS_SECONDS)
    cards: list[Card] = []
    for answer in answered:
        with suppress(ray.exceptions.RayError):  # a node that went away, or whose environment lacks dray
            cards += ray.get(answer)
    return make_accelerator(cards) if cards else None


def _can_hold(resources: Mapping[str, float], cpus_per_worker: float, gpus_per_worker: int) -> bool:
    return resources.get("CPU", 0.0) >= cpus_per_worker and resources.get("GPU", 0.0) >= gpus_per_worker


def find_lost_nodes(node_ids: Collection[str]) -> list[str]:
    """Those of the nodes that are dead, or on which no Ray answers: Ray itself takes half a minute to be sure."""
    import ray

    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    return sorted(node_id for node_id in node_ids if (node := nodes.get(node_id)) is None
                  or not _answers(node["NodeManagerAddress"], node["NodeManagerPort"]))


def find_nodes_without(sees: Callable[[], bool], cpus_per_worker: float, gpus_per_worker: int) -> list[str]:
    """Addresses of the nodes that may hold a rank, and on which `sees()` is false; of a cluster of one node nobody is
    asked. A node that gives no answer is left to find out itself."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()
             if node["Alive"] and node["NodeID"] != here
             and _can_hold(node["Resources"], cpus_per_worker, gpus_per_worker)}

    def look() -> bool:
        return sees()

    task = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(): address
             for node_id, address in nodes.items()}
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=SIGHT_SECONDS) if asked else ([], [])
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
    return not _answers(host, int(port))


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def max_wait_seconds() -> float:
    """How long a run waits for a worker group that cannot start, e.g. for a node that went away, before it fails."""
    from ray.train.v2._internal import constants

    seconds = os.environ.get(constants.WORKER_GROUP_START_TIMEOUT_S_ENV_VAR)
    return MAX_GROUP_STARTS * float(seconds or constants.DEFAULT_WORKER_GROUP_START_TIMEOUT_S)


def run_workers(
    work: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    *,
    datasets: dict[str, Any],
    data_config: Any,
    num_workers: int | tuple[int, int],
    cpus_per_worker: float,
    gpus_per_worker: int,
    recovery: Any,
    name: str,
    scratch: str,
    is_local: bool,
) -> None:
    """Run `work(config)` on a group of Ray Train workers until it ends. Raises RunFailed with the workers' errors.

    The group starts anew for as long as `recovery`, a callback of Ray Train's controller, does not object. `scratch` is
    a local folder for Ray Train's own notes, which dray does not read. `is_local`: Ray ends with this process.
    """
    import ray
    from ray.exceptions import RayActorError
    from ray.train import BackendConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.backend import Backend
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    class Trainer(DataParallelTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            if not is_local:
                return list(callbacks)
            # It frees what a controller that was killed leaves on a cluster; here all ends with the driver.
            return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]

    # The workers make their process group themselves: Ray's torch backend would import torch here and in its
    # controller.
    class SharedDevices(Backend):  # type: ignore[misc]
        share_cuda_visible_devices = True

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(note_in_this_process)  # in the main thread, which alone may handle signals

    class Processes(BackendConfig):  # type: ignore[misc]
        backend_cls = SharedDevices

    resources: dict[str, float] = {"CPU": cpus_per_worker}
    if gpus_per_worker:
        resources["GPU"] = gpus_per_worker
    forked = fork_environment(_server_of_ranks(gpus_per_worker), ray.get_runtime_context().runtime_env)
    trainer = Trainer(
        work,
        train_loop_config=config,
        datasets=datasets,
        dataset_config=data_config,
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=bool(gpus_per_worker),
                                     resources_per_worker=resources,
                                     elastic_resize_monitor_interval_s=RESIZE_SECONDS),
        backend_config=Processes(),
        run_config=RunConfig(
            name=name, storage_path=scratch, callbacks=[recovery],
            worker_runtime_env={"env_vars": HEAP_ENVIRONMENT, **forked},
            failure_config=FailureConfig(max_failures=-1, max_preemption_failures=-1,
                                         controller_failure_limit=-1)),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise RunFailed(f"the workers failed: {_root_cause(error)}") from error
    except RayActorError as error:  # Ray never restarts it, and the workers end with it
        raise RunFailed(f"Ray Train's controller was lost: {str(error).partition(chr(10))[0]}") from error


def _root_cause(error: BaseException) -> str:
    """The last line of the first worker's traceback: what a person wants to read first."""
    failures = getattr(error, "worker_failures", None) or {}
    first = next((failures[rank] for rank in sorted(failures)), error)
    lines = [line for line in str(first).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else repr(first)


def _silence_ray_data() -> None:
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
