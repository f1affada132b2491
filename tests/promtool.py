"""The files of cluster/monitoring, and Prometheus' own tools on them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

MONITORING = Path(__file__).parents[1] / "cluster" / "monitoring"


def needs(*tools: str) -> pytest.MarkDecorator:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed (Debian)")


def check(*words: str, folder: Path = MONITORING) -> None:
    """Have a tool check a file of a folder."""
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def alerts(file: str) -> dict[str, dict[str, Any]]:
    """The rules of a file by name."""
    document = yaml.safe_load((MONITORING / file).read_text())
    return {rule["alert"]: rule for group in document["groups"] for rule in group["rules"]}


def panels(file: str) -> dict[str, list[str]]:
    """The queries of a dashboard by panel."""
    document = json.loads((MONITORING / file).read_text())
    return {
        panel["title"]: [target["expr"] for target in panel["targets"]]
        for panel in document["panels"]
        if panel["type"] != "row"
    }


def fires(file: str, alert: str, series: Mapping[str, str], folder: Path, about: str = "") -> bool:
    """Whether an alert fires once 200 minutes later, by promtool's own clock. `series`: values a
    minute apart; `about`: further labels of the alert that is meant."""
    shutil.copy(MONITORING / file, folder)
    expression = f'count(ALERTS{{alertname="{alert}",alertstate="firing"{about}}})'
    test = {
        "interval": "1m",
        "input_series": [{"series": key, "values": text} for key, text in series.items()],
        "promql_expr_test": [
            {
                "expr": expression,
                "eval_time": "200m",
                "exp_samples": [{"labels": "{}", "value": 1}],
            }
        ],
    }
    tests = folder / "tests.yml"
    tests.write_text(yaml.safe_dump({"rule_files": [file], "tests": [test]}))
    done = subprocess.run(
        ["promtool", "test", "rules", str(tests)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 or "got:" in done.stdout + done.stderr, done.stderr
    return done.returncode == 0


@contextmanager
def running(*words: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program for the time of the block."""
    with log.open("wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)
