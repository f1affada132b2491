"""A job that is lost with its driver or its head is begun anew by whoever supervises it, and its
run ends with the weights of one that nothing befell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from dray.runs import Run
from heads import Head, started_head
from tiny import tiny_tree

pytestmark = pytest.mark.slow
STEPS = 60


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started_head() as found:
        yield found


@pytest.fixture(scope="module")
def home(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tree = tiny_tree(tiny_corpus, resources={"workers": 1}, duration={"steps": STEPS})
    tree |= {"checkpoint": {"every_steps": 10}}
    (folder / "spec.yaml").write_text(yaml.safe_dump(tree))
    return folder


def submit(home: Path, head: Head, run: str, *more: str) -> subprocess.Popen[str]:
    words = ["submit", "train", "spec.yaml", "--run", run, "--storage", str(home / "runs"), *more]
    return subprocess.Popen(
        [sys.executable, "-m", "dray.cli", *words, "--address", head.jobs],
        cwd=home,
        env={**os.environ, "RAY_AUTH_TOKEN_PATH": str(head.token)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def weights(home: Path, run: str) -> Any:
    words = [sys.executable, "-m", "dray.cli", "verify", run, "--storage", str(home / "runs")]
    done = subprocess.run([*words, "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["ok"]
    return found["step"], found["weights_sha256"]


@pytest.fixture(scope="module")
def alone(home: Path, head: Head) -> Any:
    process = submit(home, head, "alone")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return weights(home, "alone")


def at_checkpoint(home: Path, run: str, fault: Callable[[], None]) -> None:
    """Have a fault happen once the run has a checkpoint."""
    deadline = time.monotonic() + 120
    while not ((found := Run.find(str(home / "runs"), run)) and found.latest_checkpoint()):
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.1)
    fault()


def kill_driver(head: Head) -> None:
    for process in head.process.children(recursive=True):
        words = process.cmdline()
        if "arrive" in words and "bash" not in words[0] and "sh" not in Path(words[0]).name:
            process.kill()


def test_a_killed_driver_is_followed_by_another_one(home: Path, head: Head, alone: Any):
    process = submit(home, head, "driverless", "--supervise")
    at_checkpoint(home, "driverless", lambda: kill_driver(head))
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "was lost: its driver was ended by signal 9; it is begun anew" in said
    assert "driverless goes on from step" in said
    assert weights(home, "driverless") == alone


def test_a_lost_head_is_waited_for(home: Path, head: Head, alone: Any):
    process = submit(home, head, "headless", "--supervise")
    at_checkpoint(home, "headless", head.kill)
    head.start()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "knows the job" in said
    assert "headless goes on from step" in said
    assert weights(home, "headless") == alone


def test_nobody_who_does_not_supervise_begins_anything(home: Path, head: Head):
    process = submit(home, head, "lost")
    at_checkpoint(home, "lost", lambda: kill_driver(head))
    _, said = process.communicate(timeout=300)
    assert process.returncode not in (0, 2)
    assert "FAILED" in said
    assert "begun anew" not in said


def test_what_fails_by_itself_is_not_begun_anew(home: Path, head: Head):
    process = submit(home, head, "huge", "--supervise", "resources.workers=64")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2, said
    assert "begun anew" not in said


def test_a_person_who_stops_it_is_obeyed(home: Path, head: Head):
    process = submit(home, head, "stopped", "--supervise", "duration.steps=100000")
    at_checkpoint(home, "stopped", lambda: None)
    words = [sys.executable, "-m", "dray.cli", "stop", "stopped", "--address", head.jobs]
    environment = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(head.token)}
    subprocess.run(words, env=environment, check=True, capture_output=True)
    _, said = process.communicate(timeout=120)
    assert "begun anew" not in said
    assert process.returncode in (130, 143), said
    assert not [one for one in psutil.Process().children() if one.pid == process.pid]
