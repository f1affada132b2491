"""A run behind HTTP, as KubeRay's RayService starts it: the same configuration is put to the same
interface of a real head, and asked over HTTP."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import yaml

from dray.corpus.stream import read_rows
from dray.errors import SpecError
from dray.release.predict import Predicted
from dray.serve.guard import CALLBACK
from dray.serve.keys import KEY as KEY_NAME
from dray.serve.keys import read_key
from dray.serve.loading import load_served
from dray.serve.served import Served
from dray.serve.service import application
from heads import dray, started_head
from ports import free_ports
from tiny import tiny_tree
from waiting import wait_for

MANIFEST = Path(__file__).parents[2] / "cluster" / "kuberay" / "rayservice.yaml"
KEY = "key-of-the-service"
WORDS = {"good": "fine lovely warm", "bad": "dull broken cold"}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that tells a few words apart."""
    home = tmp_path_factory.mktemp("served")
    rows = [{"text": f"{word} thing {n}", "label": label} for n in range(400)
            for label, words in WORDS.items() for word in words.split()]  # fmt: skip
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = tiny_tree(
        home,
        task="sequence_classification",
        model={"architecture": "bert"},
        duration={"steps": 60},
        resources={"workers": 1},
    )
    tree["data"] |= {"train": [{"path": "rows.jsonl", "label": "label"}], "sequence_tokens": 16}
    (home / "spec.yaml").write_text(yaml.safe_dump(tree))
    done = dray(home, None, "train", "spec.yaml", "--storage", "runs", "--run", "words")
    assert done.returncode == 0, done.stderr
    return home / "runs"


class Asked:
    def __init__(self, address: str) -> None:
        self.address = address

    def __call__(
        self, body: Any, key: str | None = KEY, path: str = "/predict"
    ) -> requests.Response:
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {key}"} if key is not None else {}
        data = body if isinstance(body, bytes) else json.dumps(body)
        return requests.post(f"{self.address}{path}", data=data, headers=headers, timeout=60)


def environment_of_nodes() -> dict[str, str]:
    """What the manifest gives the head, where the gateway or the proxy may be, as it does the
    workers, and the image all nodes."""
    cluster = yaml.safe_load(MANIFEST.read_text())["spec"]["rayClusterConfig"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    for group in cluster["workerGroupSpecs"]:
        (worker,) = group["template"]["spec"]["containers"]
        assert worker["env"] == head["env"]
    found = {item["name"]: item.get("value", KEY) for item in head["env"]}
    assert found == {KEY_NAME: KEY, CALLBACK: "dray.serve.guard:middlewares"}
    assert f"{CALLBACK}={found[CALLBACK]}" in (MANIFEST.parents[1] / "Dockerfile").read_text()
    return found


@pytest.fixture(scope="module")
def ask(storage: Path) -> Iterator[Asked]:
    (port,) = free_ports(1)
    config = yaml.safe_load(yaml.safe_load(MANIFEST.read_text())["spec"]["serveConfigV2"])
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    (application,) = config["applications"]
    application["args"] = {"storage": str(storage), "run": "words"}
    application["deployments"][0]["ray_actor_options"]["num_cpus"] = 1
    with started_head(num_cpus=2, variables=environment_of_nodes()) as head:
        token = {"Authorization": f"Bearer {head.token.read_text()}"}
        serve = f"{head.jobs}/api/serve/applications/"
        put = requests.put(serve, json=config, headers=token, timeout=120)
        assert put.ok, put.text

        def runs() -> bool:
            told = requests.get(serve, headers=token, timeout=60).json()["applications"]["model"]
            assert told["status"] not in ("DEPLOY_FAILED", "UNHEALTHY"), json.dumps(told)
            return bool(told["status"] == "RUNNING")

        wait_for(runs, "a replica", 180)
        yield Asked(f"http://127.0.0.1:{port}")
        requests.delete(serve, headers=token, timeout=60)


def test_records_are_predicted_in_their_order_as_dray_predict_does(ask: Asked, storage: Path):
    texts = ["fine thing", "cold thing", "lovely broken thing", "warm"]
    found = ask({"records": [{"text": text} for text in texts]}).json()["predictions"]
    (storage.parent / "asked.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    words = ["predict", "words", "--storage", str(storage), "--data", "asked.jsonl"]
    told = dray(storage.parent, None, *words)
    assert told.returncode == 0, told.stderr
    expected = [json.loads(line) for line in told.stdout.splitlines()]
    assert [item["prediction"] for item in found] == [item["prediction"] for item in expected]
    assert [item["prediction"] for item in found][:2] == ["good", "bad"]
    for one, other in zip(found, expected, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], rel=1e-5)


def test_keys_of_the_storage_are_taken_beside_that_of_the_environment(ask: Asked, storage: Path):
    made = dray(storage.parent, None, "serve", "key", "create", "team", "--storage", str(storage))
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    body = {"records": [{"text": "fine"}]}
    wait_for(lambda: ask(body, key).status_code == 200, "the new key", 30)
    assert ask(body).ok
    dray(storage.parent, None, "serve", "key", "revoke", "team", "--storage", str(storage))
    wait_for(lambda: ask(body, key).status_code == 401, "the end of the key", 30)


def test_classes_are_told_of_texts_as_the_task_says(ask: Asked):
    body = {"model": "words", "input": ["fine thing", "cold thing"]}
    found = ask(body, path="/classify").json()
    assert found["model"] == "words"
    assert [item["prediction"] for item in found["predictions"]] == ["good", "bad"]
    refused = ask({"model": "words", "prompt": "fine"}, path="/v1/completions")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "no_such_route")


def test_one_bad_record_has_an_error_of_its_own(ask: Asked):
    records = [{"text": "fine"}, {"txt": "fine"}, {"text": 3}, {"text": "dull"}]
    found = ask({"records": records}).json()["predictions"]
    assert [item.get("prediction") for item in found] == ["good", None, None, "bad"]
    assert [item.get("error") for item in found[1:3]] == ["no 'text'", "'text' is not a string"]


def test_requests_that_come_together_have_their_own_answers(ask: Asked):
    from concurrent.futures import ThreadPoolExecutor

    words = [word for words in WORDS.values() for word in words.split()] * 8
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda word: ask({"records": [{"text": word}]}).json(), words))
    labels = {word: label for label, text in WORDS.items() for word in text.split()}
    assert [item["predictions"][0]["prediction"] for item in found] == [labels[w] for w in words]


@pytest.mark.parametrize("key", [None, "", "wrong", f"{KEY}x"])
def test_without_the_key_nothing_is_told(ask: Asked, key: str | None):
    found = ask({"records": [{"text": "fine"}]}, key)
    assert found.status_code == 401
    assert not any(word in found.text for word in ("words", KEY))


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b"[" * 100_000, 400),
        ([], 400),
        ({"records": []}, 400),
        ({"records": ["fine"]}, 400),
        ({"records": [{"text": "fine"}] * 1_001}, 400),
        (b" " * 1_000_001, 413),
        (b" " * 3_000_000, 413),  # by the guard before Ray's proxy
    ],
)
def test_a_bad_body_is_refused_and_the_service_goes_on(ask: Asked, body: Any, status: int):
    assert ask(body).status_code == status
    assert ask({"records": [{"text": "fine"}]}).json()["predictions"][0]["prediction"] == "good"


def test_prometheus_is_told_of_requests_and_replicas(ask: Asked):
    assert ask({"records": [{"text": "fine"}]}).status_code == 200
    headers = {"Authorization": f"Bearer {KEY}"}
    found = requests.get(f"{ask.address}/metrics", headers=headers, timeout=60).text
    answered = 'dray_serve_requests_total{model="words",route="/predict",status="200",version="1"}'
    assert any(line.startswith(answered) for line in found.splitlines()), found
    assert 'dray_serve_ready{model="words"} 1.0' in found
    assert 'dray_serve_queue{model="words"} 0.0' in found
    assert "fine" not in found


def test_a_drift_of_what_is_asked_and_answered_is_told(ask: Asked):
    """Measured from held-out rows, which a replica has computed."""
    headers = {"Authorization": f"Bearer {KEY}"}
    draws = random.Random(1)

    def drift(words: list[str]) -> float | None:
        """Of classes, once 16 × 32 records with some of these words have been asked."""
        for _ in range(16):
            texts = [f"{draws.choice(words)} thing {draws.randrange(400)}" for _ in range(32)]
            assert ask({"records": [{"text": text} for text in texts]}).status_code == 200
        found = requests.get(f"{ask.address}/metrics", headers=headers, timeout=60).text
        about = 'dray_serve_drift{model="words",of="class",reference="held_out",version="1"}'
        told = [line for line in found.splitlines() if line.startswith(about)]
        return float(told[0].split()[-1]) if told else None

    both = [word for words in WORDS.values() for word in words.split()]
    wait_for(lambda: drift(both) is not None, "the reference", 60)
    assert (drift(both) or 0) < 0.1
    assert (drift(WORDS["good"].split()) or 0) > 0.5


def test_drift_is_measured_from_what_the_model_makes_of_held_out_rows(storage: Path):
    """As it does of their texts."""
    predictor = load_served(Served(storage=str(storage), run="words")).predictor
    assert predictor is not None
    trained = predictor.trained
    split = trained.manifest.validation
    assert split is not None
    rows = read_rows(trained.corpus, trained.manifest, split, np.arange(split.num_rows))
    ids, lengths = rows.column("input_ids").to_pylist(), rows.column("num_tokens").to_pylist()
    texts = [trained.decode(row[:length]) for row, length in zip(ids, lengths, strict=True)]
    expected = predictor.predict([{"text": text} for text in texts])

    def told(some: list[Predicted]) -> list[tuple[int, int, str, float]]:
        return sorted(
            (one.num_tokens, one.num_unknown, one.told["prediction"],
             round(max(one.told["scores"].values()), 4))
            for one in some
        )  # fmt: skip

    found = predictor.predict_held_out(10_000, 60)
    assert len(found) == split.num_rows > 5
    assert told(found) == told(expected)
    assert len(predictor.predict_held_out(3, 60)) == 3
    assert predictor.predict_held_out(10_000, -1) == []


def test_without_a_key_no_replica_starts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DRAY_SERVE_KEY", raising=False)
    with pytest.raises(SpecError, match="DRAY_SERVE_KEY: is not set"):
        read_key()
    monkeypatch.setenv("DRAY_SERVE_KEY", " ")
    monkeypatch.setenv("DRAY_OPEN_SERVICE", "0")
    with pytest.raises(SpecError, match="DRAY_SERVE_KEY: is not set"):
        read_key()
    monkeypatch.setenv("DRAY_OPEN_SERVICE", "1")
    assert read_key() == b""


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"storage": "runs"}, "a run or a folder is served"),
        ({"storage": "runs", "run": "a", "ste": 1}, "args.ste"),
        ({"storage": "runs", "run": "../a"}, "args.run"),
        ({"storage": "runs", "run": "a", "log": {"fil": "x"}}, "args.fil"),
        ({"storage": "runs", "run": "a", "step": "bset"}, "args.step"),
        ({"storage": "runs", "run": "a", "step": True}, "args.step"),
        (None, "args"),
    ],
)
def test_wrong_args_are_named(arguments: dict[str, Any], where: str):
    with pytest.raises(SpecError, match=where):
        application(arguments)
