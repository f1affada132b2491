"""The routes: OpenAI's, and dray's own for models that predict; their OpenAPI document.

A request is admitted by its headers, read under limits, checked, and given to the router. Whatever
is no success is an error in OpenAI's form. This file knows neither Ray nor models.
"""

from __future__ import annotations

import asyncio
import base64
import re
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

import dray
from dray.processes.streams import make_json
from dray.serve.answers import Writes, chat_answer, completion_answer
from dray.serve.asked import asked, now_asked
from dray.serve.entrance import Entrance, refused
from dray.serve.keys import FEEDBACK_PATH, METRICS_PATH, OneKey
from dray.serve.limits import Bodies, Body, Limits, read_json
from dray.serve.metering import CONTENT_TYPE, Meter
from dray.serve.observing import OPEN_PATHS, Observer, observe
from dray.serve.page import add_page
from dray.serve.recalling import Recall
from dray.serve.redacting import redact_asked
from dray.serve.refusals import Refusal
from dray.serve.routing import Router
from dray.serve.schemas import (
    Card,
    Cards,
    Chat,
    ChatRequest,
    ClassifyRequest,
    Completion,
    CompletionRequest,
    EmbeddingRequest,
    Embeddings,
    ErrorAnswer,
    ExtractRequest,
    FeedbackKept,
    FeedbackRequest,
    Predictions,
    PredictRequest,
    Sampled,
    Status,
)
from dray.serve.shares import split_version

Read = TypeVar("Read", bound=BaseModel)


def make_api(
    router: Router, keys: OneKey, bodies: Bodies, observer: Observer | None = None
) -> ASGIApp:
    """The application. `bodies` counts its requests, and has its limits; `observer` hears of each
    of them."""
    limits, observer = bodies.limits, observer or observe(router)
    api = FastAPI(
        title="dray",
        version=dray.__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        responses={"default": {"model": ErrorAnswer, "description": "Refused"}},
    )
    _add_errors(api)
    add_page(api)
    recalls = observer.recall is not None
    _add_told(api, router, recalls)
    _add_metrics(api, router, observer.meter)
    _add_writing(api, router, recalls)
    _add_predicting(api, router, limits, recalls)
    if observer.recall is not None:
        _add_feedback(api, observer.recall, limits)
    api.openapi = lambda: _openapi(api)  # type: ignore[method-assign]
    routes = [str(getattr(route, "path", "")) for route in api.routes]
    return Entrance(api, keys, bodies, observer, routes)


def _add_errors(api: FastAPI) -> None:
    """All errors in OpenAI's form."""

    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return refused(error)

    async def refuse_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = {404: "there is no such path", 405: "this path has no such method"}
        refusal = Refusal(error.status_code, what.get(error.status_code, str(error.detail)))
        response = refused(refusal)
        response.headers.update(error.headers or {})
        return response

    async def refuse_unforeseen(_: Request, error: Exception) -> Response:
        return refused(Refusal(500, f"this was not foreseen ({type(error).__name__})"))

    api.add_exception_handler(Refusal, refuse)
    api.add_exception_handler(HTTPException, refuse_http)
    api.add_exception_handler(Exception, refuse_unforeseen)


async def _read(request: Request, kind: type[Read], limits: Limits) -> Read:
    """The body as one of the kind. Raises Refusal."""
    # Whatever else a page of somebody's could send to an open service on this machine unasked.
    given = request.headers.get("content-type", "").partition(";")[0].strip()
    if given.lower() != "application/json":
        what = f"a body is application/json, not {given[:80]!r}"
        raise Refusal(415, what, code="wrong_content_type")
    body: Body = request.scope["dray_body"]
    tree = read_json(await body.read(request.stream()), limits)
    if isinstance(tree, dict) and isinstance(tree.get("model"), str):
        tree["model"], asked.get().wanted = split_version(tree["model"])
    if (redactor := request.scope["dray_redactor"]) is not None:
        asked.get().redacted = await redact_asked(tree, redactor)
    try:
        found: Read = kind.model_validate(tree)
    except ValidationError as error:
        raise _no_such(error) from None
    asked.get().user = getattr(found, "user", None)
    return found


def _no_such(error: ValidationError) -> Refusal:
    """The first thing that is wrong with a body: of alternatives, the one that came furthest."""
    first = max(error.errors(include_url=False), key=lambda item: len(item["loc"]))
    where = [str(part) for part in first["loc"] if not _is_alternative(part)]
    path = ".".join(where)[:200]
    return Refusal(400, f"{path or 'the body'}: {first['msg']}", param=path or None, code="invalid")


def _is_alternative(part: Any) -> bool:
    """Whether a part of a place is pydantic's name of a kind, not a field's."""
    return (isinstance(part, str) and not re.fullmatch(r"[a-z_]+", part)) or part in ("str", "int")


def _with_body(kind: type[BaseModel]) -> dict[str, Any]:
    """What the OpenAPI document says of a body that dray reads itself."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


BODIES: tuple[type[BaseModel], ...] = (
    CompletionRequest,
    ChatRequest,
    EmbeddingRequest,
    ClassifyRequest,
    ExtractRequest,
    PredictRequest,
    FeedbackRequest,
)


def _openapi(api: FastAPI) -> dict[str, Any]:
    if api.openapi_schema is None:
        document = get_openapi(
            title=api.title, version=api.version, routes=api.routes, summary="Models that answer"
        )
        components = document.setdefault("components", {})
        kinds = components.setdefault("schemas", {})
        paths = document["paths"]
        for kind in (
            kind for kind in BODIES if kind is not FeedbackRequest or FEEDBACK_PATH in paths
        ):
            schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
            kinds |= schema.pop("$defs", {}) | {kind.__name__: schema}
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in document["paths"].items():
            for operation in methods.values():
                operation["security"] = [] if path in OPEN_PATHS else [{"key": []}]
        api.openapi_schema = document
    return api.openapi_schema


# --- what is told of the service -----------------------------------------------------------------


def _add_told(api: FastAPI, router: Router, recalls: bool) -> None:
    def told(card: Card) -> Card:
        return card.model_copy(update={"feedback": recalls})

    @api.get("/health", tags=["service"])
    async def health() -> Status:
        """Whether the service lives; asks for no key."""
        return Status(status="live")

    @api.get("/ready", tags=["service"])
    async def ready() -> Status:
        """Whether every model has a replica that answers; 503 until then. Asks for no key."""
        if not await router.is_ready():
            raise Refusal(503, "not every model has a replica yet", code="starting", retry_after=2)
        return Status(status="ready")

    @api.get("/openapi.json", include_in_schema=False)
    async def document() -> Response:
        return JSONResponse(api.openapi())

    @api.get("/v1/models", tags=["models"])
    async def models() -> Cards:
        """All models, with what each answers to."""
        return Cards(data=[told(card) for card in await router.cards()])

    @api.get("/v1/models/{model}", tags=["models"])
    async def model(model: str) -> Card:
        """One of them."""
        router.choose(model)
        return told(next(card for card in await router.cards() if card.id == model))


def _add_metrics(api: FastAPI, router: Router, meter: Meter) -> None:
    @api.get(METRICS_PATH, include_in_schema=False)
    async def metrics() -> Response:
        """As Prometheus reads them."""
        return Response(meter.text(await router.readiness()), media_type=CONTENT_TYPE)


# --- models that write ---------------------------------------------------------------------------


def _add_writing(api: FastAPI, router: Router, recalls: bool) -> None:
    async def answer(request: Request, kind: type[Sampled], make: Writes) -> Response:
        asked = await _read(request, kind, router.limits)
        body = asked.model_dump(exclude_none=True)
        if recalls:
            now_asked().records = _written_records(body)
        writes = make(asked)
        async with _timed(router.limits):
            if not asked.stream:
                found = await router.write(asked.model, writes.kind, body)
                return JSONResponse(writes.whole(found))
            events = router.stream(asked.model, writes.kind, body)
            first = await anext(events)  # what is refused is refused with its status
        return StreamingResponse(
            _lines(writes.begin(first), events, writes.piece), media_type="text/event-stream"
        )

    streamed = {"text/event-stream": {"schema": {"type": "string"}}}

    @api.post(
        "/v1/completions",
        tags=["text"],
        response_model=Completion,
        responses={200: {"content": streamed, "description": "Whole, or piece by piece"}},
        openapi_extra=_with_body(CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        """Texts that go on with prompts."""
        return await answer(request, CompletionRequest, completion_answer)

    @api.post(
        "/v1/chat/completions",
        tags=["text"],
        response_model=Chat,
        responses={200: {"content": streamed, "description": "Whole, or piece by piece"}},
        openapi_extra=_with_body(ChatRequest),
    )
    async def chat(request: Request) -> Response:
        """Answers in a conversation."""
        return await answer(request, ChatRequest, chat_answer)


class _timed:
    """The time of a whole request; a little more than its replica gives itself."""

    def __init__(self, limits: Limits) -> None:
        self._seconds = limits.request_seconds
        self._timeout = asyncio.timeout(self._seconds + 5)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            what = f"the answer was not whole in {self._seconds:g} seconds"
            raise Refusal(504, what, code="too_slow") from None


async def _lines(
    first: Sequence[dict[str, Any]],
    events: AsyncIterator[dict[str, Any]],
    make: Callable[[dict[str, Any]], list[dict[str, Any]]],
) -> AsyncIterator[str]:
    """Server-sent events; what goes wrong now is an event, too."""
    try:
        for piece in first:
            yield f"data: {make_json(piece)}\n\n"
        async for event in events:
            for piece in make(event):
                yield f"data: {make_json(piece)}\n\n"
    except Refusal as refusal:
        now_asked().refusal = refusal
        yield f"data: {make_json(refusal.body())}\n\n"
        return
    yield "data: [DONE]\n\n"


# --- what people say of answers -------------------------------------------------------------------


def _add_feedback(api: FastAPI, recall: Recall, limits: Limits) -> None:
    @api.post(
        FEEDBACK_PATH,
        tags=["feedback"],
        response_model=FeedbackKept,
        openapi_extra=_with_body(FeedbackRequest),
    )
    async def feedback(request: Request) -> Response:
        """Say of an answer that you got whether it was right, or what would have been."""
        said = await _read(request, FeedbackRequest, limits)
        entry = await asyncio.to_thread(recall.take, said, request.scope["dray_caller"])
        return JSONResponse({"object": "feedback", "id": entry.id, "dataset": recall.dataset.name})


# --- models that predict -------------------------------------------------------------------------


def _add_predicting(api: FastAPI, router: Router, limits: Limits, recalls: bool) -> None:
    async def predictions(model: str, route: str, given: Any) -> list[dict[str, Any]]:
        records = _records(await router.card_for(model, route), given, limits)
        if recalls:
            now_asked().records = records
        async with _timed(limits):
            return await router.predict(model, route, records)

    @api.post(
        "/v1/embeddings",
        tags=["predictions"],
        response_model=Embeddings,
        openapi_extra=_with_body(EmbeddingRequest),
    )
    async def embeddings(request: Request) -> Response:
        """A vector of each text."""
        asked = await _read(request, EmbeddingRequest, limits)
        found = await predictions(asked.model, "embeddings", asked.input)
        if bad := next((item for item in found if "error" in item), None):
            raise Refusal(400, f"input: {bad['error']}", param="input")
        as_text = asked.encoding_format == "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": _packed(item["prediction"]) if as_text else item["prediction"],
            }
            for index, item in enumerate(found)
        ]
        tokens = now_asked().tokens_in or 0
        usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": asked.model, "usage": usage})

    @api.post(
        "/classify",
        tags=["predictions"],
        response_model=Predictions,
        openapi_extra=_with_body(ClassifyRequest),
    )
    async def classify(request: Request) -> Response:
        """The class of each text, with the scores of all."""
        asked = await _read(request, ClassifyRequest, limits)
        return _told(asked.model, await predictions(asked.model, "classify", asked.input))

    @api.post(
        "/extract",
        tags=["predictions"],
        response_model=Predictions,
        openapi_extra=_with_body(ExtractRequest),
    )
    async def extract(request: Request) -> Response:
        """A tag of each word of each text."""
        asked = await _read(request, ExtractRequest, limits)
        given = _split(asked.input)
        found = await predictions(asked.model, "extract", given)
        for item, words in zip(found, given, strict=True):
            if isinstance(words, list):
                item["words"] = words
        return _told(asked.model, found)

    @api.post(
        "/predict",
        tags=["predictions"],
        response_model=Predictions,
        openapi_extra=_with_body(PredictRequest),
    )
    async def predict(request: Request) -> Response:
        """What a model tells of each record; `error` in the place of one that is none."""
        asked = await _read(request, PredictRequest, limits)
        model = asked.model or await router.find_one("predict")
        return _told(model, await predictions(model, "predict", asked.records))


def _written_records(body: dict[str, Any]) -> list[dict[str, Any]] | None:
    """What was asked, an item for each answer; none where prompts are ids of tokens."""
    times = body.get("n") or 1
    if "messages" in body:
        return [{"messages": body["messages"]}] * times
    prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
    if not all(isinstance(prompt, str) for prompt in prompts):
        return None
    return [{"prompt": prompt} for prompt in prompts for _ in range(times)]


def _told(model: str, found: list[dict[str, Any]]) -> Response:
    document = {"object": "list", "model": model, "predictions": found}
    return Response(make_json(document), media_type="application/json")


def _records(card: Card, given: Any, limits: Limits) -> list[dict[str, Any]]:
    """Records of what a request gives: texts, or lists of words, are the model's one field."""
    items: list[Any] = [given] if isinstance(given, str) else list(given)
    if not 0 < len(items) <= limits.records:
        what = f"{len(items):,} are given; a request has 1 to {limits.records:,}"
        raise Refusal(400, what, param="input", code="limit_exceeded")
    if all(isinstance(item, dict) for item in items):
        return items
    if len(card.fields) != 1:
        what = f"{card.id} reads records with {', '.join(card.fields) or 'no fields'}"
        raise Refusal(400, what, param="input")
    return [{card.fields[0]: item} for item in items]


def _split(given: Any) -> list[Any]:
    """Texts as words and signs; words as they are. A list of texts is as many texts."""
    items = [given] if isinstance(given, str) else list(given)
    return [
        re.findall(r"\w+(?:['’-]\w+)*|[^\w\s]", item) if isinstance(item, str) else item
        for item in items
    ]


def _packed(vector: Sequence[float]) -> str:
    """Little-endian fp32 in base64, as OpenAI packs vectors."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")
