"""32 clients for three minutes, while replicas are killed, a version is promoted and rolled back:
no request is lost, and none is answered by a version that was not promoted. Half of them
stream."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from dray.cli import main
from dray_serving import Serving, dray_serving
from small_writer import change_weights, save_small_writer
from waiting import processes_named, wait_for

NEEDS_RAY = "local_ray"  # starts one of its own: tests/conftest.py deals by this word
NUM_CLIENTS, SECONDS = 32, 180.0
PROMPTS = ("what is", "who are you and what", "tell", "a b c d e f g h")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Answer:
    """What a client got."""

    prompt: str
    began: float
    ended: float
    version: str | None
    text: str
    problem: str = ""
    """Why it is no whole answer."""


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Serving]:
    save_small_writer(tmp_path / "first")
    change_weights(save_small_writer(tmp_path / "second"))
    with dray_serving(tmp_path, "--name", f"chat={tmp_path / 'first'}") as serving:
        yield serving


def ask(url: str, prompt: str, *, stream: bool) -> Answer:
    body = {"model": "chat", "prompt": prompt, "max_tokens": 24, "seed": 7, "stream": stream}
    began = time.monotonic()
    try:
        with requests.post(f"{url}/v1/completions", json=body, timeout=120, stream=stream) as found:
            text, problem = read(found, stream=stream)
            version = found.headers.get("x-dray-version")
    except requests.RequestException as error:
        text, problem, version = "", repr(error), None
    return Answer(prompt, began, time.monotonic(), version, text, problem)


def read(found: requests.Response, *, stream: bool) -> tuple[str, str]:
    """The text of an answer, and why it is not whole."""
    if found.status_code != 200:
        return "", f"{found.status_code} {found.text}"
    if not stream:
        choice = found.json()["choices"][0]
        return choice["text"], "" if choice["finish_reason"] else "has no end"
    text, ended = "", ""
    for line in found.iter_lines():
        said = line.decode().removeprefix("data: ")
        if said == "[DONE]":
            return text, "" if ended else "has no end"
        piece = json.loads(said) if said else {"choices": []}
        if "error" in piece:
            return text, said
        for choice in piece["choices"]:
            text, ended = text + choice["text"], choice["finish_reason"] or ended
    return text, "broke off"


def test_no_request_is_lost_and_none_is_answered_by_what_was_not_promoted(
    service: Serving, tmp_path: Path
) -> None:
    def do(*words: str) -> None:
        assert main(["serve", *words, "--storage", str(tmp_path / "runs")]) == 0

    def kill(version: int) -> None:
        """Its replica, once there is one."""
        name = f"ServeReplica:model-chat-v{version}"
        wait_for(lambda: processes_named(name, service.process), f"a replica of {version}", 120)
        for process in processes_named(name, service.process):
            process.kill()

    first = {prompt: ask(service.url, prompt, stream=False).text for prompt in PROMPTS}
    answers: list[Answer] = []
    over = time.monotonic() + SECONDS

    def go_on(number: int) -> None:
        turn = number
        while time.monotonic() < over:
            turn += 1
            prompt = PROMPTS[turn % len(PROMPTS)]
            answers.append(ask(service.url, prompt, stream=turn // len(PROMPTS) % 2 == 0))

    clients = [threading.Thread(target=go_on, args=(number,)) for number in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    time.sleep(0.1 * SECONDS)
    kill(1)
    time.sleep(0.2 * SECONDS)
    do("promote", "chat", str(tmp_path / "second"))
    promoted = time.monotonic()
    wait_for(lambda: any(answer.version == "2" for answer in answers), "version 2", 120)
    kill(2)
    time.sleep(0.2 * SECONDS)
    do("rollback", "chat")
    for client in clients:
        client.join(300)

    lost = Counter(answer.problem for answer in answers if answer.problem)
    assert not lost, lost
    assert len(answers) > NUM_CLIENTS
    assert {answer.version for answer in answers} == {"1", "2"}
    second_began = min(answer.ended for answer in answers if answer.version == "2")
    second_ended = max(answer.began for answer in answers if answer.version == "2")
    assert second_began > promoted - 1
    for answer in answers:  # one after the other: what begins once 2 has answered is its own
        if second_began < answer.began and answer.ended < second_ended:
            assert answer.version == "2"
    texts = {
        version: {(answer.prompt, answer.text) for answer in answers if answer.version == version}
        for version in ("1", "2")
    }
    assert texts["1"] == set(first.items())
    assert len(texts["2"]) == len(PROMPTS)
    assert texts["1"].isdisjoint(texts["2"])


def test_there_are_as_many_replicas_as_are_asked_for(tmp_path: Path) -> None:
    save_small_writer(tmp_path / "first")
    words = ("--name", f"chat={tmp_path / 'first'}", "--replicas", "1-2")
    with dray_serving(tmp_path, *words) as service:

        def num_replicas() -> int:
            return len(processes_named("ServeReplica:model-chat-v1", service.process))

        assert num_replicas() == 1
        ended, answers = threading.Event(), list[Answer]()

        def go_on() -> None:
            while not ended.is_set():
                answers.append(ask(service.url, "what is", stream=False))

        clients = [threading.Thread(target=go_on) for _ in range(NUM_CLIENTS)]
        for client in clients:
            client.start()
        try:
            wait_for(lambda: num_replicas() == 2, "the second replica", 180)
            num_answers = len(answers)
            wait_for(lambda: len(answers) > num_answers + NUM_CLIENTS, "answers by both", 120)
        finally:
            ended.set()
            for client in clients:
                client.join(120)
        assert not Counter(answer.problem for answer in answers if answer.problem)
        assert len({answer.text for answer in answers}) == 1
