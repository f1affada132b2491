"""Where a local Ray puts its files, whose token it uses, and what is left of one that does not
start."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dray.cluster import local_ray as ray_start
from dray.errors import PlanError


@pytest.fixture(autouse=True)
def clean(tmp_path: Path) -> Iterator[None]:
    """No token, and no place that the person has chosen; afterwards this process' own Ray finds its
    token again."""
    with pytest.MonkeyPatch.context() as context:
        for name in (
            "RAY_AUTH_MODE",
            "RAY_AUTH_TOKEN",
            "RAY_AUTH_TOKEN_PATH",
            "RAY_TMPDIR",
            "TMPDIR",
        ):
            context.delenv(name, raising=False)
        context.setenv("HOME", str(tmp_path))
        yield
    ray_start._forget_token()


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
@pytest.mark.parametrize("place", ["/nowhere", f"/tmp/{'x' * 90}", "/proc"])
def test_rays_files_lie_in_a_folder_that_only_its_user_can_enter(
    monkeypatch: Any, capsys: Any, name: str, place: str
):
    monkeypatch.setenv(name, place)
    folder = Path(ray_start._make_folder())
    try:
        assert folder.parent == Path("/tmp")
        assert folder.stat().st_mode & 0o777 == 0o700
        assert ("RAY_TMPDIR=" in capsys.readouterr().err) is (name == "RAY_TMPDIR")
    finally:
        folder.rmdir()


def test_a_token_that_others_can_read_is_not_used(tmp_path: Path, monkeypatch: Any):
    file = tmp_path / ".ray" / "auth_token"
    assert not ray_start._has_own_token()
    file.parent.mkdir()
    file.write_text("0123456789abcdef")
    file.chmod(0o644)
    assert not ray_start._has_own_token()
    file.chmod(0o600)
    assert ray_start._has_own_token()
    file.unlink()
    for name, value, own in (
        ("RAY_AUTH_MODE", "disabled", True),
        ("RAY_AUTH_MODE", "token", False),
        ("RAY_AUTH_TOKEN", "x", True),
        ("RAY_AUTH_TOKEN_PATH", "/x", True),
    ):
        with monkeypatch.context() as context:
            context.setenv(name, value)
            assert ray_start._has_own_token() is own


def test_the_environment_is_as_it_was(monkeypatch: Any):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "before")
    with ray_start._environment({"RAY_AUTH_TOKEN": "inside", "RAY_AUTH_TOKEN_PATH": "inside"}):
        os.environ["RAY_AUTH_MODE"] = "token"  # as ray.init does
        assert os.environ["RAY_AUTH_TOKEN"] == "inside"
    assert os.environ["RAY_AUTH_TOKEN"] == "before"
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    assert "RAY_AUTH_MODE" not in os.environ


def test_a_local_ray_starts_what_a_run_needs_and_works():
    """In a process of its own, since this one may be connected already."""
    script = textwrap.dedent("""
        import os, psutil, ray
        from dray.cluster.connection import connect
        from dray.cluster.needs import Needs
        with connect(None, num_cpus=2):
            answer = ray.get(ray.remote(num_cpus=1)(lambda: 6 * 7).remote(), timeout=120)
            children = psutil.Process().children(recursive=True)
            commands = [" ".join(child.cmdline()) for child in children]
            beside = sum(os.getpgid(child.pid) == os.getpgrp() for child in children)
        print(answer, beside, *(sum(name in command for command in commands) for name in (
            "gcs_server", "raylet", "dashboard.py", "monitor.py", "log_monitor.py")))
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=180
    )
    answer, beside, gcs, raylet, *onlookers = map(int, done.stdout.split())
    assert (answer, gcs) == (42, 1)
    assert beside == 0, "what is sent to the driver's process group is for the driver alone"
    assert raylet >= 1
    assert onlookers == [0, 0, 0]


def test_of_a_ray_that_does_not_start_nothing_stays(monkeypatch: Any):
    """A start that hangs half way stands in for a machine that is too busy."""
    started: list[psutil.Popen] = []
    folders: set[Path] = set()

    def fail(**options: Any) -> None:
        started.append(psutil.Popen(["sleep", "1000"]))
        folders.add(Path(options["_temp_dir"]).parent)
        assert Path(options["_temp_dir"]).parent.stat().st_mode & 0o077 == 0
        raise Exception("The current node timed out during startup.\nThis could happen.")

    monkeypatch.setattr("ray.init", fail)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    with pytest.raises(PlanError, match="current node timed out"), ray_start.local_ray():
        pass
    assert len(started) == 2  # it is tried again
    assert not any(process.is_running() for process in started)
    assert not any(folder.exists() for folder in folders)


def test_a_local_ray_ends_with_the_last_who_uses_it():
    """Two threads of a process that is not connected: one starts Ray, the other one leaves last."""
    script = textwrap.dedent("""
        import threading, ray
        from dray.cluster.connection import connect
        from dray.cluster.needs import Needs
        both, one_left, found = threading.Barrier(2), threading.Event(), []
        def use(name):
            with connect(None, num_cpus=2, worker=Needs({"CPU": 1})) as connection:
                both.wait()
                found.append(connection.local and connection.shape.oversubscribe)
                if name == "a":
                    return
                one_left.wait()
                found.append(ray.get(ray.remote(num_cpus=1)(lambda: 42).remote(), timeout=120))
        threads = [threading.Thread(target=use, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        while sum(thread.is_alive() for thread in threads) == 2:
            threads[0].join(0.1)
        one_left.set()
        for thread in threads:
            thread.join()
        print(*found, ray.is_initialized())
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=180
    )
    assert done.stdout.split() == ["True", "True", "42", "False"], done.stderr
