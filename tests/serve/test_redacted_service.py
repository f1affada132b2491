"""Personal data in requests: no model sees it, no log keeps it, whichever way it was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import requests

from dray.corpus.redacting import make_redactor
from dray.serve.foreground import _warn
from dray.serve.redacting import UNSEEN, redact_bodies
from dray.serve.request_log import Logged
from dray.serve.served import Served
from dray.spec import Redaction
from served_here import served_here
from small_writer import save_small_writer

SECRETS = ("anna.schmidt@example.com", "+49 30 1234567", "4111 1111 1111 1111")
TEXT = f"mail {SECRETS[0]} or call {SECRETS[1]}, card {SECRETS[2]}"
KEY = "a key of pseudonyms 4711"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_writer(tmp_path_factory.mktemp("served") / "writer")


def ask(url: str, **body: Any) -> requests.Response:
    given = {"model": "writer", "max_tokens": 3, "logit_bias": {"0": -100}, **body}
    # Escapes hide an address from whoever reads the bytes.
    content = json.dumps(given).replace("@", "\\u0040")
    headers = {"Content-Type": "application/json"}
    return requests.post(f"{url}/v1/completions", content, headers=headers, timeout=60)


@pytest.mark.parametrize("mode", ["mask", "pseudonym"])
def test_what_is_asked_reaches_neither_model_nor_log(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("DRAY_PSEUDONYM_KEY", KEY)
    redactor = make_redactor(Redaction.model_validate({"mode": mode}))
    assert redactor is not None
    masked, _ = redactor.redact(TEXT)
    file = tmp_path / "requests.jsonl"
    logged = Logged(file=str(file), bodies=True)
    with served_here([Served(folder=str(folder))], logged=logged, redactor=redactor) as service:
        seen: list[str] = []
        answerer = service.answerers["writer"]
        write = answerer.write

        def noting(kind: str, body: dict[str, Any]) -> Any:
            seen.append(body["prompt"])
            return write(kind, body)

        answerer.write = noting  # type: ignore[method-assign]
        plain = ask(service.url, prompt=TEXT, user=SECRETS[0], logprobs=2)
        streamed = ask(service.url, prompt=[TEXT], stream=True)
        clean = ask(service.url, prompt="what is")
        ids = ask(service.url, prompt=[5, 6, 7])
        odd = ask(service.url, prompt=TEXT, unknown={SECRETS[0]: 1})
        long = ask(service.url, prompt=TEXT + " and so on" * 12_000)
    assert [r.status_code for r in (plain, streamed, clean)] == [200] * 3
    assert (ids.status_code, ids.json()["error"]["code"]) == (400, "not_redactable")
    assert (odd.status_code, long.status_code) == (400, 400)
    assert seen[:3] == [masked, [masked], "what is"]
    assert plain.headers["x-dray-redacted"] == "card=1, email=1, phone=1"
    assert streamed.headers["x-dray-redacted"] == plain.headers["x-dray-redacted"]
    assert "x-dray-redacted" not in clean.headers
    text = file.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for secret in SECRETS:
        assert secret not in text
        assert all(secret not in line["request"] + line["answer"] for line in lines)
    assert "schmidt" not in text
    assert lines[0]["redacted"] == {"card": 1, "email": 1, "phone": 1}
    assert json.loads(lines[0]["request"])["prompt"] == masked
    assert "logprobs" not in json.loads(lines[0]["answer"])["choices"][0]
    said = json.loads(lines[1]["answer"])["streamed"]
    assert [choice["index"] for choice in said] == [0]
    assert json.loads(lines[3]["request"])["prompt"] == "[withheld: 3 ids]"
    assert lines[5]["request"] == UNSEEN  # what is cut off is no JSON any more


def test_a_service_may_refuse_such_requests(folder: Path, tmp_path: Path) -> None:
    redactor = make_redactor(Redaction(mode="drop"))
    file = tmp_path / "requests.jsonl"
    logged = Logged(file=str(file), bodies=True)
    with served_here([Served(folder=str(folder))], logged=logged, redactor=redactor) as service:
        refused, taken = ask(service.url, prompt=TEXT), ask(service.url, prompt="what is")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "personal_data")
    assert "1 e-mail address, 1 phone number, 1 card number" in refused.json()["error"]["message"]
    assert taken.status_code == 200
    assert "schmidt" not in file.read_text()


def test_a_stream_is_put_together_before_it_is_looked_through() -> None:
    """No piece has an address, all of them have one."""
    redactor = make_redactor(Redaction())
    assert redactor is not None
    pieces = [
        {"choices": [{"index": place, "delta": {"content": piece}}]}
        for piece in ("mail anna", "@exam", "ple.com", " now")
        for place in (0, 1)
    ]
    answer = "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces) + "data: [DONE]\n\n"
    line = redact_bodies({"id": "1", "request": "{}", "answer": answer}, redactor)
    said = [{"index": place, "text": "mail [EMAIL] now"} for place in (0, 1)]
    assert json.loads(line["answer"]) == {"streamed": said}
    assert redact_bodies({"answer": "anna@example.com"}, redactor) == {"answer": UNSEEN}


def test_a_log_of_bodies_as_they_are_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    kept = Logged(file=str(tmp_path / "log"), bodies=True)
    _warn("127.0.0.1", None, kept, None, said.append)
    assert len(said) == 1
    assert "--redact mask" in said[0]
    _warn("127.0.0.1", None, kept, make_redactor(Redaction()), said.append)
    _warn("127.0.0.1", None, Logged(file=kept.file), None, said.append)
    assert len(said) == 1
