"""In front of Ray Serve's proxy: connections, headers and bodies are bounded before Ray has them.

Ray's proxy takes whatever comes, and keeps a body until a replica has read it. `middlewares` is
what it calls as it starts (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it): from then on its
HTTP is h11's, which refuses headers beyond 64 KiB, of a bounded number of connections, each with a
time for its first request and for what it says of one.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http import auto
from uvicorn.protocols.http.h11_impl import H11Protocol

from dray.serve.limits import Bodies, Body, Limits, check_declared
from dray.serve.refusals import Refusal

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""The variable by which Ray's proxy finds `middlewares`."""
MAX_CONNECTIONS = 4_096
HEADER_SECONDS = 15.0
"""Until the headers of a connection's first request are there."""


class BoundedProtocol(H11Protocol):
    """A connection: one of a bounded number, closed where no request comes."""

    _headers: asyncio.TimerHandle | None = None
    """Runs while headers are awaited: those of the first request from the start, those of a later
    one from its first byte on."""

    def connection_made(self, transport: Any) -> None:
        if len(self.connections) >= MAX_CONNECTIONS:
            transport.abort()
            self.transport = transport
            return
        super().connection_made(transport)
        self._is_counted = True
        self._headers = self.loop.call_later(HEADER_SECONDS, self._close_slow)

    _is_counted = False

    def data_received(self, data: bytes) -> None:
        if self._headers is None and not self._answers:
            self._headers = self.loop.call_later(HEADER_SECONDS, self._close_slow)
        super().data_received(data)
        if self._answers:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._is_counted:
            super().connection_lost(exc)

    @property
    def _answers(self) -> bool:
        """Whether a request is under way whose headers are there."""
        return self.cycle is not None and not self.cycle.response_complete

    def _stop_waiting(self) -> None:
        if self._headers is not None:
            self._headers.cancel()
            self._headers = None

    def _close_slow(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class BodyGuard:
    """Bodies within limits, counted, and in time."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits, self._bodies = app, limits, Bodies(limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value for name, value in scope["headers"] if name == b"content-length"}
        length = headers.get(b"content-length")
        try:
            check_declared(None if length is None else length.decode("latin-1"), self._limits)
            with self._bodies.counted() as body:
                counted = _Counted(scope, receive, send, body)
                await self._app(scope, counted.receive, counted.send)
        except Refusal as refusal:
            answer = JSONResponse(refusal.body(), refusal.status, refusal.headers())
            await answer(scope, receive, send)


class _Counted:
    """A request whose body is counted. Where it is too much, the application sees the client go,
    and whatever it says then is told as what it is."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, body: Body) -> None:
        self._scope, self._receive, self._send, self._body = scope, receive, send, body
        self._refusal: Refusal | None = None
        self._begun = False

    async def receive(self) -> Message:
        if self._refusal is not None:
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.request":
            try:
                self._body.count(len(message.get("body", b"")))
            except Refusal as refusal:
                self._refusal = refusal
                return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            _keep_one_id(message)
        if self._refusal is None or self._begun:
            if self._refusal is None:
                self._begun = True
                await self._send(message)
            return
        self._begun, refusal = True, self._refusal
        answer = JSONResponse(refusal.body(), refusal.status, refusal.headers())
        await answer(self._scope, self._receive, self._send)


def _keep_one_id(message: Message) -> None:
    """Ray's proxy appends an id of its own, which is whatever a request brought along, to the
    gateway's: the first is the one that log and metrics know."""
    headers = MutableHeaders(scope=message)
    if first := headers.get("x-request-id"):
        del headers["x-request-id"]  # all of them
        headers["x-request-id"] = first


def middlewares() -> list[Middleware]:
    """What Ray's proxy puts before its own application."""
    auto.AutoHTTPProtocol = BoundedProtocol
    roomy = Limits(body_bytes=2 * Limits().body_bytes)  # the gateway refuses in OpenAI's form
    return [Middleware(BodyGuard, limits=roomy)]
