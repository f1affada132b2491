"""What rules said of records, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def format_labelled(told: Mapping[str, Any]) -> str:
    """Counts, and a line for each rule."""
    labels = ", ".join(f"{label} {count:,}" for label, count in told["labels"].items())
    bad = f", {told['num_bad']:,} cannot be read" if told["num_bad"] else ""
    lines = [
        f"{told['num_labelled']:,} of {told['num_records']:,} records have a label in "
        f"{told['file']} ({labels}); {told['num_silent']:,} have none, since no rule speaks of "
        f"them, {told['num_unsure']:,} since rules do not agree enough{bad}",
    ]
    if "gold" in told and told["gold"]["accuracy"] is not None:
        lines.append(
            f"right by the gold labels: {told['gold']['accuracy']:.1%}; a majority of the rules "
            f"{told['gold']['majority_accuracy']:.1%}"
        )
    has_gold = "gold" in told
    head = ["rule", "speaks of", "with others", "against", "taken for"]
    rows = [head + (["is right"] if has_gold else [])]
    for name, rule in told["rules"].items():
        row = [name, *(f"{rule[key]:.1%}" for key in ("coverage", "overlap", "conflict"))]
        row += [_share(rule["accuracy"])]
        rows.append(row + ([_share(rule["gold_accuracy"])] if has_gold else []))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines += [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
