"""The gauges, and the files of cluster/monitoring: by Prometheus' own tools, and with a real
Prometheus and Alertmanager beside a real run."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest
import requests
import yaml

from dray.cluster.gauges import GAUGES, PREFIX
from heads import Head, dray, started_head
from ports import free_ports
from promtool import MONITORING, alerts, check, fires, needs, panels, running
from tiny import tiny_tree
from waiting import rank_processes, wait_for

SECONDS = 90
T = TypeVar("T")


def test_what_is_charted_or_watched_is_a_gauge_and_every_gauge_is_charted():
    charted = set(re.findall(r"ray_(\w+)", json.dumps(panels("grafana.json"))))
    watched = set(
        re.findall(
            r"ray_(\w+)", json.dumps([rule["expr"] for rule in alerts("alerts.yml").values()])
        )
    )
    known = {PREFIX + name for name in GAUGES}
    assert charted | watched == known


@needs("promtool")
def test_prometheus_accepts_the_rules_and_the_configuration():
    check("promtool", "check", "rules", "alerts.yml")
    check("promtool", "check", "config", "prometheus.yml")


@needs("amtool")
def test_alertmanager_accepts_its_configuration():
    check("amtool", "check-config", "alertmanager.yml")


RUN = 'run="r"'
STEADY = {
    f"ray_dray_running{{{RUN}}}": "1x400",
    # A minute a sample; the clock of promtool's tests begins at 0.
    f"ray_dray_progress_timestamp_seconds{{{RUN}}}": "0+60x400",
    f"ray_dray_checkpoint_timestamp_seconds{{{RUN}}}": "0+60x400",
    f"ray_dray_loss_is_finite{{{RUN}}}": "1x400",
    f"ray_dray_goodput{{{RUN}}}": "0.95x400",
    f"ray_dray_failed_saves{{{RUN}}}": "0x400",
    f"ray_dray_storage_free_bytes{{{RUN}}}": "500e9x400",
    f"ray_dray_storage_bytes{{{RUN}}}": "1000e9x400",
}
"""Series of a run that is well."""
TROUBLES: dict[str, dict[str, str]] = {
    "DrayNoProgress": {"progress_timestamp_seconds": "0+60x100 6000x300"},
    "DrayDriverGone": {"running": "1x190 stale _x209"},
    "DrayLossNotFinite": {"loss_is_finite": "1x150 0x250"},
    "DrayLowGoodput": {"goodput": "0.95x100 0.5x300"},
    "DrayCheckpointTooOld": {"checkpoint_timestamp_seconds": "0+60x60 3600x340"},
    "DraySavesFail": {"failed_saves": "0x180 1x220"},
    "DrayDiskFilling": {"storage_free_bytes": "500e9-4e9x400"},
    "DrayFailures": {'failures{run="r",cause="node_loss"}': "_x170 1+1x6 6x300"},
}
"""Alert → what differs from that where it is to fire, 200 minutes later."""


@needs("promtool")
@pytest.mark.parametrize("alert", sorted(TROUBLES))
def test_each_alert_fires_for_its_trouble_alone(alert: str, tmp_path: Path):
    """With the thresholds as they are, on a clock of promtool's own."""
    assert set(TROUBLES) == set(alerts("alerts.yml"))
    troubled = dict(STEADY)
    for name, values in TROUBLES[alert].items():
        troubled["ray_dray_" + (name if "{" in name else f"{name}{{{RUN}}}")] = values

    about = ',run="r"'
    assert fires("alerts.yml", alert, troubled, tmp_path, about)
    assert not fires("alerts.yml", alert, STEADY, tmp_path, about)


# ---- for real ----------------------------------------------------------------------------------


class Receiver:
    """Takes Alertmanager's messages: alert → its newest status."""

    def __init__(self, port: int) -> None:
        self.told: dict[str, str] = {}
        told = self.told

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                told.update({one["labels"]["alertname"]: one["status"] for one in body["alerts"]})
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started_head() as found:
        yield found


@pytest.mark.slow
@needs("prometheus", "prometheus-alertmanager")
def test_a_real_run_is_scraped_and_its_alerts_fire_and_resolve(
    head: Head, tiny_corpus: Path, tmp_path: Path
):
    """A run stands still since a rank of it is stopped, and goes on. A minute and a half."""
    prometheus, manager, receiver = free_ports(3)
    folder = tmp_path / "monitoring"
    shutil.copytree(MONITORING, folder)
    quick = (folder / "alerts.yml").read_text().replace("> 900)", "> 20)")
    (folder / "alerts.yml").write_text(quick)
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    found = head.token.parent / "r" / "prom_metrics_service_discovery.json"
    config["scrape_configs"][0]["file_sd_configs"] = [
        {"files": [str(found)], "refresh_interval": "2s"}
    ]
    config["alerting"]["alertmanagers"][0]["static_configs"] = [
        {"targets": [f"127.0.0.1:{manager}"]}
    ]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    route = yaml.safe_load((folder / "alertmanager.yml").read_text())
    route["route"] |= {"group_wait": "1s", "group_interval": "1s"}
    route["receivers"][0]["webhook_configs"][0]["url"] = f"http://127.0.0.1:{receiver}/alerts"
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(route))

    def ask(expression: str) -> list[Any]:
        answer = requests.get(
            f"http://127.0.0.1:{prometheus}/api/v1/query", {"query": expression}, timeout=10
        )
        assert answer.status_code == 200, (expression, answer.text)
        return list(answer.json()["data"]["result"])

    spec = tmp_path / "spec.yaml"
    tree = tiny_tree(tiny_corpus, duration={"steps": 100_000}, resources={"workers": 2})
    tree |= {"checkpoint": {"every_steps": 200}, "validation": {"every_steps": 200}}
    tree["watchdog"] = {"silent_seconds": 600}  # here the alert is to notice it
    spec.write_text(yaml.safe_dump(tree))
    words = ["--storage", str(tmp_path / "runs"), "--address", head.jobs]

    def command(*given: str) -> subprocess.CompletedProcess[str]:
        return dray(tmp_path, head.token, *given, *words)

    with ExitStack() as stack:
        told = Receiver(receiver).told
        stack.enter_context(
            running(
                "prometheus",
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={tmp_path}/tsdb",
                f"--web.listen-address=127.0.0.1:{prometheus}",
                log=tmp_path / "prometheus.log",
            )
        )
        stack.enter_context(
            running(
                "prometheus-alertmanager",
                f"--config.file={folder}/alertmanager.yml",
                f"--storage.path={tmp_path}/alertmanager",
                f"--web.listen-address=127.0.0.1:{manager}",
                "--cluster.listen-address=",
                log=tmp_path / "alertmanager.log",
            )
        )
        begun = command("submit", "--detach", "train", "spec.yaml", "--run", "watched")
        assert begun.returncode == 0, begun.stderr
        stack.callback(command, "stop", "watched")
        wait_for(lambda: ask("ray_dray_checkpoint_step > 0"), "no checkpoint was scraped", SECONDS)
        wait_for(lambda: ask("ray_dray_validation"), "no validation was scraped", SECONDS)
        of_a_sweep = {"Trials by status", "Best trial"}
        of_trouble = {"Failed attempts by cause"}
        for title, expressions in panels("grafana.json").items():
            for expression in expressions if title not in of_a_sweep | of_trouble else ():
                asked = expression.replace("$run", "watched")
                wait_for(lambda asked=asked: ask(asked), f"{title}: {asked} has no data", 30)
        # On a busy machine the first step may come later than the threshold of this test.
        wait_for(lambda: told.get("DrayNoProgress") != "firing", "it does not go on", SECONDS)
        told.clear()

        rank = wait_for(lambda: rank_processes(head.process), "no rank was found", SECONDS)[-1]
        rank.suspend()
        try:
            wait_for(lambda: told.get("DrayNoProgress") == "firing", f"no alert: {told}", SECONDS)
        finally:
            rank.resume()
        wait_for(lambda: told.get("DrayNoProgress") == "resolved", f"not resolved: {told}", SECONDS)

        rank.kill()
        (asked,) = panels("grafana.json")["Failed attempts by cause"]
        wait_for(lambda: ask(asked.replace("$run", "watched")), "no failure was scraped", SECONDS)
        stopped = command("stop", "watched")
        assert stopped.returncode == 0, stopped.stderr
        wait_for(lambda: not ask("ray_dray_running"), "what has ended is still scraped", 60)
        assert "DrayDriverGone" not in told
