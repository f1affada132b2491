"""A run that went on from another one, as text: what it learnt from, and both beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def format_continued(told: Mapping[str, Any]) -> str:
    """Lines for people, of `pipeline.continuing.Continued` as plain values."""
    lines = [f"{told['run']}  goes on from {told['before']}"]
    for name, counts in told["datasets"].items():
        lines.append(
            f"  feedback     {name}: {counts['learnt']:,} of {counts['given']:,} entries learnt, "
            f"{counts['held']:,} kept out, {counts['unusable']:,} say only what is wrong"
        )
        if others := counts["given"] - counts["learnt"]:
            lines.append(
                f"               {others:,} were not: the same text was there already, is held out "
                "by data.validation, or the run ended before"
            )
    for kind, found in told["metrics"].items():
        where = "old held-out rows" if kind == "old" else "new held-out data"
        lines.append(f"  {where}: {found['num_rows']:,}")
        before, after = found["values"]["before"], found["values"]["after"]
        tests = found.get("test", {}).get("metrics", {})
        for name, value in before.items():
            if value is None and after.get(name) is None:
                continue
            low_high = tests.get(name, {})
            between = ""
            if low_high.get("low") is not None:
                between = f"  ({low_high['low']:+.4f} to {low_high['high']:+.4f})"
            lines.append(f"    {name:<12} {_number(value)} → {_number(after.get(name))}{between}")
    for limit in told["limits"]:
        sign = "holds" if limit["holds"] else "MISSED"
        lines.append(f"  gate         {limit['metric']} on {limit['rows']} rows: {sign}")
    if told["missed"]:
        lines.append(f"not let through: {told['missed']}")
    if told["promoted"]:
        lines.append(f"promoted: {told['promoted']}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
