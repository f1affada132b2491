"""Clouds' metadata servers as far as they tell of a machine's end, over HTTP; not the clouds', but
by their documents.

`python metadata.py CLOUD PORT FILE`: the notice is there once the file is, which holds the seconds
that are left.
"""

from __future__ import annotations

import http.server
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

TOKENS: list[str] = []
"""That AWS has given out and still takes."""


def make_handler(cloud: str, notice: Path) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, code: int, text: str = "", **headers: str) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

        def do_PUT(self) -> None:
            if cloud != "aws" or self.path != "/latest/api/token":
                return self.answer(404)
            if "X-aws-ec2-metadata-token-ttl-seconds" not in self.headers:
                return self.answer(400)
            TOKENS.append(f"token-{time.monotonic_ns()}")
            return self.answer(200, TOKENS[-1])

        def do_GET(self) -> None:
            end = None
            if notice.exists():
                end = datetime.now(UTC) + timedelta(seconds=float(notice.read_text()))
            getattr(self, cloud)(end)

        def aws(self, end: datetime | None) -> None:
            if self.headers.get("X-aws-ec2-metadata-token") not in TOKENS:
                self.answer(401)
            elif self.path != "/latest/meta-data/spot/instance-action" or end is None:
                self.answer(404)
            else:
                told = {"action": "terminate", "time": end.strftime("%Y-%m-%dT%H:%M:%SZ")}
                self.answer(200, json.dumps(told))

        def gcp(self, end: datetime | None) -> None:
            if self.path == "/":
                self.answer(200, "computeMetadata/", Metadata_Flavor="Google")
            elif self.headers.get("Metadata-Flavor") != "Google":
                self.answer(403)
            elif self.path == "/computeMetadata/v1/instance/preempted":
                self.answer(200, "TRUE" if end else "FALSE", Metadata_Flavor="Google")
            else:
                self.answer(404)

        def azure(self, end: datetime | None) -> None:
            path = self.path.partition("?")[0]
            if self.headers.get("Metadata") != "true":
                self.answer(400)
            elif path == "/metadata/instance":
                self.answer(200, "{}")
            elif path == "/metadata/scheduledevents":
                event = {"EventType": "Preempt", "NotBefore": end and format_datetime(end, True)}
                other = {"EventType": "Reboot", "NotBefore": ""}
                self.answer(200, json.dumps({"Events": [other, event] if end else []}))
            else:
                self.answer(404)

    return Handler


@contextmanager
def metadata_server(cloud: str, notice: Path) -> Iterator[str]:
    """Its address, for the time of the block."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), make_handler(cloud, notice))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


if __name__ == "__main__":
    address = ("127.0.0.1", int(sys.argv[2]))
    http.server.ThreadingHTTPServer(
        address, make_handler(sys.argv[1], Path(sys.argv[3]))
    ).serve_forever()
