"""How much a metric may get worse: `--max-drop accuracy=0.01`, or `perplexity=5%` of what it was.
An unknown metric is refused before any work is done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dray.errors import SpecError


@dataclass(frozen=True)
class Limit:
    """The most that a metric may get worse by: so much, or `relative` a share of what it was."""

    metric: str
    most: float
    relative: bool

    def judge(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """What became of it: metric, most, relative, drop, holds. A metric that stands for nothing
        on the rows does not hold."""
        found = metrics.get(self.metric) or {}
        before, after = (found.get(when, {}).get("value") for when in ("before", "after"))
        told = {"metric": self.metric, "most": self.most, "relative": self.relative}
        if before is None or after is None:
            return {**told, "drop": None, "holds": False}
        drop = before - after if found["better"] == "higher" else after - before
        if self.relative:
            drop = drop / abs(before) if before else math.copysign(math.inf, drop) if drop else 0.0
        # Differences of shares of rows are no exact numbers: 0.91 - 0.90 is above 0.01.
        return {**told, "drop": drop, "holds": drop <= self.most + 1e-9}


def make_limits(given: Sequence[str], known: Mapping[str, str]) -> list[Limit]:
    """The limits of a command. `known`: the task's metrics. Raises SpecError."""
    return [_make_limit(text, known) for text in given]


def _make_limit(text: str, known: Mapping[str, str]) -> Limit:
    metric, _, amount = text.partition("=")
    where = f"--max-drop {text}"
    if metric not in known:
        raise SpecError(
            where, f"{metric!r} is no metric of this task", f"it has {', '.join(known)}"
        )
    relative = amount.endswith("%")
    try:
        most = float(amount.removesuffix("%"))
    except ValueError:
        most = math.nan
    if not 0 <= most < math.inf:
        raise SpecError(
            where,
            f"{amount!r} is no amount",
            "a number from 0 on, or a share with %",
            "e.g. 0.01, 5%",
        )
    return Limit(metric, most / 100 if relative else most, relative)
