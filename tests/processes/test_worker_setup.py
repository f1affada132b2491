"""How the node of a local Ray starts its workers without importing Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from dray.processes import worker_setup
from dray.processes.worker_setup import make_command

WORKER = ["-s", "/ray/workers/default_worker.py", "--raylet-name=/tmp/a b/raylet", "--worker-id=1"]


def given(language: str = "PYTHON", **context: Any) -> list[str]:
    """A raylet's arguments."""
    return [
        *WORKER,
        f"--language={language}",
        f"--serialized-runtime-env-context={json.dumps(context)}",
    ]


def test_a_worker_gets_its_command_and_its_words_as_they_are():
    command = make_command(given(py_executable="bash -c 'echo \"$@\"' dray"))
    assert command is not None
    without_exec = [*command[:2], command[2].removeprefix("exec ")]
    done = subprocess.run(without_exec, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == " ".join(WORKER)
    plain = make_command(given())
    assert plain is not None
    assert plain[2].startswith(f"exec {sys.executable} -s {WORKER[1]} '{WORKER[2]}' ")


def test_its_variables_are_what_rays_own_script_makes_of_them(monkeypatch: pytest.MonkeyPatch):
    from ray._private.utils import update_envs

    wanted = {
        "A": "1",
        "PATH": "/new:$PATH",
        "B": "${A}-${NOT_THERE}",
        "C": "$lower ${HOME}/x",
        "D": "",
        "E": "$A$A",
    }
    found = []
    for update in (update_envs, lambda variables: make_command(given(env_vars=variables))):
        with monkeypatch.context() as context:
            context.setattr("os.environ", os.environ.copy())
            os.environ.update(PATH="/old", HOME="/home/me")
            update(wanted)
            found.append({name: os.environ[name] for name in wanted})
    assert found[0] == found[1]
    assert found[0]["PATH"] == "/new:/old"


@pytest.mark.parametrize(
    "arguments",
    [
        given("JAVA"),
        WORKER,
        given(command_prefix=["cd /x &&"]),
        given(override_worker_entrypoint="/other.py"),
        given(something_new=1),
    ],
)
def test_what_is_no_plain_python_worker_is_left_to_ray(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
):
    assert make_command(arguments) is None
    become: list[Any] = []
    monkeypatch.setattr("os.execv", lambda *command: become.append(command))
    monkeypatch.setattr("os.execvp", lambda *command: None)
    with pytest.raises(
        TypeError
    ):  # a stand-in for exec comes back, and there is no command to go on with
        worker_setup.main(arguments)
    assert become == [
        (sys.executable, [sys.executable, "/ray/workers/setup_worker.py", *arguments])
    ]
