"""The page of `cluster/`, followed word for word on two machines by somebody who has nothing but
dray: only the addresses and the folder that both see are other ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dray.runs import Run
from lan import Machine, lan, needs_lan

pytestmark = [pytest.mark.slow, needs_lan]
PAGE = Path(__file__).parents[2] / "cluster" / "README.md"


def commands(title: str) -> list[tuple[str, str]]:
    """The commands of a section, each with what its comment says."""
    text = PAGE.read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", text, flags=re.S | re.M)
    found = []
    for block in re.findall(r"```\n(.*?)```", section, flags=re.S):
        for line in block.splitlines():
            command, _, comment = line.partition("#")
            found.append((command.strip(), comment.strip()))
    return found


def test_two_machines_by_hand(tmp_path: Path):
    shared = tmp_path / "shared"
    shared.mkdir()
    with lan(2, network=85) as site:
        first, other = site.machines
        home = site.machines[0].folder / "home"
        home.mkdir()
        for machine in (first, other):
            machine.hide(Path("/tmp/ray"))
            environment = machine.environment
            environment.pop("RAY_AUTH_TOKEN_PATH")
            environment |= {"HOME": str(home), "RAY_AUTH_MODE": "token"}

        def run(machine: Machine, command: str) -> str:
            command = command.replace("~", str(home)).replace("/mnt/shared", str(shared))
            command = command.replace("192.168.0.10", first.address)
            command = command.replace("192.168.0.11", other.address)
            done = machine.run("sh", "-c", command, seconds=400)
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            return done.stdout + done.stderr

        for command, _ in commands("A token first"):
            run(first, command)
        assert (home / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
        said = ""
        for command, comment in commands("Two machines that you have, by hand"):
            said = run(other if comment == "on the other one" else first, command)
        assert "completed" in said
        for machine in (first, other):  # each had a rank, by Ray's logs there
            logs = "/tmp/ray/session_latest/logs"
            found = machine.run("sh", "-c", f"grep -rl actor_name:RayTrainWorker {logs}/worker-*")
            assert found.stdout, machine.address
    run_folder = Run.open(str(shared / "runs"), "quickstart")
    assert [attempt.num_ranks for attempt in run_folder.attempts()] == [2]
