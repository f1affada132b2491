"""cluster/slurm.sh on a real Slurm of one node: `make slurm` (Debian's slurmctld, slurmd and
munge, as root)."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from dray.runs import Run, verify_checkpoint
from ports import free_ports
from tiny import tiny_tree

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm.sh"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or any(shutil.which(name) is None for name in PROGRAMS),
        reason="needs root, and Debian's slurmctld, slurmd and munge",
    ),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Slurm of this machine; the environment of its commands."""
    folder = tmp_path_factory.mktemp("slurm")
    host = socket.gethostname().partition(".")[0]
    controller, node = free_ports(2)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    settings = {
        "ClusterName": "dray",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge.sock",
        "CredType": "cred/munge",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SelectType": "select/cons_tres",
        "ReturnToService": "2",
        "MpiDefault": "none",
        "SlurmctldPort": str(controller),
        "SlurmdPort": str(node),
        "SlurmctldPidFile": f"{folder}/ctld.pid",
        "SlurmdPidFile": f"{folder}/d.pid",
        "SlurmdSpoolDir": f"{folder}/spool",
        "StateSaveLocation": f"{folder}/state",
        "SlurmctldLogFile": f"{folder}/ctld.log",
        "SlurmdLogFile": f"{folder}/d.log",
        "KillWait": "30",
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    lines += [
        f"NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN",
        "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
    ]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    for name in ("spool", "state"):
        (folder / name).mkdir()
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    munge = [
        *("munged", "--foreground", "--force", f"--socket={folder}/munge.sock"),
        *(f"--key-file={key}", f"--pid-file={folder}/munge.pid"),
        *(f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"),
    ]
    with ExitStack() as stack:
        for words in (munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
            out = stack.enter_context((folder / f"{words[0]}.out").open("wb"))
            process = subprocess.Popen(words, stdout=out, stderr=out, env=environment)
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
            time.sleep(1)
        deadline = time.monotonic() + 60
        while "idle" not in run(environment, "sinfo", "-h", "-o", "%T"):
            told = "\n".join(path.read_text() for path in folder.glob("*.out"))
            assert time.monotonic() < deadline, told
            time.sleep(0.5)
        yield environment


@pytest.fixture
def work(tmp_path: Path, tiny_corpus: Path) -> Path:
    tree = {**tiny_tree(tiny_corpus), "resources": {"workers": 1}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def run(environment: dict[str, str], *words: str) -> str:
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr


def submit(slurm: dict[str, str], work: Path, *words: str) -> str:
    environment = {
        **slurm,
        "DRAY_BIN": str(Path(sys.executable).parent),
        "RAY_PORT": str(free_ports(1)[0]),
        "HOME": str(work),
    }
    command = ["sbatch", "--parsable", "--nodes=1", f"--output={work}/out", f"--chdir={work}"]
    return run(environment, *command, str(SCRIPT), *words).strip()


def wait(slurm: dict[str, str], job: str, seconds: float = 400) -> str:
    """The state in which a job ended, with its exit code."""
    deadline = time.monotonic() + seconds
    while True:
        told = run(slurm, "scontrol", "show", "job", job, "-o")
        fields = dict(word.split("=", 1) for word in told.split() if "=" in word)
        if fields.get("JobState") not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            return f"{fields.get('JobState')} {fields.get('ExitCode')}"
        assert time.monotonic() < deadline, told
        time.sleep(1)


def test_a_run_on_slurm(slurm: dict[str, str], work: Path):
    job = submit(slurm, work, "train", "spec.yaml", "--storage", f"{work}/runs", "--json")
    ended = wait(slurm, job)
    told = (work / "out").read_text()
    assert ended == "COMPLETED 0:0", told
    assert Run.open(f"{work}/runs", "tiny").summary()["status"] == "completed"
    assert not list(work.glob(".dray-token-*"))  # the token ends with the cluster
    result, _ = json.JSONDecoder().raw_decode(told, told.index("\n{") + 1)
    assert result["step"] == 6


def test_a_job_that_is_told_to_end_has_saved_its_state(slurm: dict[str, str], work: Path):
    words = ["train", "spec.yaml", "--storage", f"{work}/runs", "duration.steps=100000"]
    job = submit(slurm, work, *words)
    deadline = time.monotonic() + 300
    while "step 1/" not in ((work / "out").read_text() if (work / "out").exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    run(slurm, "scancel", "--batch", "--signal=TERM", job)  # as Slurm does before the time is over
    assert wait(slurm, job) == "FAILED 143:0", (work / "out").read_text()
    found = Run.open(f"{work}/runs", "tiny")
    newest = found.latest_checkpoint()
    assert newest is not None
    assert newest.step > 0
    assert verify_checkpoint(found, newest).ok


def test_a_mistake_has_its_exit_code(slurm: dict[str, str], work: Path):
    job = submit(slurm, work, "train", "nothing.yaml", "--storage", f"{work}/runs")
    assert wait(slurm, job) == "FAILED 2:0", (work / "out").read_text()
