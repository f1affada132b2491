"""`dray serve` from its start to its end, with a replica killed under load, and what it refuses. It
starts a `local_ray` of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import requests

from dray.errors import SpecError
from dray.serve.foreground import check_open
from dray.serve.served import Served, read_words
from dray_serving import Serving, dray_serving
from small_writer import save_small_writer
from waiting import processes_named, wait_for


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Two models."""
    home = tmp_path_factory.mktemp("served")
    writer = save_small_writer(home / "writer")
    with dray_serving(home, str(writer), "--name", f"other={writer}") as serving:
        yield serving


@pytest.fixture(scope="module")
def client(service: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=120
    ) as found:
        yield found


def test_both_models_answer(client: openai.OpenAI):
    assert sorted(model.id for model in client.models.list()) == ["other", "writer"]
    texts = [
        client.completions.create(model=model, prompt="what is", max_tokens=8, temperature=0)
        .choices[0]
        .text
        for model in ("writer", "other")
    ]
    assert texts[0] == texts[1]
    pieces = client.completions.create(
        model="writer", prompt="what is", max_tokens=8, temperature=0, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces) == texts[0]


def test_a_body_that_is_too_long_is_refused_before_ray_has_it(service: Serving):
    body = {"model": "writer", "prompt": "word " * 2_000_000}
    found = requests.post(f"{service.url}/v1/completions", json=body, timeout=60)
    assert (found.status_code, found.json()["error"]["code"]) == (413, "body_too_long")


def test_no_request_is_lost_when_a_replica_is_killed(service: Serving, client: openai.OpenAI):
    """The answers of all are those of a quiet service."""

    def complete(seed: int) -> str:
        found = client.completions.create(
            model="writer", prompt="what is", max_tokens=60, seed=seed, logit_bias={"0": -100}
        )
        assert found.choices[0].finish_reason == "length"
        return found.choices[0].text

    expected = complete(3)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(complete, 3) for _ in range(40)]
        wait_for(lambda: any(answer.done() for answer in answers), "an answer", 120)
        (replica,) = processes_named("ServeReplica:model-writer", service.process)
        replica.kill()
        assert [answer.result(240) for answer in answers] == [expected] * 40


def test_it_ends_when_it_is_told_to_and_answers_what_was_asked(
    service: Serving, client: openai.OpenAI
):
    pieces = client.completions.create(
        model="other", prompt="what is", max_tokens=150, logit_bias={"0": -100}, stream=True
    )
    next(iter(pieces))
    service.process.send_signal(signal.SIGINT)
    rest = list(pieces)
    assert rest[-1].choices[0].finish_reason == "length"
    assert service.process.wait(120) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to serve"),
        (("nothing-here", "--port", "99999"), "65535"),
        (("a", "--name", "b"), "no NAME=RUN"),
        (("a@b",), "@b is no step"),
        (("a", "--storage", "nowhere"), "nowhere"),
        (("a", "--host", "0.0.0.0"), "asks for a key everywhere but on loopback"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(words: tuple[str, ...], message: str):
    kept = {name: text for name, text in os.environ.items() if not name.startswith("DRAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "dray.cli", "serve", *words],
        env=kept,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_words_name_runs_steps_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert read_words("a", "runs") == Served(storage="runs", run="a")
    assert read_words("a@best", "runs", "b") == Served(
        name="b", storage="runs", run="a", step="best"
    )
    assert read_words("a@12", "runs").step == 12
    (tmp_path / "model").mkdir()
    with pytest.raises(SpecError, match=r"no config\.json"):
        read_words(str(tmp_path / "model"), "runs")
    (tmp_path / "model" / "config.json").write_text("{}")
    assert read_words(str(tmp_path / "model"), "runs").called == "model"
    monkeypatch.delenv("DRAY_SERVE_KEY", raising=False)
    monkeypatch.delenv("DRAY_OPEN_SERVICE", raising=False)
    with pytest.raises(SpecError, match="--host 10"):
        check_open("10.0.0.1")
