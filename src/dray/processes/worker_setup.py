"""What the node of a local Ray runs to start a worker: Ray's own script for it, without importing
Ray.

Ray's imports itself in every new process, only to find out with which command and environment the
worker begins; a fork of a server that has imported everything needs nothing of that. What is no
plain Python worker is left to Ray's script. Standard library alone, and as little of it as will do.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys

_CONTEXT, _LANGUAGE = "--serialized-runtime-env-context=", "--language="
_KNOWN = {"command_prefix", "env_vars", "py_executable", "override_worker_entrypoint", "java_jars"}
_RAYS_WORKER, _RAYS_SETUP = "default_worker.py", "setup_worker.py"


def make_command(arguments: list[str]) -> list[str] | None:
    """What to run for the raylet's arguments; sets the worker's variables in this process. None for
    what is left to Ray's own script."""
    given = {
        mark: word.removeprefix(mark)
        for word in arguments
        for mark in (_CONTEXT, _LANGUAGE)
        if word.startswith(mark)
    }
    if given.get(_LANGUAGE) != "PYTHON":
        return None
    context = json.loads(given.get(_CONTEXT) or "{}")
    if context.keys() - _KNOWN or any(
        context.get(name) for name in ("command_prefix", "override_worker_entrypoint")
    ):
        return None
    for name, value in (context.get("env_vars") or {}).items():
        os.environ[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))
    words = [shlex.quote(word) for word in arguments if not word.startswith((_CONTEXT, _LANGUAGE))]
    return [
        "bash",
        "-c",
        " ".join(["exec", context.get("py_executable") or sys.executable, *words]),
    ]


def main(arguments: list[str]) -> None:
    """Become the worker."""
    command = make_command(arguments)
    if command is None:
        worker = next(word for word in arguments if os.path.basename(word) == _RAYS_WORKER)
        setup = os.path.join(os.path.dirname(worker), _RAYS_SETUP)
        os.execv(sys.executable, [sys.executable, setup, *arguments])
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
