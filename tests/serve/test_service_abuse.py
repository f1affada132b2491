"""What a service is given by those who mean it harm: an answer that says what is wrong, and a
service that goes on."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import psutil
import pytest
import requests

from dray.serve import guard
from dray.serve.limits import Limits
from dray.serve.served import Served
from served_here import Address, served_here
from small_writer import save_small_writer
from waiting import wait_for

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
PROMPT = {"model": "writer", "prompt": "what"}
SAID = {"model": "writer", "messages": [{"role": "user", "content": "what"}]}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    folder = save_small_writer(tmp_path_factory.mktemp("abused") / "writer")
    limits = Limits(body_seconds=1.0, bodies_bytes=4_000_000)
    with served_here([Served(folder=str(folder))], limits) as address:
        yield address


@pytest.fixture(autouse=True)
def goes_on(service: Address) -> Iterator[None]:
    """Behind each test the service answers as before."""
    yield
    found = requests.post(f"{service.url}{COMPLETE}", json={**PROMPT, "max_tokens": 2}, timeout=60)
    assert found.status_code == 200, found.text


def refused(found: requests.Response, status: int) -> dict[str, Any]:
    """That an answer is a refusal in OpenAI's form."""
    assert found.status_code == status, found.text[:500]
    error = found.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) < 700
    return dict(error)


BODIES: list[tuple[str, Any, int, str]] = [
    (COMPLETE, b"{", 400, "no JSON"),
    (COMPLETE, b"", 400, "no JSON"),
    (COMPLETE, b"[]", 400, "JSON object"),
    (COMPLETE, b'"text"', 400, "JSON object"),
    (COMPLETE, b"\xff\xfe{}", 400, "no UTF-8"),
    (COMPLETE, b'{"model": "writer", "prompt": "a\xc3("}', 400, "no UTF-8"),
    (COMPLETE, b'{"model": "writer", "prompt": "\\ud800"}', 400, "surrogate"),
    (COMPLETE, b'{"\\udfff": 1}', 400, "surrogate"),
    (COMPLETE, b"[" * 100_000, 400, "nested deeper"),
    (COMPLETE, b'{"a":' * 40 + b"1" + b"}" * 40, 400, "nested deeper"),
    (COMPLETE, b'{"model": "writer", "prompt": "a", "temperature": NaN}', 400, "NaN"),
    (COMPLETE, b'{"model": "writer", "prompt": "a", "temperature": -Infinity}', 400, "Infinity"),
    (COMPLETE, b'{"model": "writer", "prompt": "a", "temperature": 1e999}', 400, "float"),
    (COMPLETE, b'{"model": "writer", "prompt": "a", "seed": 1' + b"0" * 5000 + b"}", 400, "digits"),
    (COMPLETE, {**PROMPT, "temperature": -1}, 400, "temperature"),
    (COMPLETE, {**PROMPT, "top_p": 0}, 400, "top_p"),
    (COMPLETE, {**PROMPT, "n": 10**9}, 400, "1,000,000,000"),
    (COMPLETE, {**PROMPT, "n": 0}, 400, "n"),
    (COMPLETE, {**PROMPT, "n": True}, 400, "n"),
    (COMPLETE, {**PROMPT, "n": "2"}, 400, "n"),
    (COMPLETE, {**PROMPT, "max_tokens": 10**9}, 400, "max_tokens|tokens in all"),
    (COMPLETE, {**PROMPT, "max_tokens": -5}, 400, "max_tokens"),
    (COMPLETE, {**PROMPT, "max_tokens": 2.5}, 400, "max_tokens"),
    (COMPLETE, {**PROMPT, "best_of": 20}, 400, "best_of"),
    (COMPLETE, {**PROMPT, "best_of": True}, 400, "best_of"),
    (COMPLETE, {**PROMPT, "echo": 0}, 400, "echo"),
    (COMPLETE, {**PROMPT, "unheard_of": 1}, 400, "unheard_of"),
    (COMPLETE, {**PROMPT, "stop": ["a"] * 9}, 400, "stop"),
    (COMPLETE, {**PROMPT, "stop": ""}, 400, "stop"),
    (COMPLETE, {**PROMPT, "logprobs": 10**6}, 400, "logprobs"),
    (COMPLETE, {**PROMPT, "logit_bias": {"999999": 1}}, 400, "logit_bias"),
    (COMPLETE, {**PROMPT, "logit_bias": {"-1": 1}}, 400, "logit_bias"),
    (COMPLETE, {**PROMPT, "stream_options": {"include_usage": True}}, 400, "stream_options"),
    (COMPLETE, {"model": "writer"}, 400, "prompt"),
    (COMPLETE, {"prompt": "a"}, 400, "model"),
    (COMPLETE, {**PROMPT, "model": "other"}, 404, "no model 'other'"),
    (COMPLETE, {**PROMPT, "model": "../../etc/passwd"}, 404, "no model"),
    (COMPLETE, {**PROMPT, "model": "x" * 10_000}, 400, "model"),
    (COMPLETE, {**PROMPT, "model": {"a": 1}}, 400, "model"),
    (COMPLETE, {**PROMPT, "prompt": []}, 400, "prompt"),
    (COMPLETE, {**PROMPT, "prompt": [[]]}, 400, "prompt"),
    (COMPLETE, {**PROMPT, "prompt": [10**9]}, 400, "no token"),
    (COMPLETE, {**PROMPT, "prompt": [-1]}, 400, "prompt"),
    (COMPLETE, {**PROMPT, "prompt": [1, "a"]}, 400, "prompt"),
    (COMPLETE, {**PROMPT, "prompt": ["a"] * 1_000}, 400, "prompts"),
    (COMPLETE, {**PROMPT, "prompt": "word " * 10_000}, 400, "tokens"),
    (CHAT, {**SAID, "messages": []}, 400, "messages"),
    (CHAT, {**SAID, "messages": "what"}, 400, "messages"),
    (CHAT, {**SAID, "messages": [{"role": "owner", "content": "a"}]}, 400, "role"),
    (CHAT, {**SAID, "messages": [{"role": "user"}]}, 400, "messages"),
    (CHAT, {**SAID, "messages": [{"role": "system", "content": "a"}]}, 400, "nobody asks"),
    (CHAT, {**SAID, "top_logprobs": 3}, 400, "top_logprobs"),
    (CHAT, {**SAID, "tool_choice": "required"}, 400, "tool_choice"),
    ("/v1/embeddings", {"model": "writer", "input": "a"}, 404, "does not answer"),
    ("/classify", {"model": "writer", "input": ["a"]}, 404, "does not answer|reads records"),
    ("/predict", {"records": [{"text": "a"}]}, 400, "name the model"),
    ("/predict", {"model": "writer", "records": [{"text": "a"}]}, 404, "does not answer"),
]  # fmt: skip


def test_bad_bodies_are_refused_by_name(service: Address):
    import re

    for path, body, status, words in BODIES:
        data = body if isinstance(body, bytes) else json.dumps(body)
        headers = {"Content-Type": "application/json"}
        found = requests.post(f"{service.url}{path}", data=data, headers=headers, timeout=60)
        error = refused(found, status)
        told = f"{error['message']} {error['param']}"
        assert re.search(words, told), (path, str(body)[:80], told)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/page/../../api.py", 404),
        ("/v1", 404),
        ("/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("/v1/models/%00", 404),
        ("/v1/../../etc/passwd", 404),
        ("//etc/passwd", 404),
        ("/docs", 404),
        ("/v1/models/" + "x" * 20_000, 404),
        (COMPLETE, 405),
    ],
)
def test_paths_lead_nowhere_else(service: Address, path: str, status: int):
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while part := connection.recv(65_536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] == str(status).encode()
    assert json.loads(body)["error"]["message"]


def test_other_kinds_of_content_are_refused(service: Address):
    for kind in (
        "",
        "text/plain",
        "text/html",
        "multipart/form-data; boundary=x",
        "application/x-yaml",
    ):
        headers = {"Content-Type": kind}
        data = json.dumps(PROMPT)
        found = requests.post(f"{service.url}{COMPLETE}", data=data, headers=headers, timeout=60)
        assert refused(found, 415)["code"] == "wrong_content_type"


def test_a_huge_body_is_refused_before_it_is_there(service: Address):
    process = psutil.Process()
    before = process.memory_info().rss
    declared = {"Content-Length": str(10**12), "Content-Type": "application/json"}
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        lines = "".join(f"{name}: {value}\r\n" for name, value in declared.items())
        connection.sendall(f"POST {COMPLETE} HTTP/1.1\r\nHost: a\r\n{lines}\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")

    def endless() -> Iterator[bytes]:
        for _ in range(200):
            yield b" " * 1_000_000

    kind = {"Content-Type": "application/json"}
    try:
        found = requests.post(f"{service.url}{COMPLETE}", data=endless(), headers=kind, timeout=60)
        refused(found, 413)
    except requests.ConnectionError:  # it was closed while more came
        pass
    ten = {**PROMPT, "prompt": "word " * 2_000_000}
    refused(requests.post(f"{service.url}{COMPLETE}", json=ten, timeout=60), 413)
    assert process.memory_info().rss - before < 150_000_000


def test_a_slow_body_and_a_silent_connection_are_not_waited_for(
    service: Address, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(guard, "HEADER_SECONDS", 1.0)
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        head = f"POST {COMPLETE} HTTP/1.1\r\nHost: a\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(head.encode() + b'{"mod')
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        connection.sendall(b"GET /health HTT")
        assert connection.recv(4096) == b""
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        for _ in range(2):  # whole requests are waited for anew
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert b"live" in connection.recv(4096)
        connection.sendall(b"GET /health HTT")
        assert connection.recv(4096) == b""


def test_headers_are_bounded(service: Address):
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n")
        answer = b""
        try:
            for number in range(2_000):
                connection.sendall(b"X-%d: " % number + b"a" * 1_000 + b"\r\n")
            answer = connection.recv(4096)
        except ConnectionError:
            pass
    assert not answer or answer.startswith(b"HTTP/1.1 400")


def test_connections_are_bounded(service: Address, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "MAX_CONNECTIONS", 100)
    with ExitStack() as stack:
        some = [
            stack.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=60))
            for _ in range(150)
        ]
        time.sleep(0.5)
        closed = 0
        for connection in some:
            connection.setblocking(False)
            try:
                closed += connection.recv(1) == b""
            except BlockingIOError:
                pass
            except ConnectionError:
                closed += 1
        assert 50 <= closed < 150
    wait_for(lambda: requests.get(f"{service.url}/health", timeout=60).ok, "a connection", 30)
