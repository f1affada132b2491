"""The log of requests: what is in a line, and that neither a disk nor a queue can hold anybody up
or grow."""

from __future__ import annotations

import json
import os
import queue
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import requests

from dray.cli import main
from dray.errors import StoreError
from dray.serve.held_keys import Ring, create_key
from dray.serve.request_log import NUM_FILES, Logged, RequestLog, check_log
from dray.serve.served import Served
from served_here import served_here
from small_writer import save_small_writer


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_writer(tmp_path_factory.mktemp("served") / "writer")


@pytest.mark.parametrize("bodies", [False, True])
def test_a_line_says_who_asked_and_what_came_of_it(folder: Path, tmp_path: Path, bodies: bool):
    file = tmp_path / "requests.jsonl"
    token = create_key(str(tmp_path / "runs"), "team", scopes=["write"])
    ring = Ring(str(tmp_path / "runs"))
    logged = Logged(file=str(file), bodies=bodies)
    headers = {"Authorization": f"Bearer {token}"}
    prompt = {
        "model": "writer",
        "prompt": "sécret words",
        "max_tokens": 3,
        "logit_bias": {"0": -100},
    }
    with served_here([Served(folder=str(folder))], ring=ring, logged=logged) as service:
        ask = f"{service.url}/v1/completions"
        answers = [
            requests.post(ask, json=prompt, headers=headers, timeout=60),
            requests.post(ask, json={**prompt, "stream": True}, headers=headers, timeout=60),
            requests.post(ask, json={**prompt, "n": 99}, headers=headers, timeout=60),
            requests.post(ask, json={**prompt, "model": "none@1"}, headers=headers, timeout=60),
            requests.post(ask, json=prompt, timeout=60),
            requests.get(f"{service.url}/some/secret/path", headers=headers, timeout=60),
        ]
        for path in ("/health", "/ready"):
            assert requests.get(service.url + path, timeout=60).ok
    ring.close()
    assert [answer.status_code for answer in answers] == [200, 200, 400, 404, 401, 403]
    found = lines(file)
    assert [line["id"] for line in found] == [a.headers["x-request-id"] for a in answers]
    assert len({line["id"] for line in found}) == len(found)
    about = [(line["status"], line["refusal"], line["key"], line["model"]) for line in found]
    assert about == [
        (200, None, "team", "writer"),
        (200, None, "team", "writer"),
        (400, "limit_exceeded", "team", "writer"),
        (404, "model_not_found", "team", None),
        (401, "invalid_api_key", None, None),
        (403, "missing_scope", None, None),
    ]
    for line in found[:2]:
        assert (line["route"], line["version"], line["whole"]) == ("/v1/completions", 1, True)
        assert line["tokens_in"] > 0
        assert line["tokens_out"] == 3
        assert line["bytes_in"] == len(answers[0].request.body or b"") + 16 * (line is found[1])
        assert 0 < line["first_byte_seconds"] <= line["seconds"]
    assert found[-1]["route"] == "other"
    text = file.read_text()
    assert token not in text
    assert "some/secret" not in text
    if not bodies:
        assert "cret words" not in text
        assert "request" not in found[0]
        return
    assert json.loads(found[0]["request"])["prompt"] == "sécret words"
    assert json.loads(found[0]["answer"]) == answers[0].json()
    assert found[1]["answer"] == answers[1].text


def test_files_are_bounded_and_for_their_owner_alone(tmp_path: Path):
    log = RequestLog(Logged(file=str(tmp_path / "log")), file_bytes=1_000)
    for number in range(500):
        log.write({"number": number})
    log.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == NUM_FILES
    assert all(file.stat().st_size <= 1_000 for file in files)
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    assert lines(tmp_path / "log")[-1]["number"] == 499
    assert log.num_lost == 0


def test_a_disk_that_stands_still_holds_nobody_up(tmp_path: Path):
    """A pipe that nobody reads is such a disk: what the queue has no room for is counted."""
    pipe = tmp_path / "log"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    log = RequestLog(Logged(file=str(pipe)), file_bytes=0, waiting=5)
    for number in range(100):
        log.write({"number": number, "long": "x" * 50_000})
    assert 80 <= log.num_lost <= 95
    lost = log.num_lost
    os.set_blocking(reader, True)
    kept: queue.Queue[int] = queue.Queue()

    def read() -> None:
        whole = b""
        while part := os.read(reader, 1_000_000):
            whole += part
        kept.put(whole.count(b"\n"))

    thread = threading.Thread(target=read)
    thread.start()
    log.close()
    thread.join(60)
    os.close(reader)
    assert kept.get(timeout=1) == 100 - lost


def test_a_disk_that_is_full_is_counted():
    log = RequestLog(Logged(file="/dev/full"), file_bytes=0)
    for number in range(7):
        log.write({"number": number})
    log.close()
    assert log.num_lost == 7


def test_where_no_log_can_be_nothing_is_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(StoreError, match="No such file"):
        check_log(Logged(file=str(tmp_path / "nowhere" / "log")))
    with pytest.raises(StoreError, match="directory"):
        check_log(Logged(file=str(tmp_path)))
    assert main(["serve", "some", "--log-bodies"]) == 2
    assert "needs --log FILE" in capsys.readouterr().err
