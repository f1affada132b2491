"""Workers of a real Ray that are forks of their node's server, and what becomes of them without
it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dray.cluster.workers import fork_environment
from dray.processes import forkserver

pytestmark = pytest.mark.skipif(
    not hasattr(os, "pidfd_open"), reason="this system has no pidfd_open"
)


class Cluster:
    """A process of its own with a local Ray, whose driver runs what it is told."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(folder), "RAY_TMPDIR": "/tmp", "RAY_ADDRESS": "local"},
        )

    def probe(self, kind: str, **environment: str) -> dict[str, Any]:
        """What a new worker of that kind says about itself."""
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps([kind, environment]), file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def end(self) -> None:
        self.process.communicate("", timeout=60)


DRIVER = textwrap.dedent("""
    import json, os, resource, sys, threading
    import ray
    from dray.cluster.connection import fork_environment

    def faults():
        found = []
        def take_and_free():
            for _ in range(3):
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                bytearray(2**26)
                found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        thread = threading.Thread(target=take_and_free)
        thread.start()
        thread.join()
        return found[-1]

    @ray.remote(num_cpus=0)
    class Worker:
        def probe(self):
            from ray._raylet import WorkerID
            parent = os.getppid()
            return {"pid": os.getpid(), "parent": parent, "random": WorkerID.from_random().hex(),
                    "parent_command": open(f"/proc/{parent}/cmdline").read().split(chr(0)),
                    "group": os.getpgrp(), "path": sys.path, "colour": os.environ.get("COLOUR"),
                    "loaded": [name for name in ("torch", "deepspeed", "ray.data")
                               if name in sys.modules],
                    "log": os.readlink("/proc/self/fd/1"), "asks": os.environ["RAY_ADDRESS"],
                    "faults": faults(), "cluster": ray.get_runtime_context().gcs_address,
                    "main": sys.modules["__main__"].__file__}

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    kept = []
    for line in sys.stdin:
        kind, environment = json.loads(line)
        runtime_env = {**fork_environment(kind, {}), "env_vars": environment}
        kept.append(Worker.options(runtime_env=runtime_env).remote())
        print(json.dumps(ray.get(kept[-1].probe.remote(), timeout=120)), flush=True)
""")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("sockets"))
    yield cluster
    cluster.end()


def is_forked(found: dict[str, Any]) -> bool:
    return "dray.processes.forkserver" in found["parent_command"]


def test_workers_are_forks_with_what_is_theirs(cluster: Cluster):
    first, second = cluster.probe("light", COLOUR="red"), cluster.probe("light", COLOUR="blue")
    assert is_forked(first)
    assert second["parent"] == first["parent"]
    assert (first["loaded"], second["loaded"]) == (
        ["ray.data"],
        ["ray.data"],
    )  # no torch, which may touch CUDA
    assert (first["colour"], second["colour"]) == ("red", "blue")
    assert (
        first["random"] != second["random"]
    )  # Ray's ids come from a generator that a fork would copy
    for found in (first, second):
        assert found["group"] == found["pid"]  # Ray ends the process group of a dead worker
        assert found["main"].endswith("default_worker.py")
        assert str(Path(found["main"]).parent) in found["path"]
        assert str(found["pid"]) in found["log"]
        assert found["asks"] == found["cluster"]  # whatever else runs, or ran, on this machine


def test_ranks_are_forks_of_one_that_has_imported_more(cluster: Cluster):
    first, second = cluster.probe("full"), cluster.probe("full")
    assert is_forked(first)
    assert second["parent"] == first["parent"]
    assert first["loaded"] == ["torch", "deepspeed", "ray.data"]
    assert first["random"] != second["random"]
    assert (
        first["faults"] < 1000
    )  # pages; what a thread frees is kept, where 64 MiB would be 16,384 of them again
    assert psutil.Process(first["parent"]).ppid() == cluster.probe("light:full")["parent"]


def test_a_server_that_was_killed_is_replaced(cluster: Cluster):
    before = cluster.probe("full")
    full = psutil.Process(before["parent"])
    light = full.parent()
    assert light
    full.kill()
    light.wait(10)  # one without the other is replaced by none
    after = cluster.probe("full")
    assert is_forked(after)
    assert after["parent"] != before["parent"]
    assert psutil.pid_exists(before["pid"])  # its children live on


@pytest.mark.slow
def test_a_worker_does_not_wait_for_a_server_that_does_not_answer(cluster: Cluster):
    server = psutil.Process(cluster.probe("light")["parent"])
    children = len(server.children())
    server.suspend()
    try:
        alone = cluster.probe("light")
        assert not is_forked(alone)
    finally:
        server.resume()
    time.sleep(2)
    later = cluster.probe("light")
    assert later["parent"] == server.pid
    assert len(server.children()) == children + 1  # it has not forked for the one that had given up


def start_alone(
    tmp_path: Path, kind: str = "light", before: str = "", **environment: str
) -> tuple[str, str]:
    """What a worker prints that cannot be a fork, and its words on standard error. It is started as
    Ray would."""
    script = tmp_path / "worker.py"
    script.write_text("import os, sys; print(sys.argv[1:], os.getpid())")
    code = (
        f"import sys; from dray.processes import forkserver\n{before}\n"
        f"forkserver.become_worker({kind!r}, [{str(script)!r}, '--a', 'b c'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    "before",
    [
        "import os; del os.pidfd_open",
        "import os\ndef refuse(pid): raise OSError(38, 'Function not implemented')\nos.pidfd_open "
        "= refuse",
        "import socket\ndef refuse(*_): raise OSError('AF_UNIX path too long')\n"
        "socket.socket = type('S', (socket.socket,), {'bind': refuse})",
        "import os\ndef refuse(*_, **__): raise OSError(30, 'Read-only file system')\nos.makedirs "
        "= refuse",
    ],
)
def test_a_node_that_can_have_no_server_starts_workers_as_ray_does(tmp_path: Path, before: str):
    """What such systems (gVisor, a read-only /tmp) answer stands in for them."""
    out, err = start_alone(tmp_path, before=before)
    assert out.startswith("['--a', 'b c']")
    assert err.startswith(
        "dray: this worker imports everything itself, since this node can have no fork server ("
    )
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("bad", ["long", "entered by others", "not a folder"])
def test_sockets_lie_elsewhere_where_their_folder_cannot_be_used(
    tmp_path: Path, monkeypatch: Any, bad: str
):
    parent = tmp_path / ("x" * 100 if bad == "long" else "x")
    parent.mkdir()
    folder = parent / f"dray-fork-{os.getuid()}"
    if bad == "entered by others":
        folder.mkdir()
        folder.chmod(0o777)
    elif bad == "not a folder":
        folder.write_text("")
    monkeypatch.setenv("TMPDIR", str(parent))
    place = forkserver._find_place(with_full=True)
    assert not place.startswith(str(tmp_path))
    assert Path(place).parent.stat().st_mode & 0o077 == 0
    assert bad != "entered by others" or not list(folder.iterdir())


@pytest.mark.slow
def test_servers_end_with_their_raylet(tmp_path: Path):
    cluster = Cluster(tmp_path)
    servers = [psutil.Process(cluster.probe(kind)["parent"]) for kind in ("light", "full")]
    cluster.process.send_signal(signal.SIGKILL)
    cluster.process.wait()
    _, alive = psutil.wait_procs(servers, timeout=60)
    assert not alive
    assert not list((tmp_path / f"dray-fork-{os.getuid()}").iterdir())


def test_a_server_ends_when_it_has_no_children(tmp_path: Path):
    server = forkserver.Server(str(tmp_path / "x.light"))
    assert server.serve(os.pidfd_open(os.getpid()), idle_seconds=1.5) is None
    assert not (tmp_path / "x.light").exists()


def test_a_request_that_makes_no_sense_is_dropped(tmp_path: Path):
    server = forkserver.Server(str(tmp_path / "x.light"))
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(tmp_path / "x.light"))
        connection.sendall(b"nonsense")
        connection.close()
        assert server.serve(os.pidfd_open(os.getpid()), idle_seconds=1.5) is None


def test_a_node_without_this_file_uses_its_own_python(tmp_path: Path):
    command = forkserver.make_command("light").replace(
        forkserver.__file__, str(tmp_path / "absent.py")
    )
    script = tmp_path / "worker.py"
    script.write_text("import sys; print(sys.argv[1:])")
    # As Ray puts it together.
    said = subprocess.check_output(
        ["bash", "-c", f"exec {command} {script} --a 'b c'"],
        text=True,
        env={**os.environ, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"},
    )
    assert said.strip() == "['--a', 'b c']"


def test_paths_with_signs_of_the_shell_are_kept_together(tmp_path: Path, monkeypatch: Any):
    folder = tmp_path / 'it\'s $HOME; "a" b'
    folder.mkdir()
    file = folder / "forkserver.py"
    file.write_text("import sys; print(sys.argv[1:])")
    monkeypatch.setattr(forkserver, "__file__", str(file))
    command = forkserver.make_command("light")
    said = subprocess.check_output(["bash", "-c", f"exec {command} worker.py --a 'b c'"], text=True)
    assert said.strip() == "['light', 'worker.py', '--a', 'b c']"
    assert forkserver.is_command(command)


@pytest.mark.parametrize(
    "job",
    [
        {"pip": ["x"]},
        {"uv": ["x"]},
        {"conda": "x"},
        {"image_uri": "x"},
        {"py_executable": "uv run python"},
    ],
)
def test_a_job_with_its_own_python_keeps_it(job: dict[str, Any]):
    assert fork_environment("full", job) == {}
    assert fork_environment("full", {"working_dir": "x", **fork_environment("light", {})})
