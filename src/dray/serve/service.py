"""The one place that speaks to Ray Serve: a deployment that holds one run's model.

Requests that come together are predicted together. Whoever asks has the key of `DRAY_SERVE_KEY`, in
the environment of the replicas; without one nothing is served but where `DRAY_OPEN_SERVICE` says
that all may ask.
"""

# No annotations as strings here: FastAPI could not resolve those of a route that Ray Serve copied.
import asyncio
import hmac
import json
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve

from dray.errors import SpecError
from dray.release.predict import Predictor
from dray.release.trained import Weights, open_trained
from dray.spec.sections import RunName

KEY, OPEN = "DRAY_SERVE_KEY", "DRAY_OPEN_SERVICE"
MAX_BODY_BYTES, MAX_RECORDS = 1000**2, 1_000
MAX_BATCH, WAIT_SECONDS = 32, 0.01
"""Requests that are predicted together at most, and how long the first of them waits for others."""

api = FastAPI(title="dray", docs_url=None, redoc_url=None, openapi_url=None)


class Served(BaseModel):
    """What is served."""

    model_config = ConfigDict(extra="forbid")

    storage: Annotated[str, Field(min_length=1)]
    run: RunName
    step: Annotated[int, Field(ge=0, strict=True)] | Literal["best"] | None = None
    """A number, `best`, or nothing for the newest."""
    weights: Weights = "trained"


def read_key() -> bytes:
    """What requests must have; nothing where all may ask. Raises SpecError if neither is said."""
    key = os.environ.get(KEY, "").strip()
    if not key and os.environ.get(OPEN) != "1":
        raise SpecError(
            KEY,
            "is not set",
            "a service asks for a key",
            f"set it in the environment of the cluster's nodes, or {OPEN}=1 to let all ask",
        )
    return key.encode()


async def _read_body(request: Request) -> bytes:
    """Raises HTTPException 413 as soon as it is too long, so that no more of it is kept."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"a request has at most {MAX_BODY_BYTES:,} bytes")
    return bytes(body)


def _read_records(body: bytes) -> list[Mapping[str, Any]]:
    """Raises HTTPException 422 for what is no list of records."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(422, "the body is no JSON") from error
    records = given.get("records") if isinstance(given, dict) else None
    if not isinstance(records, list) or not all(isinstance(item, dict) for item in records):
        raise HTTPException(422, 'the body is {"records": [{…}, …]}')
    if not 0 < len(records) <= MAX_RECORDS:
        raise HTTPException(422, f"a request has 1 to {MAX_RECORDS:,} records")
    return records


# What a route calls stands above: Ray Serve takes a copy of the routes where the class is made.
@serve.ingress(api)
class Service:
    """A replica. Raises UserError as it starts for a run without predictions, and without a key."""

    def __init__(self, served: Served) -> None:
        self._key = read_key()
        trained = open_trained(served.storage, served.run, served.step, served.weights)
        self._predictor = Predictor(trained)
        self._told = {
            "run": served.run,
            "step": trained.checkpoint.step,
            "task": trained.spec.task.name,
            "fields": list(self._predictor.fields),
        }

    @api.get("/health")
    async def health(self) -> dict[str, str]:
        """Answers once the model is loaded; asks for no key."""
        return {"status": "ready"}

    @api.get("/model")
    async def model(self, request: Request) -> dict[str, Any]:
        """What is served."""
        self._admit(request)
        return self._told

    @api.post("/predict")
    async def predict(self, request: Request) -> dict[str, Any]:
        """`{"records": [{field: value}, …]}` → `{"predictions": […]}`, one for each in its order:
        `prediction` with what goes with it, or `error`."""
        self._admit(request)
        return {"predictions": await self._batched(_read_records(await _read_body(request)))}

    def _admit(self, request: Request) -> None:
        """Raise HTTPException 401 for whoever does not have the key."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_it = hmac.compare_digest(given.strip().encode(), self._key)
        if self._key and not (scheme.lower() == "bearer" and is_it):
            raise HTTPException(401, "this service asks for its key: Authorization: Bearer KEY")

    @serve.batch(  # type: ignore[untyped-decorator]
        max_batch_size=MAX_BATCH, batch_wait_timeout_s=WAIT_SECONDS
    )
    async def _batched(
        self, requests: Sequence[Sequence[Mapping[str, Any]]]
    ) -> list[list[dict[str, Any]]]:
        records = [record for request in requests for record in request]
        # One batch at a time: Serve waits for this one before it calls again.
        found = iter(await asyncio.to_thread(self._predictor.predict, records))
        return [[next(found) for _ in request] for request in requests]


def application(arguments: Mapping[str, Any]) -> serve.Application:
    """What Ray Serve builds from its configuration's `args`. Raises SpecError for what `Served`
    does not have."""
    try:
        served = Served.model_validate(arguments)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("args", *first["loc"][:1])))
        known = f"args are {', '.join(Served.model_fields)}"
        raise SpecError(where, first["msg"], known) from error
    deployment = serve.deployment(
        Service,
        name="model",
        max_ongoing_requests=2 * MAX_BATCH,
        max_queued_requests=8 * MAX_BATCH,
    )
    return deployment.bind(served)
