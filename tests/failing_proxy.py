"""An HTTP proxy in a thread, in front of a real S3 server, that fails on request: the errors of a
store on bad days."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

S3_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"

Fault = tuple[int, str] | str
"""(HTTP status, S3 error code); `reset`: the connection breaks unanswered; `lost`: it breaks when
the work is done."""


class FailingProxy:
    """Forwards to `target` (host:port), except for the requests for which `decide(method, path)`
    names a fault."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.decide: Callable[[str, str], Fault | None] = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        self.num_failed = 0
        self.writing = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"127.0.0.1:{self.server.server_address[1]}"

    def fail_next(self, count: int, fault: Fault, method: str = "", path: str = "") -> None:
        """Let the next `count` requests of that method whose path contains `path` fail."""
        left = [count]

        def decide(asked: str, where: str) -> Fault | None:
            if left[0] and method in ("", asked) and path in where:
                left[0] -= 1
                return fault
            return None

        self.decide = decide


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FailingProxy

    def _handle(self) -> None:
        body = self._body()
        owner = self.owner
        owner.requests.append((self.command, self.path))
        fault = owner.decide(self.command, self.path)
        owner.num_failed += fault is not None
        if fault == "reset":
            self._reset()
        elif isinstance(fault, tuple):
            content = S3_ERROR.format(code=fault[1]).encode()
            self._answer(fault[0], {"Content-Type": "application/xml"}, content)
        else:
            # The server in the tests looks and then writes; a real one does both at once, and so
            # does this lock.
            with owner.writing if self.command == "PUT" else threading.Lock():
                status, headers, content = self._forward(body)
            if fault == "lost":
                self._reset()
            else:
                self._answer(status, headers, content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.owner.target, timeout=30)
        headers = {
            key: value
            for key, value in self.headers.items()
            if key.lower() not in ("transfer-encoding", "content-length", "connection", "expect")
        }
        connection.request(
            self.command, self.path, body, headers | {"Content-Length": str(len(body))}
        )
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), content

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for key, value in headers.items():
            if key.lower() not in ("transfer-encoding", "connection", "date", "server") and not (
                key.lower() == "content-length" and self.command != "HEAD"
            ):
                self.send_header(key, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _reset(self) -> None:
        """Break the connection with a TCP reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def finish(self) -> None:
        with suppress(OSError, ValueError):  # broken on purpose
            super().finish()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def failing_proxy(target: str) -> Iterator[FailingProxy]:
    """A proxy that runs until the block ends."""
    proxy = FailingProxy(target)
    thread = threading.Thread(
        target=proxy.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    try:
        yield proxy
    finally:
        proxy.server.shutdown()
        proxy.server.server_close()
        thread.join()
