"""The files of cluster/monitoring for services: by Prometheus' own tools, and by a real Prometheus
beside a real service."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from dray.cluster.nodes import answers
from dray.feedback import Dataset
from dray.serve.held_keys import Ring, create_key
from dray.serve.metering import METRICS, PREFIX
from dray.serve.recalling import Recall
from dray.serve.request_log import Logged
from dray.serve.served import Served
from ports import free_ports
from promtool import MONITORING, alerts, check, fires, needs, panels, running
from served_here import served_here
from small_writer import save_small_writer
from waiting import wait_for

RULES, DASHBOARD, CONFIG = "alerts_serving.yml", "grafana_serving.json", "prometheus_serving.yml"


def test_what_is_charted_or_watched_is_exposed_and_all_that_is_exposed_is_charted():
    charted = json.dumps(panels(DASHBOARD))
    watched = json.dumps([rule["expr"] for rule in alerts(RULES).values()])
    named = {re.sub("_bucket$", "", name) for name in re.findall(rf"{PREFIX}\w+", charted)}
    assert named == {PREFIX + name for name in METRICS}
    for text in (charted, watched):
        for name, matchers in re.findall(rf"{PREFIX}(\w+)\{{([^}}]*)\}}", text):
            labels, _ = METRICS[name.removesuffix("_bucket")]
            assert set(re.findall(r"(\w+)(?:=|!)", matchers)) <= set(labels), (name, matchers)
    assert set(re.findall(rf"{PREFIX}(\w+?)(?:_bucket)?\b", watched)) <= set(METRICS)


@needs("promtool")
def test_prometheus_accepts_the_rules_and_the_configuration(tmp_path: Path):
    check("promtool", "check", "rules", RULES)
    folder = shutil.copytree(MONITORING, tmp_path / "monitoring")
    (folder / "dray_serve.key").write_text("dray-key")
    check("promtool", "check", "config", CONFIG, folder=folder)


def requested(status: str) -> str:
    about = f'model="m",version="1",route="/predict",status="{status}"'
    return f"dray_serve_requests_total{{{about}}}"


def first_byte(le: str) -> str:
    about = f'model="m",version="1",route="/predict",le="{le}"'
    return f"dray_serve_first_byte_seconds_bucket{{{about}}}"


def drift(of: str) -> str:
    about = f'model="m",version="1",of="{of}",reference="held_out"'
    return f"dray_serve_drift{{{about}}}"


READY, QUEUE = 'dray_serve_ready{model="m"}', 'dray_serve_queue{model="m"}'
FULL = 'dray_serve_refusals_total{code="overloaded",status="429"}'
RIGHT, WRONG = (
    f'dray_serve_feedback_total{{model="m",version="1",verdict="{said}"}}'
    for said in ("right", "wrong")
)
UP, LOST = 'up{job="dray_serve",instance="i"}', "dray_serve_log_lost_total"
STEADY = {
    UP: "1x400",
    READY: "1x400",
    QUEUE: "3x400",
    requested("200"): "0+600x400",
    requested("503"): "0+1x400",
    first_byte("1"): "0+590x400",
    first_byte("+Inf"): "0+600x400",
    FULL: "0x400",
    drift("input_length"): "0.04x400",
    drift("class"): "0.05x400",
    RIGHT: "0+9x400",
    WRONG: "0+1x400",
    LOST: "0x400",
}
"""Series of a service that is well, a minute a sample."""
TROUBLES: dict[str, dict[str, str]] = {
    "DrayServeDown": {UP: "1x150 0x250"},
    "DrayServeNoReplica": {READY: "1x150 0x250"},
    "DrayServeNoAnswers": {
        requested("200"): "0+600x150 90000x250",
        requested("503"): "0+1x150 150+300x250",
    },
    "DrayServeErrors": {requested("503"): "0+1x150 150+30x250"},
    "DrayServeSlow": {first_byte("1"): "0+300x400", first_byte("10"): "0+600x400"},
    "DrayServeQueue": {QUEUE: "3x150 200x250"},
    "DrayServeOverloaded": {FULL: "0x150 0+60x250"},
    "DrayServeInputDrift": {drift("input_length"): "0.04x150 0.4x250"},
    "DrayServeScoreDrift": {drift("class"): "0.05x150 0.4x250"},
    "DrayServeFeedbackFalls": {WRONG: "0+1x150 150+9x250"},
    "DrayServeLogLost": {LOST: "0x190 0+5x210"},
}
"""Alert → what differs from that where it is to fire, 200 minutes later."""


@needs("promtool")
@pytest.mark.parametrize("alert", sorted(TROUBLES))
def test_each_alert_fires_for_its_trouble_alone(alert: str, tmp_path: Path):
    """With the thresholds as they are, on a clock of promtool's own."""
    assert set(TROUBLES) == set(alerts(RULES))
    assert fires(RULES, alert, STEADY | TROUBLES[alert], tmp_path)
    assert not fires(RULES, alert, STEADY, tmp_path)


@pytest.mark.slow
@needs("prometheus")
def test_a_real_service_is_scraped_with_a_key_for_metrics(tmp_path: Path):
    """Every panel but those of troubles has data."""
    token = create_key(str(tmp_path / "runs"), "prometheus", scopes=["metrics"])
    write = {"Authorization": f"Bearer {create_key(str(tmp_path / 'runs'), 'team')}"}
    model = Served(folder=str(save_small_writer(tmp_path / "writer")))
    ring, logged = Ring(str(tmp_path / "runs")), Logged(file=str(tmp_path / "log"))
    folder = shutil.copytree(MONITORING, tmp_path / "monitoring")
    (folder / "dray_serve.key").write_text(f"{token}\n")
    config: dict[str, Any] = yaml.safe_load((folder / CONFIG).read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (port,) = free_ports(1)

    def ask(expression: str) -> list[Any]:
        found = requests.get(
            f"http://127.0.0.1:{port}/api/v1/query", {"query": expression}, timeout=10
        )
        assert found.status_code == 200, (expression, found.text)
        return [one for one in found.json()["data"]["result"] if one["value"][1] != "NaN"]

    recall = Recall(Dataset(str(tmp_path / "runs"), "said"))
    with served_here([model], ring=ring, logged=logged, recall=recall) as service:
        config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{service.port}"]}]
        (folder / CONFIG).write_text(yaml.safe_dump(config))
        words = [
            "prometheus",
            f"--config.file={folder}/{CONFIG}",
            f"--storage.tsdb.path={tmp_path}/tsdb",
            f"--web.listen-address=127.0.0.1:{port}",
        ]

        def answered(expression: str) -> bool:
            body = {"model": "writer", "prompt": ["what is"] * 32, "max_tokens": 2}
            url = f"{service.url}/v1/completions"
            for more in ({}, {"stream": True}, {"n": 99}):
                found = requests.post(url, json=body | more, headers=write, timeout=60)
                said = {"id": found.headers["x-request-id"], "rating": "down"}
                place = f"{service.url}/v1/feedback"
                requests.post(place, json=said, headers=write, timeout=60)
            return bool(ask(expression))

        with running(*words, log=tmp_path / "prometheus.log"):
            wait_for(lambda: answers("127.0.0.1", port), "Prometheus", 60)
            wait_for(lambda: ask("up == 1"), "a scrape", 60)
            for title, expressions in panels(DASHBOARD).items():
                for expression in expressions if "hadows" not in title else ():
                    asked = expression.replace("$model", ".*")
                    wait_for(lambda asked=asked: answered(asked), f"{title}: {asked}", 60)
            assert not ask('ALERTS{alertname="DrayServeDown"}')
    ring.close()
