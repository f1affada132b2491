"""`dray serve` from its start to its end: in the foreground until it is told to stop, then every
request ends before the models do.

Without a key only loopback is served.
"""

from __future__ import annotations

import ipaddress
import json
import os
import ssl
import time
from collections.abc import Callable, Sequence
from http.client import HTTPException
from urllib.parse import quote
from urllib.request import urlopen

from dray.cluster.connection import connect
from dray.cluster.nodes import answers
from dray.corpus.redacting import Redactor
from dray.errors import PlanError, SpecError, StoreError
from dray.feedback import Dataset
from dray.processes.imports import require_package
from dray.processes.signals import Wishes, stops
from dray.release.export.manifest import is_export
from dray.runs import Run, choose_checkpoint
from dray.serve.following import POLL_SECONDS, Follower
from dray.serve.held_keys import has_keys
from dray.serve.keeping import Keeping
from dray.serve.keys import KEY, LOCAL, OPEN
from dray.serve.limits import Limits
from dray.serve.pinning import check_pinned, check_sound, pin
from dray.serve.request_log import Logged, check_log
from dray.serve.served import Served, check_names
from dray.serve.tls import Tls
from dray.serve.versions import Record
from dray.storage.filesystem import absolute


def serve_models(
    models: Sequence[Served],
    *,
    host: str,
    port: int,
    replicas: tuple[int, int],
    address: str | None,
    verbose: bool,
    limits: Limits,
    storage: str,
    say: Callable[[str], None],
    tls: Tls | None = None,
    logged: Logged | None = None,
    feedback: str | None = None,
    redactor: Redactor | None = None,
) -> None:
    """Serve until a signal comes, and follow what is promoted meanwhile. `replicas`: the fewest and
    the most of each model. `storage`: where keys and versions lie. `tls`: for HTTPS. `logged`:
    where requests are logged, if they are. `feedback`: the dataset of the storage that keeps what
    people say of answers, if they may. `redactor`: what takes personal data out of requests. Raises
    UserError for what cannot be served, and RunFailed where the service does not start."""
    least, most = replicas
    if not 0 < port < 65_536:
        raise SpecError("dray serve", f"--port {port}", "a port is 1 to 65535")
    if not 0 < least <= most:
        raise SpecError(
            "dray serve", f"--replicas {least}-{most}", "1 or more, the fewest first", "e.g. 1-4"
        )
    check_names(models)
    check_installed()
    storage = absolute(storage)
    check_open(host, storage)
    for model in models:
        _check_there(model, say)
    if not address and is_taken(host, port):
        raise PlanError(f"--port {port}", "somebody answers there already", "", "name another one")
    _check_kept(None if address else logged, storage, feedback)
    _warn(host, tls, logged, redactor, say)
    records = check_records(models, storage)
    with stops(noted=True) as wishes:
        cores = os.cpu_count() or 1
        num_replicas = most * len(models)
        cpus = max(1, cores // num_replicas)
        _set_environment()
        # Beside what answers, there may be what answered before, and what is to answer.
        needed = 3 * cpus * num_replicas
        with connect(address, num_cpus=needed, verbose=verbose) as connection:
            from dray.serve import service

            if connection.local:  # they share one machine's memory
                share = limits.memory_share / (3 * num_replicas)
                limits = limits.model_copy(update={"memory_share": share})
            gpus = 1 if connection.shape.accelerator is not None else 0
            say("starting: the service answers once its models are read")
            service.start(host, port, limits, verbose=verbose, tls=tls)
            follower = None
            try:
                for record, model in records:
                    record.begin(model)
                options = {"num_cpus": cpus, **({"num_gpus": gpus} if gpus else {})}
                versions = service.Versions(
                    limits,
                    storage,
                    Keeping(logged, feedback, redactor),
                    replicas=replicas,
                    ray_actor_options=options,
                )
                follower = Follower([record for record, _ in records], versions, say)
                follower.begin()
                names = ", ".join(record.name for record, _ in records)
                scheme = "http" if tls is None else "https"
                say(f"{scheme}://{host}:{port} answers for {names}; Ctrl-C ends it")
                _wait(wishes, follower)
                say("stopping: requests that are under way end first; Ctrl-C again ends them")
                if left := service.drain(limits.request_seconds):
                    say(f"{left} requests did not end in {limits.request_seconds:g} seconds")
            finally:
                service.stop()
                if follower is not None:
                    follower.join()  # while there is a Ray that it can ask


def _check_kept(logged: Logged | None, storage: str, feedback: str | None) -> None:
    """Raise UserError for a log or a dataset that cannot be."""
    if logged is not None:
        check_log(logged)
    if feedback is not None:
        Dataset(storage, feedback)


def _set_environment() -> None:
    """What a Ray of our own is started with."""
    from dray.serve.guard import CALLBACK

    os.environ.setdefault("RAY_worker_niceness", "0")  # a service is no work in the background
    os.environ.setdefault(CALLBACK, "dray.serve.guard:middlewares")
    # A thread that asks a Ray which has ended is to fail, not to wait for another one.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")


def check_installed() -> None:
    """Raise SpecError where what a service is made of is not installed."""
    for package in ("fastapi", "limits", "prometheus_client"):
        require_package(package, "serve", "dray serve")


def is_taken(host: str, port: int) -> bool:
    """Whether somebody listens already where a service is to."""
    return answers("127.0.0.1" if host in ("0.0.0.0", "::") else host, port)


def is_service(place: str) -> bool:
    """Whether what answers at a URL says that it lives as a service of ours does. Nothing secret is
    sent, so that its certificate does not matter."""
    anybody = ssl.create_default_context()
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    try:
        with urlopen(f"{place}/health", timeout=5, context=anybody) as answer:
            return bool(json.loads(answer.read(1000)) == {"status": "live"})
    except (OSError, ValueError, HTTPException):
        return False


def promoted_version(place: str, name: str) -> int | None:
    """The version by which the service at a URL answers for a name; None where it has no such model
    or tells it to those alone who have a key, or where its certificate is not known here."""
    try:
        with urlopen(f"{place}/v1/models/{quote(name, safe='')}", timeout=5) as answer:
            versions = json.loads(answer.read(100_000))["versions"]
        return next(int(one["version"]) for one in versions if one["role"] == "promoted")
    except (OSError, ValueError, KeyError, TypeError, StopIteration, HTTPException):
        return None


def check_records(models: Sequence[Served], storage: str) -> list[tuple[Record, Served]]:
    """Each model with its name's record: one of its versions, where it has some. Those that have
    none get theirs once the service is there. Raises UserError."""
    for model in models:
        check_sound(model)
    found = [(Record(storage, model.called), pin(model)) for model in models]
    for record, model in found:
        state = record.read()
        if state.stable:
            record.begin(model)
            _check_answering(record.name, state.versions[state.stable])
    return found


def _check_answering(name: str, answering: Served) -> None:
    """Raise StoreError where what was promoted is not there any more as it was."""
    try:
        check_sound(answering)
        check_pinned(answering)
    except StoreError as error:
        way_out = f"`dray serve rollback {name}`, or mend it: {error.way_out}"
        raise StoreError(error.where, error.what, error.rule, way_out) from error


def check_open(host: str, storage: str | None = None) -> None:
    """Let all ask on loopback where there is no key. Raises SpecError without one elsewhere."""
    if storage is not None and has_keys(storage):
        return
    if os.environ.get(KEY, "").strip() or os.environ.get(OPEN) == "1":
        return
    if _is_loopback(host):
        os.environ[OPEN] = LOCAL
        return
    raise SpecError(
        f"--host {host}",
        "would let all who reach it ask",
        "a service asks for a key everywhere but on loopback",
        f"`dray serve key create NAME`, or set {KEY}, or {OPEN}=1 if all may",
    )


def warn_of_plain_http(host: str, tls: Tls | None, say: Callable[[str], None]) -> None:
    """Say so where keys and texts go over a network as they are."""
    if tls is None and not _is_loopback(host):
        way = "--tls-cert FILE --tls-key FILE, unless something before it speaks HTTPS"
        say(f"plain HTTP on {host}: whoever is on the way can read keys and texts; {way}")


def _warn(
    host: str,
    tls: Tls | None,
    logged: Logged | None,
    redactor: Redactor | None,
    say: Callable[[str], None],
) -> None:
    """Say what others may come to read."""
    warn_of_plain_http(host, tls, say)
    if logged is not None and logged.bodies and redactor is None:
        what = "the log keeps what is asked and answered as it is, whosoever's data it holds"
        say(f"{what}; --redact mask takes out what can be told by its form")


def _check_there(model: Served, say: Callable[[str], None]) -> None:
    """Raise StoreError where there is no such run or checkpoint, before anything is started."""
    if model.folder is not None and not is_export(model.folder):
        say(f"{model.folder} has no list of its files, so they are served as they are")
    if model.run is not None and model.storage is not None:
        choose_checkpoint(Run.open(model.storage, model.run), model.step)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _wait(wishes: Wishes, follower: Follower) -> None:
    while not wishes:
        time.sleep(POLL_SECONDS)
        follower.look()
    follower.close()
