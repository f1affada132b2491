"""What people say of answers: bound to their own request, once, and only what can be said of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from dray.corpus.prepare import prepare
from dray.feedback import Dataset
from dray.serve.held_keys import Ring, create_key
from dray.serve.recalling import Recall
from dray.serve.served import Served
from dray.spec import make_spec
from dray.train import train_locally
from served_here import Address, served_here
from small_writer import save_small_writer
from tiny import tiny_tree
from waiting import wait_for

pytestmark = pytest.mark.usefixtures("local_ray")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Asking:
    """A service with two models, and two people who have keys for it."""

    def __init__(self, address: Address, storage: str, dataset: Dataset, recall: Recall) -> None:
        self.address, self.dataset, self.recall = address, dataset, recall
        self.tokens = {name: create_key(storage, name) for name in ("ann", "ben")}
        for name in self.tokens:
            wait_for(lambda name=name: self.get(name).status_code != 401, "the key", 30)

    def get(self, who: str) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.tokens[who]}"}
        return requests.get(f"{self.address.url}/v1/models", headers=headers, timeout=60)

    def post(self, who: str, path: str, body: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.tokens[who]}"}
        return requests.post(f"{self.address.url}{path}", json=body, headers=headers, timeout=60)

    def classify(self, who: str, *texts: str) -> str:
        found = self.post(who, "/classify", {"model": "mood", "input": list(texts)})
        assert found.status_code == 200, found.text
        return found.headers["x-request-id"]

    def say(self, who: str, id: str, **said: Any) -> requests.Response:
        return self.post(who, "/v1/feedback", {"id": id, **said})


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run that tells good from bad, a little."""
    home = tmp_path_factory.mktemp("said")
    rows = [{"text": f"{word} {n}", "label": word} for n in range(60) for word in ("good", "bad")]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = tiny_tree(home, task="sequence_classification", model={"architecture": "bert"})
    tree["data"] |= {
        "train": [{"path": str(home / "rows.jsonl"), "label": "label"}],
        "sequence_tokens": 16,
    }
    tree |= {"duration": {"steps": 4}, "resources": {"workers": 1}}
    spec = make_spec(tree)
    prepare(spec, str(home / "runs"))
    train_locally(spec, storage=str(home / "runs"), run_name="mood")
    return str(home / "runs")


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def asking(
    storage: str, clock: Clock, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Asking]:
    writer = save_small_writer(tmp_path_factory.mktemp("served") / "writer")
    dataset = Dataset(storage, "said")
    recall = Recall(dataset, seconds=3600, clock=clock)
    ring = Ring(storage, poll_seconds=0.1)
    models = [Served(storage=storage, run="mood"), Served(folder=str(writer))]
    with served_here(models, key=b"the-one", ring=ring, recall=recall) as address:
        yield Asking(address, storage, dataset, recall)
    ring.close()


def entry(asking: Asking, id: str) -> Any:
    return next(one for one in asking.dataset.entries() if one.id == id)


def test_what_is_said_is_kept_with_what_was_asked_and_answered(asking: Asking) -> None:
    request = asking.classify("ann", "good 1", "bad 2")
    found = asking.say("ann", request, index=1, label="good", comment="it was meant so")
    assert found.json() == {"object": "feedback", "id": f"{request}-1", "dataset": "said"}
    kept = entry(asking, f"{request}-1")
    assert (kept.asked, kept.label, kept.route) == ({"text": "bad 2"}, "good", "classify")
    assert kept.answered in ("good", "bad")
    assert (kept.model, kept.version, kept.key) == ("mood", 1, "ann")
    assert kept.record() == {"text": "bad 2", "label": "good"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_was_written_is_kept_whole(asking: Asking, stream: bool) -> None:
    messages = [{"role": "user", "content": "what is it?"}]
    body = {"model": "writer", "messages": messages, "max_tokens": 6, "stream": stream}
    answer = asking.post("ann", "/v1/chat/completions", body)
    said = asking.say("ann", answer.headers["x-request-id"], rating="down", text="a test")
    assert said.status_code == 200, said.text
    kept = entry(asking, said.json()["id"])
    assert kept.asked["messages"][0]["content"] == "what is it?"
    assert isinstance(kept.answered, str)
    if not stream:
        assert kept.answered == answer.json()["choices"][0]["message"]["content"]
    assert kept.record()["messages"][-1] == {"role": "assistant", "content": "a test"}
    assert kept.judgement()["label"] is False


def test_each_of_several_answers_has_its_own(asking: Asking) -> None:
    body = {"model": "writer", "prompt": ["a", "b"], "n": 2, "max_tokens": 3}
    answer = asking.post("ann", "/v1/completions", body)
    request = answer.headers["x-request-id"]
    assert asking.say("ann", request, index=3, rating="up").status_code == 200
    kept = entry(asking, f"{request}-3")
    assert kept.asked == {"prompt": "b"}
    assert kept.answered == answer.json()["choices"][3]["text"]
    assert asking.say("ann", request, index=4, rating="up").status_code == 404


def test_what_is_said_again_is_refused_and_changes_nothing(asking: Asking) -> None:
    request = asking.classify("ann", "good 3")
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(lambda _: asking.say("ann", request, label="bad"), range(8))]
    assert sorted(one.status_code for one in found) == [200] + [409] * 7
    assert asking.say("ann", request, label="good").json()["error"]["code"] == "already_said"
    assert entry(asking, f"{request}-0").label == "bad"


def test_nobody_says_something_of_anothers_answer(asking: Asking) -> None:
    request = asking.classify("ann", "good 4")
    refused = asking.say("ben", request, label="bad")
    unknown = asking.say("ben", "0" * 16, label="bad")
    assert (refused.status_code, unknown.status_code) == (404, 404)
    assert refused.json()["error"]["message"] == unknown.json()["error"]["message"]
    assert not any(one.id.startswith(request) for one in asking.dataset.entries())
    assert asking.say("ann", request, label="bad").status_code == 200


@pytest.mark.parametrize(
    ("said", "status", "message"),
    [
        ({}, 400, "a rating, a label or a text"),
        ({"label": "ugly"}, 400, "'ugly' is no class; they are bad, good"),
        ({"label": 3}, 400, "the prediction is a class"),
        ({"label": ["good"]}, 400, "the prediction is a class"),
        ({"text": "good"}, 400, "this is a prediction"),
        ({"rating": "sideways"}, 400, "rating"),
        ({"label": "bad", "comment": "x" * 2_001}, 400, "comment"),
        ({"label": "bad", "index": -1}, 400, "index"),
        ({"label": "bad", "more": 1}, 400, "more"),
    ],
)
def test_what_cannot_be_said_is_refused_and_can_be_said_rightly_then(
    asking: Asking, said: dict[str, Any], status: int, message: str
) -> None:
    request = asking.classify("ann", "good 5")
    found = asking.say("ann", request, **said)
    assert found.status_code == status
    assert message in found.json()["error"]["message"]
    assert asking.say("ann", request, rating="up").status_code == 200


@pytest.mark.parametrize("id", ["../../../etc", "0" * 15, "0" * 17, "G" * 16, ""])
def test_an_id_that_is_none_is_refused(asking: Asking, id: str) -> None:
    assert asking.say("ann", id, rating="up").status_code == 400


def test_what_was_refused_cannot_be_judged(asking: Asking) -> None:
    found = asking.post("ann", "/classify", {"model": "writer", "input": ["a"]})
    assert found.status_code == 404
    said = asking.say("ann", found.headers["x-request-id"], rating="up")
    assert said.status_code == 404


def test_an_answer_is_known_for_a_while(asking: Asking, clock: Clock) -> None:
    request = asking.classify("ann", "good 6")
    clock.now += 3601
    assert asking.say("ann", request, rating="up").status_code == 404
    assert asking.say("ann", asking.classify("ann", "good 7"), rating="up").status_code == 200


def test_what_is_said_is_counted_as_right_or_wrong(asking: Asking) -> None:
    right, wrong = (("mood", "1", verdict) for verdict in ("right", "wrong"))
    before = {name: asking.recall.counts[name] for name in (right, wrong)}
    request = asking.classify("ann", "good 8", "good 9", "good 10")
    found = asking.post("ann", "/classify", {"model": "mood", "input": ["good 8"]}).json()
    guess = found["predictions"][0]["prediction"]
    other = "bad" if guess == "good" else "good"
    for index, label in enumerate((guess, other)):
        assert asking.say("ann", request, index=index, label=label).status_code == 200
    assert asking.say("ann", request, index=2, rating="down").status_code == 200
    after = asking.recall.counts
    assert after[right] - before[right] in (1, 2)  # of other texts the guess may differ
    assert after[right] + after[wrong] - sum(before.values()) == 3
    metrics = requests.get(
        f"{asking.address.url}/metrics", headers={"Authorization": "Bearer the-one"}, timeout=60
    )
    assert 'dray_serve_feedback_total{model="mood",verdict="wrong",version="1"}' in metrics.text


def test_what_is_kept_in_memory_is_bounded(storage: str, tmp_path: Path) -> None:
    from dray.serve.asked import Asked

    recall = Recall(Dataset(str(tmp_path), "few"), num_bytes=2_000)
    requests_ = []
    for number in range(50):
        request = Asked(model="mood", version=1, status=200, is_whole=True)
        request.records, request.answers = [{"text": f"{number} " + "x" * 100}], {0: "good"}
        recall.keep(request, "/classify")
        requests_.append(request)
    kept = [request for request in requests_ if request.id in recall._kept]
    assert kept == requests_[-len(kept) :]
    assert 5 < len(kept) < 20
    assert recall._num_bytes <= 2_000
