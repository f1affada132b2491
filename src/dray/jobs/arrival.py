"""What both sides of a submitted command know: the versions that must be equal, and the marks of
the lines by which the cluster's side answers."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

ARRIVAL, EQUAL, RESULT = "dray-arrival:", "equal", "dray-result:"
"""How the line begins that tells what differs between the two sides, its word for nothing, and how
each line of a command's result begins: a job has one log for both of its streams."""
COMPARED = ("dray", "ray", "torch")


def versions_here() -> dict[str, str]:
    """Of dray, Ray, Python and torch; Python's without its last number, torch's without its
    build."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in COMPARED:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = "none"
    return found


def compare(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """What differs, in words; empty: nothing. `there`: of whoever submitted."""
    return ", ".join(
        f"{name} {here.get(name)} on the cluster and {wanted} here"
        for name, wanted in there.items()
        if here.get(name) != wanted
    )
