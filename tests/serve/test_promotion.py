"""`dray serve promote` and `rollback` on a Ray, while requests go on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from dray.cli import main
from dray.serve.foreground import promoted_version
from dray_serving import Serving, dray_serving
from small_writer import change_weights, save_small_writer
from waiting import processes_named, wait_for

NEEDS_RAY = "local_ray"  # starts one of its own: tests/conftest.py deals by this word


class Service:
    def __init__(self, serving: Serving, home: Path) -> None:
        self.url, self.process, self.home = serving.url, serving.process, home

    def ask(self, model: str = "chat", **more: object) -> requests.Response:
        body = {"model": model, "prompt": "what is", "max_tokens": 8, "temperature": 0, **more}
        return requests.post(f"{self.url}/v1/completions", json=body, timeout=120)

    def version(self, model: str = "chat") -> str | None:
        return self.ask(model).headers.get("x-dray-version")

    def do(self, *words: str) -> None:
        assert main(["serve", *words, "--storage", str(self.home / "runs")]) == 0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("served")
    save_small_writer(home / "first")
    change_weights(save_small_writer(home / "second"))
    with dray_serving(home, "--name", f"chat={home / 'first'}") as serving:
        yield Service(serving, home)


def test_a_version_is_shadow_canary_promoted_and_rolled_back_under_requests(service: Service):
    second = str(service.home / "second")
    first_text = service.ask().json()["choices"][0]["text"]
    assert service.version() == "1"
    assert promoted_version(service.url, "chat") == 1
    assert promoted_version(service.url, "nobody") is None
    assert service.ask("chat@2").status_code == 404

    answers: list[tuple[int, str | None, str]] = []
    ended = threading.Event()

    def go_on() -> None:
        while not ended.is_set():
            found = service.ask()
            text = found.json()["choices"][0]["text"] if found.ok else found.text
            answers.append((found.status_code, found.headers.get("x-dray-version"), text))

    threads = [threading.Thread(target=go_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        service.do("promote", "chat", second, "--shadow")
        wait_for(lambda: service.ask("chat@2").ok, "the shadow", 300)
        assert {version for _, version, _ in answers} == {"1"}
        second_text = service.ask("chat@2").json()["choices"][0]["text"]
        assert second_text != first_text

        service.do("promote", "chat", second, "--share", "0.5")
        wait_for(lambda: "2" in {version for _, version, _ in answers}, "the canary", 120)
        users = {name: {service.ask(user=name).headers["x-dray-version"] for _ in range(2)}
                 for name in ("ada", "bob", "cy")}  # fmt: skip
        assert all(len(versions) == 1 for versions in users.values())

        service.do("promote", "chat", second)
        wait_for(lambda: {service.version() for _ in range(6)} == {"2"}, "the promotion", 120)
        assert promoted_version(service.url, "chat") == 2
        assert service.ask("chat@1").status_code == 404

        service.do("rollback", "chat")
        wait_for(lambda: {service.version() for _ in range(6)} == {"1"}, "the rollback", 120)
    finally:
        ended.set()
        for thread in threads:
            thread.join(120)
    assert {status for status, _, _ in answers} == {200}
    texts = {"1": first_text, "2": second_text}
    assert all(text == texts[str(version)] for _, version, text in answers)


def test_what_cannot_be_loaded_changes_nothing(service: Service):
    broken = service.home / "broken"
    save_small_writer(broken)
    (path,) = broken.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    service.do("promote", "chat", str(broken))
    out = service.home / "out"
    wait_for(lambda: "was not loaded" in out.read_text(), "the failure", 300, out.read_text)
    assert service.version() == "1"
    service.do("rollback", "chat")
    assert service.version() == "1"


def test_it_ends_while_a_version_is_being_loaded(service: Service):
    service.do("promote", "chat", str(change_weights(save_small_writer(service.home / "third"))))
    name = "ServeReplica:model-chat-v4"
    wait_for(lambda: processes_named(name, service.process), "the replica that loads", 120)
    service.process.terminate()
    assert service.process.wait(60) == 0
