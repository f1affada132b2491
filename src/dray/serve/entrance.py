"""Around all routes: a request is admitted by its headers, counted, and given the reader of its
body; what came of it is measured and logged once it has ended.

`Observer` is who hears of each request: the metrics, the drift of what is asked and answered, the
log. None of them can make a request fail or wait.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dray.serve.asked import Asked, asked, now_asked
from dray.serve.drift import Drift
from dray.serve.keys import METRICS_PATH, OneKey
from dray.serve.limits import Bodies, check_declared
from dray.serve.metering import Meter
from dray.serve.page import FILES
from dray.serve.refusals import Refusal
from dray.serve.request_log import BODY_BYTES, RequestLog

OPEN_PATHS = ("/health", "/ready", *FILES)
"""Which ask for no key and tell nothing of what is served."""
MODEL_PATH = "/v1/models/"
OTHER = "other"
"""The route of a path that there is not."""


class Observer:
    """Hears of each request of a gateway."""

    def __init__(
        self,
        meter: Meter | None = None,
        drift: Drift | None = None,
        log: RequestLog | None = None,
    ) -> None:
        self.meter, self.drift, self.log = meter or Meter(), drift or Drift(), log

    def end(self, request: Asked, route: str, bodies: Bodied | None) -> None:
        """A request has ended."""
        self.meter.end(request, route)
        if request.model is not None and request.version is not None and request.looks:
            self.drift.note(request.model, request.version, request.looks)
        if self.log is not None and route not in (*OPEN_PATHS, METRICS_PATH):
            self.log.write(_line(request, route) | ({} if bodies is None else bodies.told()))


class Entrance:
    """The application with all that is around it. `routes`: the paths that there are."""

    def __init__(
        self,
        app: ASGIApp,
        keys: OneKey,
        bodies: Bodies,
        observer: Observer,
        routes: Collection[str],
    ) -> None:
        self._app, self._keys, self._bodies, self._observer = app, keys, bodies, observer
        self._routes = frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, kept = Asked(), None
        asked.set(request)
        if (log := self._observer.log) is not None and log.bodies:
            kept = Bodied()
            receive, send = kept.receiving(receive), kept.sending(send)
        self._observer.meter.begin()
        try:
            await self._admitted(request, scope, receive, _noting(send, request))
        finally:
            self._observer.end(request, self._route(scope["path"]), kept)

    async def _admitted(self, request: Asked, scope: Scope, receive: Receive, send: Send) -> None:
        path, headers = scope["path"], Request(scope, receive).headers
        try:
            if path in OPEN_PATHS:  # they are asked while it is shut down, too
                await self._app(scope, receive, send)
                return
            scope["dray_caller"] = self._keys.admit(headers, path)
            request.key = scope["dray_caller"].key
            check_declared(headers.get("content-length"), self._bodies.limits)
            with self._bodies.counted() as body:
                scope["dray_body"] = body
                try:
                    await self._app(scope, receive, send)
                finally:
                    request.num_bytes = body.num_bytes
        except Refusal as refusal:
            await refused(refusal)(scope, receive, send)

    def _route(self, path: str) -> str:
        """A path as one of a few words: nobody's words go into metrics and logs."""
        if path.startswith(MODEL_PATH):
            return f"{MODEL_PATH}{{model}}"
        return path if path in self._routes else OTHER


def refused(refusal: Refusal) -> Response:
    """The answer that says so."""
    now_asked().refusal = refusal
    return JSONResponse(refusal.body(), refusal.status, refusal.headers())


def _noting(send: Send, request: Asked) -> Send:
    """Every answer tells its request's id and which version answered; its times are noted."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = request.id
            if request.version is not None:
                headers["x-dray-version"] = str(request.version)
        await send(message)
        if message["type"] == "http.response.start":
            request.status = message["status"]
        elif message["type"] == "http.response.body":
            if message.get("body") and not request.streams:
                request.note_first()
            request.is_whole = not message.get("more_body", False)

    return sending


def _line(request: Asked, route: str) -> dict[str, Any]:
    """Of the log."""
    first = None if request.first is None else request.first - request.began
    return {
        "id": request.id,
        "key": request.key,
        "route": route,
        "model": request.model,
        "version": request.version,
        "status": request.status,
        "whole": request.is_whole,
        "refusal": None if request.refusal is None else request.refusal.word,
        "seconds": round(request.seconds, 6),
        "first_byte_seconds": None if first is None else round(first, 6),
        "tokens_in": request.tokens_in,
        "tokens_out": request.tokens_out,
        "bytes_in": request.num_bytes,
    }


class Bodied:
    """What was asked and answered, as far as it is kept."""

    def __init__(self) -> None:
        self._asked, self._answered = bytearray(), bytearray()

    def receiving(self, receive: Receive) -> Receive:
        """The same, kept."""

        async def received() -> Message:
            message = await receive()
            _keep(self._asked, message)
            return message

        return received

    def sending(self, send: Send) -> Send:
        """The same, kept."""

        async def sent(message: Message) -> None:
            _keep(self._answered, message)
            await send(message)

        return sent

    def told(self) -> dict[str, str]:
        """As text."""
        return {
            "request": self._asked.decode(errors="replace"),
            "answer": self._answered.decode(errors="replace"),
        }


def _keep(kept: bytearray, message: Message) -> None:
    kept += message.get("body", b"")[: max(0, BODY_BYTES - len(kept))]
