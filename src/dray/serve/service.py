"""The one place that speaks to Ray Serve: a gateway that answers HTTP, and replicas that hold
models.

Each model is a deployment of its own behind a handle. Those that `dray serve` starts are
applications of their own, which the gateway knows by its configuration (`Gateway.reconfigure`), so
that models come and go while it answers; a manifest of KubeRay's has all in one application.
"""

# No annotations as strings here: Ray Serve takes copies of classes.
import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)
from starlette.types import ASGIApp

from dray.corpus.redacting import make_redactor
from dray.errors import PlanError, RunFailed, SpecError
from dray.feedback import Dataset
from dray.plan.machine import free_memory_bytes
from dray.serve.api import make_api
from dray.serve.events import Event, joined
from dray.serve.held_keys import Ring, has_keys
from dray.serve.keeping import NOTHING_KEPT, Keeping
from dray.serve.keys import OneKey, is_local, read_key
from dray.serve.limits import Bodies, Limits
from dray.serve.observing import observe
from dray.serve.recalling import Recall
from dray.serve.request_log import Logged
from dray.serve.routing import Full, Lost, Router
from dray.serve.schemas import Card
from dray.serve.served import Served, check_names
from dray.serve.shares import Plan, Versioned
from dray.serve.tls import Tls
from dray.spec import Redaction, as_redaction

MAX_BATCH, WAIT_SECONDS = 32, 0.01
"""Requests that are predicted together at most, and how long the first of them waits for others."""
ONGOING_WANTED = 8
"""Requests of a replica beyond which there are to be more replicas, where there may be."""
MAX_ONGOING = 200
"""Requests that a replica works on; how many of them write is its engine's to say."""
FLUSH_SECONDS = 1.0
"""In which Ray's proxy gives out what it has of answers that are whole."""
GATEWAY = "gateway"
"""The application of the gateway, where it is one of its own."""


class Model:
    """A replica: one model, in a process of its own. Raises UserError as it starts for what cannot
    be served."""

    def __init__(self, served: Served, limits: Limits) -> None:
        import torch

        from dray.serve.answering import Answerer
        from dray.serve.loading import load_served

        cpus = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0))
        if cpus:
            torch.set_num_threads(cpus)
        loaded = load_served(served)
        self._answerer = Answerer(loaded, limits, free_bytes=free_memory_bytes())

    async def card(self) -> dict[str, Any]:
        """What it is."""
        return self._answerer.card()

    async def write(self, kind: str, body: dict[str, Any]) -> Event:
        """A whole answer."""
        return joined([event async for event in self._answerer.write(kind, body)])

    async def stream(self, kind: str, body: dict[str, Any]) -> AsyncIterator[Event]:
        """An answer piece by piece."""
        async for event in self._answerer.write(kind, body):
            yield event

    @serve.batch(  # type: ignore[untyped-decorator]
        max_batch_size=MAX_BATCH, batch_wait_timeout_s=WAIT_SECONDS
    )
    async def predict(
        self, requests: Sequence[Sequence[Mapping[str, Any]]]
    ) -> list[list[dict[str, Any]]]:
        """A prediction of each record of each request."""
        records = [record for request in requests for record in request]
        # One batch at a time: Serve waits for this one before it calls again.
        found = iter(await asyncio.to_thread(self._answerer.predict, records))
        return [[next(found) for _ in request] for request in requests]

    async def reference(self) -> list[dict[str, Any]]:
        """What its drift is measured from."""
        return await asyncio.to_thread(self._answerer.reference)

    def check_health(self) -> None:
        """Raises where it can answer no more: Serve puts another replica in its place."""
        self._answerer.check()


class _Handle:
    """A target of the router's: the replicas behind a handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def card(self) -> Card:
        return Card.model_validate(await self._call("card"))

    async def write(self, kind: str, body: dict[str, Any]) -> Event:
        found: Event = await self._call("write", kind, body)
        return found

    async def predict(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = await self._call("predict", records)
        return found

    async def reference(self, version: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = await self._call("reference")
        return found

    async def stream(self, kind: str, body: dict[str, Any]) -> AsyncIterator[Event]:
        with _told():
            events = self._handle.options(stream=True).stream.remote(kind, body)
            try:
                async for event in events:
                    yield event
            finally:
                events.cancel()

    async def _call(self, name: str, *inputs: Any) -> Any:
        with _told():
            response = getattr(self._handle, name).remote(*inputs)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise


@contextmanager
def _told() -> Iterator[None]:
    """Ray's errors as the router knows them: what a replica itself raises passes."""
    try:
        yield
    except BackPressureError as error:
        raise Full from error
    except (DeploymentUnavailableError, ReplicaUnavailableError) as error:
        raise Lost from error
    except RayTaskError:
        raise
    except TaskCancelledError as error:
        raise Lost from error
    except RayError as error:  # of an actor, a worker, a node or an object that is gone
        raise Lost from error


@serve.ingress()
class Gateway:
    """Answers HTTP. Raises SpecError as it starts without a key."""

    def __init__(
        self,
        handles: Mapping[str, Any],
        limits: Limits,
        storage: str | None = None,
        keeping: Keeping = NOTHING_KEPT,
    ) -> None:
        self._models: dict[str, Versioned] = {}
        for name, handle in handles.items():
            self._versioned(name).follow(Plan(1), {1: _Handle(handle)})
        self._router = Router(self._models, limits)
        held = storage is not None and has_keys(storage)
        key = read_key(held)
        # A service that asks for a key also takes those that are made later.
        ring = Ring(storage) if storage is not None and (key or held) else None
        self._keys, self._bodies = OneKey(key, ring, local=is_local()), Bodies(limits)
        self._keeping = keeping
        self._recall = _recall(storage, keeping.feedback)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        observer = observe(
            self._router,
            self._agreements,
            self._keeping.logged,
            self._recall,
            self._keeping.redactor,
        )
        return make_api(self._router, self._keys, self._bodies, observer)

    def _agreements(self) -> dict[str, Mapping[str, int]]:
        return {name: model.agreement for name, model in self._models.items()}

    async def drain(self, seconds: float) -> int:
        """Take in nothing more; how many requests are left after so many seconds."""
        return await self._bodies.drain(seconds)

    def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Which models there are, by name, which of a model's versions work, and which are loaded
        (`following.py`). Requests that are under way keep the replicas that they have, and go to
        those that work now where these are gone."""
        models = config.get("models") or {}
        for name, told in models.items():
            targets = {
                version: _Handle(serve.get_app_handle(version_application(name, version)))
                for version in told["loaded"]
            }
            plan = {key: told[key] for key in ("stable", "canary", "share", "shadow")}
            self._versioned(name).follow(Plan(**plan), targets)
        self._models = {name: self._models[name] for name in models}
        self._router.set_targets(self._models)

    def _versioned(self, name: str) -> Versioned:
        return self._models.setdefault(name, Versioned(name))


def scaling(least: int, most: int) -> dict[str, Any]:
    """How many replicas a model has, for Serve: always so many, or by what they are asked."""
    if least == most:
        return {"num_replicas": most}
    autoscaling = {
        "min_replicas": least,
        "initial_replicas": least,
        "max_replicas": most,
        "target_ongoing_requests": ONGOING_WANTED,
        "upscale_delay_s": 10.0,
        "downscale_delay_s": 300.0,
    }
    return {"autoscaling_config": autoscaling}


def model_deployment(served: Served, limits: Limits, name: str = "model", **options: Any) -> Any:
    """A model's replicas, bound to what they hold. `options`: of Serve's deployment."""
    deployment = serve.deployment(
        Model,
        name=name,
        max_constructor_retry_count=2,  # what cannot be read now is not there in a minute either
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=MAX_ONGOING,
        graceful_shutdown_timeout_s=limits.request_seconds + 10,
        **options,
    )
    return deployment.bind(served, limits)


def gateway_deployment(
    handles: Mapping[str, Any],
    limits: Limits,
    storage: str | None = None,
    keeping: Keeping = NOTHING_KEPT,
    **options: Any,
) -> Any:
    """The gateway before some models. `storage`: where its keys lie, beside that of the
    environment, and what it keeps of feedback. There is one: what it counts is of all requests."""
    deployment = serve.deployment(
        Gateway,
        name="gateway",
        max_ongoing_requests=limits.requests,
        graceful_shutdown_timeout_s=limits.request_seconds + 15,
        ray_actor_options={"num_cpus": 0},
        **options,
    )
    return deployment.bind(handles, limits, storage, keeping)


def application(arguments: Mapping[str, Any]) -> serve.Application:
    """What Ray Serve builds from its configuration's `args`: the fields of `Served`, or `models`
    with a list of such; `limits`, `log` with the fields of `Logged`, `feedback`, a dataset's name,
    and `redact`, which is true or has the fields of `Redaction`. Keys that `dray serve key` has
    made in the models' storage are taken, if it is one. Raises SpecError for what these do not
    have."""
    try:
        given = dict(arguments)
        limits = Limits.model_validate(given.pop("limits", {}))
        log = given.pop("log", None)
        logged = None if log is None else Logged.model_validate(log)
        feedback = given.pop("feedback", None)
        redact = as_redaction(given.pop("redact", None))
        redactor = make_redactor(redact and Redaction.model_validate(redact), "args.redact")
        several = given.pop("models", None)
        if several is None:
            models = [Served.model_validate(given)]
        else:
            models = [Served.model_validate({**given, **model}) for model in several]
    except ValidationError as error:
        first = error.errors()[0]
        # Of a model as a whole it is wrong that it names none.
        where = ".".join(map(str, ("args", *(first["loc"][:1] or ("run",)))))
        known = f"args are {', '.join(Served.model_fields)}, models, limits, log, feedback, redact"
        raise SpecError(where, first["msg"], known) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise SpecError("args", f"is no mapping ({error})", "args are fields of a model") from error
    names = check_names(models)
    if len(models) == 1:
        handles = {names[0]: model_deployment(models[0], limits)}
    else:
        handles = {
            name: model_deployment(model, limits, f"model-{name}")
            for name, model in zip(names, models, strict=True)
        }
    storages = {model.storage for model in models} - {None}
    keys_of = storages.pop() if len(storages) == 1 else None
    _recall(keys_of, feedback)  # raises here, not in a process of its own
    return gateway_deployment(handles, limits, keys_of, Keeping(logged, feedback, redactor))


def _recall(storage: str | None, feedback: Any) -> Recall | None:
    """Of answers that people may say something of, into a dataset of the storage. Raises
    SpecError."""
    if feedback is None:
        return None
    if storage is None:
        raise SpecError("feedback", "has no storage", "it is kept in that of the models' runs")
    return Recall(Dataset(storage, str(feedback)))


# --- dray serve ----------------------------------------------------------------------------------


def start(host: str, port: int, limits: Limits, *, verbose: bool, tls: Tls | None = None) -> None:
    """Start Ray Serve on the connected Ray. Raises PlanError where one runs that has other
    applications: it has one address, and one set of paths, for all of them."""
    if others := _applications():
        raise PlanError(
            "dray serve",
            f"Ray Serve runs on this cluster already, with {', '.join(sorted(others)[:8])}",
            "all applications of a cluster share its address, port and certificate",
            "end those, name another cluster, or add yours to their configuration "
            "(cluster/kuberay/rayservice.yaml has one)",
        )
    if not verbose:
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
    http = {
        "host": host,
        "port": port,
        "request_timeout_s": limits.request_seconds + 30,
        "keep_alive_timeout_s": 30,
        **({} if tls is None else {"ssl_keyfile": tls.key, "ssl_certfile": tls.certificate}),
    }
    serve.start(proxy_location="HeadOnly", http_options=http)


def version_application(name: str, version: int) -> str:
    """The application of a version."""
    return f"model-{name}-v{version}"


class Versions:
    """What runs versions, for a follower: each is an application of its own."""

    def __init__(
        self,
        limits: Limits,
        storage: str,
        keeping: Keeping = NOTHING_KEPT,
        *,
        replicas: tuple[int, int] = (1, 1),
        **options: Any,
    ) -> None:
        self._limits, self._storage, self._keeping = limits, storage, keeping
        self._options = {**scaling(*replicas), **options}

    def load(self, name: str, version: int, served: Served) -> None:
        """Raises RunFailed, with nothing left of it."""
        deployed = model_deployment(served, self._limits, **self._options)
        application = version_application(name, version)
        try:
            _deployed([serve.RunTarget(deployed, name=application, route_prefix=None)])
        except RunFailed:
            serve.delete(application, _blocking=False)
            raise

    def route(self, models: Mapping[str, Mapping[str, Any]]) -> None:
        """The gateway begins, or is told."""
        run_gateway(models, self._limits, self._storage, self._keeping)

    def drop(self, name: str, version: int) -> None:
        """Its requests end first."""
        serve.delete(version_application(name, version), _blocking=False)


def run_gateway(
    models: Mapping[str, Mapping[str, Any]],
    limits: Limits,
    storage: str | None = None,
    keeping: Keeping = NOTHING_KEPT,
) -> None:
    """Start the gateway before them, or tell the one that runs which models there are now."""
    config = {"models": dict(models)}
    gateway = gateway_deployment({}, limits, storage, keeping, user_config=config)
    _deployed([serve.RunTarget(gateway, name=GATEWAY, route_prefix="/")])


def _deployed(targets: Sequence[Any]) -> None:
    try:
        serve.run_many(targets)
    except RuntimeError as error:
        raise RunFailed("the service did not start", _why(str(error))) from error


def _why(text: str) -> str:
    """The end of what Serve tells, which has the replica's own error."""
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-8:])


def drain(seconds: float) -> int:
    """Let requests end, and take in no more; how many are left after so many seconds."""
    with suppress(RayError, RayServeException):
        left: int = serve.get_app_handle(GATEWAY).drain.remote(seconds).result()
        time.sleep(FLUSH_SECONDS)
        return left
    return 0


def _applications() -> set[str]:
    """Names of the applications of the connected Ray; none where Serve does not run."""
    with suppress(RayError, RayServeException):
        return set(serve.status().applications)
    return set()


def stop() -> None:
    """End all replicas, and Serve: `start` has made sure that nobody else has anything there."""
    with suppress(RayError, RayServeException):
        serve.shutdown()
