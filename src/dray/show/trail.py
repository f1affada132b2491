"""Where a document went, as text: corpora, runs, steps, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def format_trail(told: Mapping[str, Any]) -> str:
    """Lines for people, of `release.forgetting.Trail` as plain values."""
    lines = [
        f"document {told['digest']}",
        f"  looked through: corpora {told['num_corpora']}, runs {told['num_runs']}",
    ]
    if others := told["other_corpora"]:
        lines.append(f"  not looked through, as no run has learnt from them: {', '.join(others)}")
    for held in told["corpora"]:
        train, validation = held["train_rows"], held["validation_rows"]
        more = f", {len(validation)} held out" if validation else ""
        shown = "; examples.json shows its beginning" if held["is_example"] else ""
        lines.append(f"  corpus {held['corpus']}: {len(train)} rows to train on{more}{shown}")
    for one in told["runs"]:
        lines.append(f"  run {one['run']}: {_said_of(one)}")
        if one["seen"]:
            clean = f"; not at {_listed(one['clean'])}" if one["clean"] else ""
            lines.append(f"      its checkpoints at {_listed(one['seen'])} have seen it{clean}")
    if not told["corpora"] and not any(one["steps"] or one["inherits"] for one in told["runs"]):
        lines.append("  none of them has it, as far as can be told")
    if again := told.get("again"):
        where = "has no row of it" if not again["rows"] else f"HAS {len(again['rows'])} ROWS OF IT"
        ledger = "its ledger is proven" if again["ledger_ok"] else "ITS LEDGER IS NOT PROVEN"
        lines.append(f"  made again: run {again['run']} {where}; {ledger}")
    return "\n".join(lines)


def _said_of(one: Mapping[str, Any]) -> str:
    if one["unknown"]:
        return f"nothing can be told: {one['unknown']}"
    parts = []
    if one["steps"]:
        steps = one["steps"]
        times = f"{len(steps)} times, first" if len(steps) > 1 else "once,"
        parts.append(f"learnt from it {times} at step {steps[0]:,}")
    elif one["rows"]:
        parts.append("has rows of it, and has not come to them")
    if one["inherits"]:
        parts.append(f"began with the weights of {one['inherits']}, which have seen it")
    return "; ".join(parts)


def _listed(steps: Sequence[int]) -> str:
    shown = ", ".join(f"{step:,}" for step in steps[:6])
    return f"step {shown}" + (f" and {len(steps) - 6} more" if len(steps) > 6 else "")
