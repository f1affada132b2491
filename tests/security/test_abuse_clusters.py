"""Whom a cluster lets in and what is given to it: tokens, heads without one, and the package of a
submitted command."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import psutil
import pytest
import yaml

from dray.cluster import local_ray
from dray.cluster.local_ray import check_open
from dray.errors import PlanError, SpecError
from dray.jobs import make_package, staged
from heads import Head, dray, environment, started_head


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started_head(num_cpus=2) as found:
        yield found


@pytest.fixture(scope="module")
def open_head() -> Iterator[Head]:
    """Nobody asks for a token there."""
    with started_head(num_cpus=2, is_open=True) as found:
        yield found


def address_of_this_machine() -> str:
    """One by which other machines reach it."""
    for places in psutil.net_if_addrs().values():
        for place in places:
            if place.family == socket.AF_INET and not place.address.startswith("127."):
                return str(place.address)
    pytest.skip("this machine has no address but loopback")


def ways(home: Path, cluster: str, jobs: str) -> dict[str, list[str]]:
    """Commands that reach a cluster, by its address or its server of jobs."""
    storage = ["--storage", str(home.parent / "runs")]
    return {
        "train": ["train", "spec.yaml", *storage, "--address", cluster],
        "prepare": ["prepare", "spec.yaml", *storage, "--address", cluster],
        "tune": ["tune", "spec.yaml", "--space", "learning_rate", *storage, "--address", cluster],
        "submit": ["submit", "train", "spec.yaml", *storage, "--address", jobs],
        "stop": ["stop", "tiny", "--address", jobs],
        "runs": ["runs", "--address", jobs],
    }


def check_refused(
    done: subprocess.CompletedProcess[str], home: Path, *said: str, secret: str = "\0"
) -> None:
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert any(word in done.stderr for word in said), done.stderr
    assert secret not in done.stderr
    assert not (home.parent / "runs").exists()


# ---- tokens ------------------------------------------------------------------------------------


def some(*names: str) -> list[Any]:
    """Ways to a cluster; those that go as the first and the last one do are slow tests."""
    return [
        pytest.param(name, marks=() if name in (names[0], names[-1]) else pytest.mark.slow)
        for name in names
    ]


@pytest.mark.parametrize("way", some("train", "submit", "stop", "runs"))
def test_no_token(home: Path, head: Head, way: str):
    done = dray(home, None, *ways(home, head.address, head.jobs)[way])
    check_refused(done, home, "wants a token", "there is no token")


@pytest.mark.parametrize("way", some("train", "submit", "stop", "runs"))
def test_a_wrong_token(home: Path, head: Head, way: str):
    wrong = home.parent / "wrong"
    wrong.touch(0o600)
    wrong.write_text("5ec4e7" * 8)
    done = dray(home, wrong, *ways(home, head.address, head.jobs)[way])
    check_refused(done, home, "another token", secret="5ec4e7")


@pytest.mark.parametrize("token", ["", "\n", "a b", "x\r\nX-Evil: 1", "\x1b[2J"])
def test_a_token_that_is_none(home: Path, head: Head, token: str):
    """Nor a header of its own making."""
    file = home.parent / "odd"
    file.touch(0o600)
    file.write_text(token)
    done = dray(home, file, *ways(home, head.address, head.jobs)["runs"])
    check_refused(done, home, "another token", "holds no token", "no server of jobs answers")


def test_a_token_that_others_can_read_is_told_of(home: Path, head: Head, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copyfile(head.token, copy)
    words = ways(home, head.address, head.jobs)["runs"]
    for mode, lines in ((0o644, 1), (0o640, 1), (0o600, 0), (0o400, 0)):
        copy.chmod(mode)
        done = dray(home, copy, *words)
        assert done.returncode == 0, done.stderr
        assert len(done.stderr.splitlines()) == lines
        assert not lines or f"others can read it: chmod 600 {copy}" in done.stderr
        assert head.token.read_text() not in done.stderr + done.stdout


def test_a_token_is_hidden_once_it_was_read(head: Head, monkeypatch: pytest.MonkeyPatch):
    from dray.redaction import redact

    monkeypatch.setattr("dray.redaction._hidden", set())
    secret = head.token.read_text()
    assert secret in redact(f"said {secret}", {})
    with local_ray._environment({"RAY_AUTH_TOKEN_PATH": str(head.token)}):
        assert local_ray.token_header()
    assert secret not in redact(f"said {secret}", {})


# ---- heads without one -------------------------------------------------------------------------


@pytest.mark.parametrize("way", some("train", "prepare", "tune", "submit", "stop", "runs"))
def test_an_open_head_off_loopback(home: Path, open_head: Head, way: str):
    here = address_of_this_machine()
    cluster = open_head.address.replace("127.0.0.1", here)
    jobs = open_head.jobs.replace("127.0.0.1", here)
    done = dray(home, None, *ways(home, cluster, jobs)[way])
    check_refused(done, home, "asks for no token; whoever reaches such a cluster runs code on it")
    assert f"DRAY_OPEN_CLUSTER={here}" in done.stderr


def test_an_open_head_is_used_where_it_is_asked_for_by_name(home: Path, open_head: Head):
    """And where it is on loopback. It is sent no token."""
    here = address_of_this_machine()
    jobs = open_head.jobs.replace("127.0.0.1", here)
    for address, named in ((open_head.jobs, ""), (jobs, f"other,{here}")):
        done = dray(home, None, "runs", "--address", address, DRAY_OPEN_CLUSTER=named)
        assert done.returncode == 0, done.stderr
    done = dray(home, None, "runs", "--address", jobs, DRAY_OPEN_CLUSTER="other")
    assert done.returncode == 2
    cluster = open_head.address.replace("127.0.0.1", here)
    words = ways(home, cluster, jobs)["prepare"]
    done = dray(home, open_head.token, *words, DRAY_OPEN_CLUSTER=here, RAY_AUTH_MODE="token")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("host", "passes"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("localhost", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("192.0.2.7", False),
        ("127.0.0.1.evil.invalid", False),
        ("localhost.evil.invalid", False),
        ("2130706434.invalid", False),
        ("", False),
    ],
)
def test_what_is_loopback(host: str, passes: bool, monkeypatch: pytest.MonkeyPatch):
    for name in (local_ray.OPEN_CLUSTER, local_ray.IN_JOB):
        monkeypatch.delenv(name, raising=False)
    if passes:
        check_open("x:1", host)
        return
    with pytest.raises(PlanError, match="asks for no token"):
        check_open("x:1", host)


class _Nosy(BaseHTTPRequestHandler):
    """A server that is no cluster's and writes down what it is told."""

    told: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.told.append(f"{self.path} {dict(self.headers)}")
        self.send_response(200 if self.path.startswith("/api/version") else 500)
        self.end_headers()
        self.wfile.write(b'{"ray_version": "\x1b[2J", "version": "4"}')

    do_POST = do_PUT = do_GET

    def log_message(self, *_: object) -> None: ...


def test_a_server_that_asks_for_no_token_is_told_none(home: Path, head: Head):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Nosy)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        done = dray(home, head.token, *ways(home, "", address)["submit"])
    finally:
        server.shutdown()
        server.server_close()
    check_refused(done, home, "both sides have the same Ray", "no server of jobs")
    assert _Nosy.told
    assert head.token.read_text() not in "".join(_Nosy.told)


def test_a_local_ray_leaves_no_token_behind(tmp_path: Path):
    """Ray itself would write ~/.ray/auth_token, for all to read."""
    code = (
        "import os, ray\n"
        "from dray.cluster.connection import connect\n"
        "with connect(None, num_cpus=1):\n"
        "    print(os.environ['RAY_AUTH_TOKEN'] != '', ray.get_runtime_context().gcs_address)\n"
        "    from dray.cluster import local_ray\n"
        "    local_ray._ask(ray.get_runtime_context().gcs_address)\n"
    )
    kept = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True ")
    assert not (tmp_path / ".ray").exists()


def test_the_command_line_of_a_driver(home: Path, head: Head):
    """Ray shows it to all who see the cluster's jobs."""
    code = (
        "import sys, ray\n"
        "from ray.job_submission import JobSubmissionClient\n"
        "from dray.cluster.connection import connect\n"
        "with connect(sys.argv[1], num_cpus=1):\n"
        "    print([job.entrypoint for job in JobSubmissionClient(sys.argv[2]).list_jobs()])\n"
    )
    secret = "s3://AKIDEXAMPLEKEY:CANARY42%2Fsecret@bucket/x"
    done = subprocess.run(
        [sys.executable, "-c", code, head.address, head.jobs, secret],
        cwd=home,
        env=environment(head.token, RAY_AUTH_MODE="token"),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "s3://***@bucket/x" in done.stdout
    assert "CANARY42" not in done.stdout


# ---- what goes there ---------------------------------------------------------------------------


def test_a_link_in_the_package(home: Path):
    """Of whoever made the folder of data: the files of the one who submits it are none of it."""
    secret = home.parent / "secret"
    secret.write_text("key")
    (home / "file.jsonl").symlink_to(secret)
    (home / "folder").symlink_to(home.parent)
    (home / "texts" / "inner.jsonl").symlink_to("../../secret")
    (home / "within.jsonl").symlink_to("texts/part-0.jsonl")
    for name in ("file.jsonl", "folder/secret", "texts", "texts/inner.jsonl", "./file.jsonl"):
        with pytest.raises(SpecError, match="symbolic link"):
            make_package([name], 10**9, home)
    with staged(make_package(["within.jsonl"], 10**9, home)) as folder:
        assert (folder / "within.jsonl").is_file()
        assert not (folder / "within.jsonl").is_symlink()
    done = dray(home, None, *ways(home, "", "http://127.0.0.1:1")["submit"])
    check_refused(done, home, "symbolic link")


@pytest.mark.parametrize("name", [".env", ".ssh/id_rsa", "../.ssh/id_rsa", "texts/.netrc"])
def test_a_hidden_file_in_the_package(home: Path, name: str):
    (home / name).parent.mkdir(exist_ok=True)
    (home / name).write_text("key")
    with pytest.raises(SpecError, match="is hidden"):
        make_package([name], 10**9, home)
    spec = yaml.safe_load((home / "spec.yaml").read_text())
    spec["data"]["train"] = [{"path": name, "format": "lines"}]
    (home / "spec.yaml").write_text(yaml.safe_dump(spec))
    done = dray(home, None, *ways(home, "", "http://127.0.0.1:1")["submit"])
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "word",
    [
        "data.train=s3://AKIDEXAMPLEKEY:CANARY42secret@bucket/x",
        "data.train={path: 's3://bucket/x?secret_key=CANARY42secret'}",
        "--storage=s3://AKIDEXAMPLEKEY:CANARY42secret@bucket/x",
        "--run=hf_CANARY42secretCANARY42secret",
        "tracking={mlflow: 'https://me:CANARY42secret@host/x'}",
        "name=AKIAIOSFODNN7CANARY4",
    ],
)
def test_credentials_in_a_submitted_command(home: Path, word: str):
    words = ways(home, "", "http://127.0.0.1:1")["submit"]
    done = dray(home, None, *words, word)
    check_refused(done, home, "a word of the command holds credentials", secret="CANARY4")
    (home / "spec.yaml").open("a").write(f"\n# {word}\n")
    done = dray(home, None, *words)
    check_refused(done, home, "spec.yaml holds credentials", secret="CANARY4")
