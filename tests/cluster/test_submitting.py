"""`dray submit` against a real head with a token, through its server of jobs alone."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from dray.release.export.manifest import verify_folder
from dray.serve.versions import Record
from heads import Head, dray, environment, started_head
from ports import free_ports
from small_disk import small_disk
from tiny import tiny_tree


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started_head() as found:
        yield found


@pytest.fixture
def home(tmp_path: Path, tiny_corpus: Path) -> Path:
    """A working directory with a spec, whose data lies beside it."""
    shutil.copytree(tiny_corpus, tmp_path / "texts")
    (tmp_path / "work").mkdir()
    (tmp_path / "texts" / ".hidden.jsonl").touch()
    tree = {**tiny_tree(Path("../texts")), "resources": {"workers": 1}}
    (tmp_path / "work" / "spec.yaml").write_text(yaml.safe_dump(tree))
    shutil.copyfile(tmp_path / "texts" / "part-0.jsonl", tmp_path / "held_out.jsonl")
    (tmp_path / "runs").mkdir()
    return tmp_path / "work"


def hashes(home: Path, storage: Path, run: str) -> dict[str, Any]:
    done = dray(home, None, "verify", run, "--storage", str(storage), "--json")
    assert done.returncode == 0, done.stderr
    return {key: json.loads(done.stdout)[key] for key in ("step", "weights_sha256")}


def test_a_submitted_run_is_the_run_at_home(home: Path, head: Head):
    storage = home.parent / "runs"
    words = ["train", "spec.yaml", "--storage", str(storage), "--address", head.jobs, "--json"]
    done = dray(home, head.token, "submit", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "completed"
    assert "step 6/6" in done.stderr  # as it is seen at home
    assert "submitted with 5 files" in done.stderr
    assert "1 file beside them left out" in done.stderr
    assert "ray" not in done.stderr.lower().replace("dray", "")
    secret = head.token.read_text()
    assert secret not in done.stdout + done.stderr

    local = dray(home, None, "train", "spec.yaml", "--storage", str(storage), "--run", "home")
    assert local.returncode == 0, local.stderr
    assert hashes(home, storage, "tiny") == hashes(home, storage, "home")
    for path in storage.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path

    listed = dray(home, head.token, "runs", "--address", head.jobs, "--json")
    (job,) = [job for job in json.loads(listed.stdout) if job["storage"] == str(storage)]
    assert (job["run"], job["status"], job["exit_code"]) == ("tiny", "SUCCEEDED", 0)

    again = dray(home, head.token, "submit", *words)  # a new job, which finds the run complete
    assert again.returncode == 0
    assert "complete at step 6" in again.stderr


@pytest.mark.slow
def test_a_second_submit_follows_the_first_and_a_stop_saves_the_state(home: Path, head: Head):
    storage = home.parent / "runs"
    words = ["train", "spec.yaml", "--run", "long", "--storage", str(storage)]
    words += ["duration.steps=100000", "--address", head.jobs]
    first = dray(home, head.token, "submit", "--detach", *words)
    assert first.returncode == 0, first.stderr
    assert "dray stop long" in first.stderr
    second = subprocess.Popen(
        [sys.executable, "-m", "dray.cli", "submit", *words],
        cwd=home,
        env=environment(head.token),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    other = dray(home, head.token, "submit", *words, "optimizer.learning_rate=0.1")
    assert other.returncode == 2
    assert "is at work on long with another command" in other.stderr
    assert second.stderr is not None
    lines: list[str] = []
    for line in second.stderr:
        lines.append(line)
        if line.startswith("step "):
            break
    assert "is at work on long already" in lines[0]
    second.send_signal(signal.SIGINT)  # leaves it alone
    assert second.wait(30) == 0
    assert "goes on without you" in second.stderr.read()
    time.sleep(1)
    stopped = dray(home, head.token, "stop", "long", "--address", head.jobs)
    assert stopped.returncode == 0, stopped.stderr
    assert "STOPPED" in stopped.stdout
    assert hashes(home, storage, "long")["step"] > 0
    nobody = dray(home, head.token, "stop", "long", "--address", head.jobs)
    assert nobody.returncode == 2
    assert "ended as STOPPED" in nobody.stderr


def test_a_mistake_there_has_its_exit_code_here(home: Path, head: Head):
    storage = home.parent / "runs"
    done = dray(
        home,
        head.token,
        *("submit", "--wait", "train", "spec.yaml", "--storage", str(storage)),
        *("--address", head.jobs, "resources.workers=64", "--run", "huge"),
    )
    assert done.returncode == 2
    assert "resources.workers = 64: the cluster has 4 CPUs" in done.stderr
    assert "exit code 2" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_release_ends_with_a_version_that_services_of_the_storage_follow(home: Path, head: Head):
    storage, folder = home.parent / "runs", home.parent / "exported"
    done = dray(
        home,
        head.token,
        *("submit", "--wait", "release", "spec.yaml", "--until", "promote"),
        *("--storage", str(storage), "--address", head.jobs, "--run", "released"),
        *("compress.methods=int8", f"export={{folder: {folder}}}", "serve={name: tiny-served}"),
    )
    assert done.returncode == 0, done.stderr
    assert verify_folder(str(folder)).ok
    state = Record(str(storage), "tiny-served").read()
    assert state.versions[state.stable].run == "released-int8"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "spec.yaml"], "--storage ./runs: lies in a job's working directory"),
        (["train", "no.yaml", "--storage", "/x"], "no.yaml"),
        (["show", "tiny"], "'show' is no command for a cluster"),
        (["release", "spec.yaml", "--storage", "/x", "serve={}"], "give --until promote"),
        (
            ["release", "spec.yaml", "--storage", "/x", "export={folder: out}"],
            "export.0.folder = out: lies in a job's working directory",
        ),
        (
            ["release", "spec.yaml", "--storage", "/x", "export={folder: /y, sign: key.pem}"],
            "export.0.sign = key.pem: lies in a job's working directory",
        ),
        ([], "no command is given"),
        (
            ["train", "spec.yaml", "--storage", "s3://KEY:SECRET12345@b/runs"],
            "a word of the command holds credentials",
        ),
        (
            ["train", "spec.yaml", "--storage", "s3://b/runs?secret_key=SECRET12345"],
            "a word of the command holds credentials",
        ),
        (
            ["train", "spec.yaml", "--storage", "/x", "data.train=[s3://K:SECRET12345@b/a]"],
            "a word of the command holds credentials",
        ),
        (["train", "spec.yaml", "--storage", "/x", "--run", "a?b"], "not a name"),
        (
            [
                *("train", "spec.yaml", "--storage", "/x", "--max-package", "0"),
                "data.validation={path: ../held_out.jsonl}",
            ],
            "the package would have 6 files",
        ),
        (["train", "/proc/self/status", "--storage", "/x"], "/proc/self/status"),
        (
            ["train", "spec.yaml", "--storage", "/x", "--max-package", "0"],
            "the package would have 5 files",
        ),
    ],
)
def test_what_cannot_be_submitted_is_one_line(home: Path, words: list[str], said: str):
    (port,) = free_ports(1)
    done = dray(home, None, "submit", *words, "--address", f"http://127.0.0.1:{port}")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
    assert "SECRET12345" not in done.stderr


def test_who_may_not_or_cannot_is_told_so(home: Path, head: Head, tmp_path: Path):
    wrong = tmp_path / "wrong"
    wrong.touch(0o600)
    wrong.write_text("0" * 64)
    (port,) = free_ports(1)
    for token, address, said in (
        (None, head.jobs, "wants a token"),
        (wrong, head.jobs, "wants another token than the one that is here"),
        (head.token, f"http://127.0.0.1:{port}", "no server of jobs answers"),
        (head.token, "127.0.0.1:1", "is no address of a server of jobs"),
    ):
        for words in (["submit", "train", "spec.yaml", "--storage", "/x"], ["stop", "x"]):
            done = dray(home, token, *words, "--address", address)
            assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
            assert said in done.stderr


@pytest.mark.slow
def test_a_full_disk_of_the_head_is_told(home: Path):
    """The agent that starts jobs ends first, and soon the head with it."""
    with (
        tempfile.TemporaryDirectory(prefix="df", dir="/tmp") as place,
        small_disk(Path(place, "d"), 60) as disk,
        started_head(disk=disk) as head,
    ):
        with (disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(2**16))
        words = ["submit", "train", "spec.yaml", "--storage", str(home.parent / "runs")]
        done = dray(home, head.token, *words, "--address", head.jobs)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "disk is full" in line
