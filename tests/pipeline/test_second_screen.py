"""The commands of the README's second screen, as they stand there, on the real reviews."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from waiting import wait_for

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
PORT = 8000

pytestmark = pytest.mark.slow


def commands() -> list[str]:
    """Of the block below its heading, without what is said of them."""
    text = (ROOT / "README.md").read_text("utf-8")
    block = text.partition("## From raw reviews to an answering service")[2]
    lines = block.partition("```sh\n")[2].partition("```")[0].splitlines()
    return [re.sub(r"\s+# .*", "", line) for line in lines]


class Shell:
    """A person's shell, in a folder beside the data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        bin_folder = str(Path(sys.executable).parent)
        kept = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
        self.environment = {**kept, "PATH": f"{bin_folder}:{kept.get('PATH', '')}"}

    def run(self, command: str) -> str:
        ended = subprocess.run(
            ["bash", "-c", command],
            check=False,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
        return ended.stdout

    def begin(self, command: str) -> psutil.Popen:
        with (self.folder / "service.log").open("wb") as log:
            words = command.removesuffix("&").split()
            return psutil.Popen(
                words, cwd=self.folder, env=self.environment, stdout=log, stderr=log
            )


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    if not DATA.is_dir():
        pytest.skip("the hotel reviews are not here")
    try:
        requests.get(f"http://127.0.0.1:{PORT}/health", timeout=2)
    except requests.ConnectionError:
        pass
    else:
        pytest.skip(f"somebody listens at port {PORT}, which the README names")
    (tmp_path / "shared").symlink_to(DATA.parent)
    (tmp_path / "project").mkdir()
    return Shell(tmp_path / "project")


def test_six_commands_lead_to_a_service_and_a_seventh_rolls_back(shell: Shell) -> None:
    *first, serve, release, ask, rollback = commands()
    assert len(first) == 3
    for command in first:
        shell.run(command)
    service = shell.begin(serve)
    log = (shell.folder / "service.log").read_text

    def answer() -> tuple[int, dict[str, str], dict[str, object]]:
        head, _, body = shell.run(f"{ask} --silent").replace("\r", "").partition("\n\n")
        status, *headers = head.splitlines()
        found = dict(line.split(": ", 1) for line in headers)
        return int(status.split()[1]), {k.lower(): v for k, v in found.items()}, json.loads(body)

    def answers_by(version: str) -> bool:
        assert service.poll() is None, log()
        try:
            status, headers, _ = answer()
        except (AssertionError, ValueError):  # of curl, or of Ray while nothing is there yet
            return False
        return status == 200 and headers.get("x-dray-version") == version

    try:
        wait_for(lambda: answers_by("1"), "version 1", 300, log)
        told = shell.run(release)
        assert [line.split()[0] for line in told.splitlines()] == [
            *("prepare", "train", "evaluate", "compress", "export", "promote", "serve")
        ]
        wait_for(lambda: answers_by("2"), "version 2", 120, log)
        _, _, found = answer()
        (prediction,) = found["predictions"]  # type: ignore[misc]
        assert prediction["prediction"] == "0", found  # a guest who is not happy
        shell.run(rollback)
        wait_for(lambda: answers_by("1"), "version 1 again", 60, log)
        verified = shell.run(f"dray verify {next((shell.folder / 'exports').iterdir())} --json")
        assert json.loads(verified)["ok"]
    finally:
        service.terminate()
        service.wait(120)
