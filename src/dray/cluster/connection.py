"""Connecting to a cluster, or to a Ray on this machine that ends with this process."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dray.cluster.local_ray import authenticated, local_ray
from dray.cluster.nodes import answers, live_shape
from dray.cluster.workers import fork_environment, server_of_ranks
from dray.errors import PlanError
from dray.plan import Shape, local_shape
from dray.processes.signals import kept_handlers
from dray.redaction import forget_shared_credentials, share_credentials

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
def connect(
    address: str | None,
    *,
    num_cpus: float,
    cpus_per_worker: float = 0.0,
    gpus_per_worker: int = 0,
    verbose: bool = False,
) -> Iterator[Connection]:
    """Connect to `address` (or RAY_ADDRESS), else start a local Ray with at least `num_cpus`
    logical CPUs.

    Of a cluster only nodes that can hold a worker count: a head is often smaller, or has neither
    CPUs nor GPUs. A local Ray is oversubscribed on purpose: on a laptop two workers and a reader
    share two cores. Raises PlanError when the address does not answer.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if not ray.is_initialized():
        address = _find_cluster(address or os.environ.get("RAY_ADDRESS"))
    threading.Thread(
        target=importlib.import_module, args=("ray.train",), daemon=True
    ).start()  # while Ray starts
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
    submitted = (
        json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    )
    light = fork_environment(
        f"light:{server_of_ranks(gpus_per_worker)}" if cpus_per_worker else "light", submitted
    )
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


def _find_cluster(address: str | None) -> str | None:
    """The address, once something listens there: Ray itself would ask for many minutes. Raises
    PlanError."""
    if address == "auto":  # the cluster that was started last on this machine, which may have ended
        from ray._private.services import canonicalize_bootstrap_address

        address = canonicalize_bootstrap_address("auto") or address
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if address and port.isdigit() and not answers(host, int(port)):
        raise _no_answer(address)
    return address


def _no_answer(address: str) -> PlanError:
    return PlanError(
        "--address", f"no Ray cluster answers at {address}", way_out="ray start --head"
    )


def _silence_ray_data() -> None:
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
