"""Around all routes: a request is admitted by its headers, counted, and given the reader of its
body. Once it has ended, the observer hears what came of it.
"""

from __future__ import annotations

from collections.abc import Collection

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dray.serve.asked import Asked, asked, now_asked
from dray.serve.keys import OneKey
from dray.serve.limits import Bodies, check_declared
from dray.serve.observing import OPEN_PATHS, Bodied, Observer
from dray.serve.refusals import Refusal

MODEL_PATH = "/v1/models/"
OTHER = "other"
"""The route of a path that there is not."""


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
            scope["dray_redactor"] = self._observer.redactor
            scope["dray_caller"] = self._keys.admit(headers, path)
            request.key, request.caller = scope["dray_caller"].key, scope["dray_caller"].name
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
    """Every answer tells its request's id, which version answered and what personal data was taken
    out of the request; its times are noted."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = request.id
            if request.version is not None:
                headers["x-dray-version"] = str(request.version)
            if request.redacted:
                counts = sorted(request.redacted.items())
                headers["x-dray-redacted"] = ", ".join(f"{kind}={n}" for kind, n in counts)
        await send(message)
        if message["type"] == "http.response.start":
            request.status = message["status"]
        elif message["type"] == "http.response.body":
            if message.get("body") and not request.streams:
                request.note_first()
            request.is_whole = not message.get("more_body", False)

    return sending
