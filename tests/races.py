"""Processes that begin something at the same moment: each says `ready`, and waits for a line."""

from __future__ import annotations

import subprocess
import sys


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process that has come to its start line."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def go(child: subprocess.Popen[str]) -> None:
    """Let it begin."""
    assert child.stdin is not None
    child.stdin.write("go\n")
    child.stdin.flush()


def race(code: str, *runners: tuple[str, ...]) -> list[str]:
    """What each of several processes prints that begin together; a runner is its arguments."""
    children = [start(code, *arguments) for arguments in runners]
    for child in children:
        go(child)
    return [child.communicate()[0] for child in children]
