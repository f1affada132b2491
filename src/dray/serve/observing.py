"""Who hears of each request once it has ended: the metrics, the drift of what is asked and
answered, and the log. None of them makes a request wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from starlette.types import Message, Receive, Send

from dray.corpus.redacting import Redactor
from dray.serve.asked import Asked
from dray.serve.drift import Drift
from dray.serve.keys import METRICS_PATH
from dray.serve.metering import Live, Meter
from dray.serve.page import FILES
from dray.serve.recalling import Recall
from dray.serve.request_log import BODY_BYTES, Logged, RequestLog
from dray.serve.routing import Router

OPEN_PATHS = ("/health", "/ready", *FILES)
"""Which ask for no key and tell nothing of what is served."""
UNLOGGED = frozenset((*OPEN_PATHS, METRICS_PATH))
"""What is asked every few seconds for ever, and says nothing of anybody."""


def observe(
    router: Router,
    agreements: Callable[[], Mapping[str, Mapping[str, int]]] = dict,
    logged: Logged | None = None,
    recall: Recall | None = None,
    redactor: Redactor | None = None,
) -> Observer:
    """An observer of a router's requests. `agreements`: of shadows, by model; `recall`: of what was
    answered, where people may say something of it; `redactor`: what takes personal data out."""
    log = None if logged is None else RequestLog(logged, redactor)
    drift = Drift(router.reference)
    live = Live(
        queue=lambda: router.queue,
        agreements=agreements,
        drift=drift.read,
        feedback=lambda: {} if recall is None else recall.counts,
        log_lost=lambda: None if log is None else log.num_lost,
    )
    return Observer(Meter(live), drift, log, recall, redactor)


class Observer:
    """Hears of each request of a gateway."""

    def __init__(
        self,
        meter: Meter,
        drift: Drift,
        log: RequestLog | None,
        recall: Recall | None = None,
        redactor: Redactor | None = None,
    ) -> None:
        self.meter, self.drift, self.log = meter, drift, log
        self.recall, self.redactor = recall, redactor

    def end(self, request: Asked, route: str, bodies: Bodied | None) -> None:
        """A request has ended. `bodies`: what was kept of it."""
        self.meter.end(request, route)
        if request.model is not None and request.version is not None:
            self.drift.note(request.model, request.version, request.looks)
        if self.recall is not None:
            self.recall.keep(request, route)
        if self.log is not None and route not in UNLOGGED:
            redacted = {} if self.redactor is None else {"redacted": dict(request.redacted)}
            kept = {} if bodies is None else bodies.told()
            self.log.write(_line(request, route) | redacted | kept)

    def close(self) -> None:
        """Write what waits for the log."""
        if self.log is not None:
            self.log.close()


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
