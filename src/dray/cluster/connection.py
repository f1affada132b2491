"""Connecting to a cluster, or to a Ray on this machine that ends with this process."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from dray.cluster.local_ray import authenticated, command_without_secrets, local_ray
from dray.cluster.needs import Needs
from dray.cluster.nodes import answers, check_address, check_connected, live_shape, no_answer
from dray.cluster.workers import fork_environment, server_of_ranks
from dray.errors import PlanError
from dray.plan import Shape, local_shape
from dray.processes.signals import kept_handlers
from dray.redaction import forget_shared_credentials, share_credentials

_QUIET = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_DEDUP_LOGS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}

NO_WORKER = Needs()


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
    worker: Needs = NO_WORKER,
    num_workers: int = 1,
    verbose: bool = False,
) -> Iterator[Connection]:
    """Connect to `address` (or RAY_ADDRESS), else start a local Ray with at least `num_cpus`
    logical CPUs. Inside another such block, of this thread or of another one, or where Ray is
    connected anyhow, that Ray is used; the last block that uses one of dray's own ends it.

    Of a cluster only nodes that can hold a worker count: a head is often smaller, or has neither
    CPUs nor GPUs. A local Ray is oversubscribed on purpose: on a laptop two workers and a reader
    share two cores. Raises PlanError when the address does not answer, or no node has the GPU or
    the labels that a worker asks for.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    with _shared.lock:
        begun = not ray.is_initialized()
        if begun:
            _shared.start(
                _connected(
                    _find_cluster(address or os.environ.get("RAY_ADDRESS")),
                    num_cpus=num_cpus,
                    worker=worker,
                    verbose=verbose,
                )
            )
        else:  # of a notebook, a test or a larger program: theirs to end, if it is not dray's own
            share_credentials()
        _shared.users += 1
        is_local = _shared.is_local
    with ExitStack() as stack:
        stack.push(_shared.leave)
        has = ray.cluster_resources().get("CPU", 0.0) if is_local and not begun else math.inf
        if has < num_cpus:
            raise PlanError(
                "Ray",
                f"the one that this process has started has {has:g} CPUs",
                f"this needs {num_cpus:g}, and they share it: the first one's size holds for all",
                "start the largest first, or call ray.init(num_cpus=…) before",
            )
        check_connected(worker)
        shape = local_shape() if is_local else live_shape(worker, num_workers)
        yield Connection(local=is_local, shape=shape)


class _Shared:
    """The Ray that `connect` has started or connected to, and who uses it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.users = 0
        self.is_local = False
        self._until_the_last = ExitStack()
        self._failure: BaseException | None = None
        self._thread: ThreadPoolExecutor | None = None

    def start(self, connected: AbstractContextManager[bool]) -> None:
        """Begin what the last user ends. Ray's processes end with the very thread that started
        them, which must live for as long as they are used."""
        if threading.current_thread() is not threading.main_thread():
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        with ExitStack() as undo:
            undo.callback(self._end_thread)
            self.is_local = self._call(self._until_the_last.enter_context, connected)
            undo.pop_all()

    def leave(self, kind: object, error: BaseException | None, trace: object) -> None:
        """The last one who leaves ends what was started, if anything was, for the error that the
        first of them ended with."""
        with self.lock:
            self.users -= 1
            self._failure = self._failure or error
            if self.users:
                return
            error, self._failure, self.is_local = self._failure, None, False
            self._call(
                self._until_the_last.__exit__, None if error is None else type(error), error, None
            )
            self._end_thread()

    def _end_thread(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
        self._thread = None

    def _call(self, function: Callable[..., Any], *values: Any) -> Any:
        return (
            function(*values)
            if self._thread is None
            else self._thread.submit(function, *values).result()
        )


_shared = _Shared()


@contextmanager
def _connected(
    address: str | None,
    *,
    num_cpus: float,
    worker: Needs,
    verbose: bool,
) -> Iterator[bool]:
    """Ray for as long as the block runs; whether it is a local one."""
    import ray

    threading.Thread(
        target=importlib.import_module, args=("ray.train",), daemon=True
    ).start()  # while Ray starts
    level = logging.INFO if verbose else logging.CRITICAL  # a dead worker is told by the diagnosis
    if not verbose:
        _silence_ray_data()
    # `ray job submit` hands the job's environment on in this variable.
    submitted = (
        json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    )
    light = fork_environment(
        f"light:{server_of_ranks(worker.gpus)}" if worker.resources else "light", submitted
    )
    options = {"log_to_driver": verbose, "logging_level": level, "runtime_env": light}
    if not address:
        num_cpus = max(os.cpu_count() or 1, math.ceil(num_cpus))
        with local_ray(num_cpus=num_cpus, include_dashboard=verbose, **options):
            share_credentials()
            try:
                yield True
            finally:
                forget_shared_credentials()
        return
    with authenticated(address):
        try:
            with kept_handlers(), command_without_secrets():
                ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise no_answer(address) from error
        share_credentials()
        try:
            yield False
        finally:
            forget_shared_credentials()
            ray.shutdown()


def _find_cluster(address: str | None) -> str | None:
    """The address, once something listens there: Ray itself would ask for many minutes. Raises
    PlanError."""
    if address:
        check_address(address)
    if address == "auto":  # the cluster that was started last on this machine, which may have ended
        from ray._private.services import canonicalize_bootstrap_address

        address = canonicalize_bootstrap_address("auto") or address
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if address and port.isdigit() and not answers(host, int(port)):
        raise no_answer(address)
    return address


def _silence_ray_data() -> None:
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
