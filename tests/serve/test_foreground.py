"""`dray serve` from its start to its end, with a replica killed under load, and what it refuses. It
starts a `local_ray` of its own."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import requests

from dray.errors import SpecError
from dray.release.export.manifest import verify_folder, write_manifest
from dray.serve.foreground import check_open
from dray.serve.served import Served, read_words
from dray_serving import Serving, dray_serving
from self_signed import save_certificate
from small_writer import save_small_writer
from waiting import processes_named, wait_for


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def log(home: Path) -> Path:
    return home / "requests.jsonl"


@pytest.fixture(scope="module")
def service(home: Path, log: Path) -> Iterator[Serving]:
    """Two models, over HTTPS, with a log."""
    writer = save_small_writer(home / "writer")
    tls = save_certificate(home / "tls")
    words = [str(writer), "--name", f"other={writer}", "--log", str(log)]
    with dray_serving(home, *words, tls=tls) as serving:
        yield serving


@pytest.fixture(scope="module")
def client(service: Serving) -> Iterator[openai.OpenAI]:
    with httpx.Client(verify=ssl.create_default_context(cafile=service.certificate)) as http:
        yield openai.OpenAI(
            base_url=f"{service.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=120,
            http_client=http,
        )


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
    found = requests.post(
        f"{service.url}/v1/completions", json=body, timeout=60, verify=str(service.certificate)
    )
    assert (found.status_code, found.json()["error"]["code"]) == (413, "body_too_long")


def test_nobody_is_answered_over_plain_http_or_without_trust(service: Serving):
    plain = service.url.replace("https", "http")
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{plain}/health", timeout=60)
    with pytest.raises(requests.exceptions.SSLError, match="self-signed"):
        requests.get(f"{service.url}/health", timeout=60)


def test_each_request_has_a_line_in_the_log_and_is_counted(
    service: Serving, client: openai.OpenAI, log: Path
):
    found = client.completions.with_raw_response.create(
        model="writer",
        prompt="what secret",
        max_tokens=3,
        logit_bias={"0": -100},
        extra_headers={"x-request-id": "of-somebody-else"},
    )
    (told,) = found.headers.get_list("x-request-id")
    wait_for(lambda: told in log.read_text(), "its line", 30)
    (line,) = [one for one in map(json.loads, log.read_text().splitlines()) if one["id"] == told]
    assert (line["model"], line["version"], line["status"]) == ("writer", 1, 200)
    assert line["tokens_out"] == 3
    assert "secret" not in log.read_text()
    metrics = requests.get(
        f"{service.url}/metrics", timeout=60, verify=str(service.certificate)
    ).text
    about = 'model="writer",route="/v1/completions",status="200",version="1"'
    assert f"dray_serve_requests_total{{{about}}}" in metrics
    for model in ("writer", "other"):
        assert f'dray_serve_ready{{model="{model}"}} 1.0' in metrics


def test_no_request_is_lost_when_a_replica_is_killed(service: Serving, client: openai.OpenAI):
    """The answers of all are those of a quiet service; streams go on where they broke off."""

    def complete(*, streams: bool) -> str:
        found = client.completions.create(
            model="writer",
            prompt="what is",
            max_tokens=60,
            seed=3,
            logit_bias={"0": -100},
            stream=streams,
        )
        choices = [piece.choices[0] for piece in (found if streams else [found])]
        assert choices[-1].finish_reason == "length"
        return "".join(choice.text for choice in choices)

    expected = complete(streams=False)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(complete, streams=turn % 2 == 0) for turn in range(40)]
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
        (("--name", "a/b=c"), "--name a/b: is no name"),
        (("a@b",), "@b is no step"),
        (("a", "--replicas", "4-1"), "the fewest first"),
        (("a", "--replicas", "many"), "is no number of replicas"),
        (("a", "--storage", "nowhere"), "nowhere"),
        (("a", "--log-bodies"), "needs --log FILE"),
        (("a", "--redact", "pseudonym"), "the environment variable is not set"),
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


def test_a_damaged_export_is_named_before_anything_is_started(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    write_manifest(tmp_path, {}, None)
    assert verify_folder(str(tmp_path)).ok
    (tmp_path / "config.json").write_text("{ }")
    done = subprocess.run(
        [sys.executable, "-m", "dray.cli", "serve", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "is damaged: config.json" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_words_name_runs_steps_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert read_words("a", "runs") == Served(storage="runs", run="a")
    assert read_words("a@best", "runs", "b") == Served(
        name="b", storage="runs", run="a", step="best"
    )
    assert read_words("a@12", "runs").step == 12
    with pytest.raises(SpecError, match="is given as --name NAME=RUN"):
        read_words("mood=a", "runs")
    (tmp_path / "model").mkdir()
    with pytest.raises(SpecError, match=r"no config\.json"):
        read_words(str(tmp_path / "model"), "runs")
    (tmp_path / "model" / "config.json").write_text("{}")
    assert read_words(str(tmp_path / "model"), "runs").called == "model"
    monkeypatch.delenv("DRAY_SERVE_KEY", raising=False)
    monkeypatch.delenv("DRAY_OPEN_SERVICE", raising=False)
    with pytest.raises(SpecError, match="--host 10"):
        check_open("10.0.0.1")
