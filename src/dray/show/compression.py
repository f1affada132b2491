"""The table of a compressed run as text: what it was made from, and figures before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dray.plan import format_bytes


def format_compression(table: Mapping[str, Any]) -> str:
    """Lines for people, of what `dray compress --json` gives."""
    if "soup" in table:
        return format_soup(table)
    parent, speed, sizes = table["parent"], table["speed"], table["sizes"]
    methods = ", ".join(map(_method, table["methods"]))
    lines = [
        f"compressed   from {parent['run']}, step {parent['step']}: {methods}",
        f"{'':<24}{'before':>22}{'after':>22}  {'difference (95 %)'}",
        *_metric_lines(table["metrics"]),
    ]
    before, after = sizes["before"], sizes["after"]
    for name, words in (("weights_bytes", "weights stored"), ("memory_bytes", "weights in memory")):
        lines.append(
            f"{words:<24}{format_bytes(before[name]):>22}{format_bytes(after[name]):>22}  "
            f"÷ {before[name] / max(1, after[name]):.2f}"
        )
    for name, words in (("num_parameters", "parameters"), ("num_nonzero", "not zero")):
        lines.append(
            f"{words:<24}{before[name]:>22,}{after[name]:>22,}  "
            f"÷ {before[name] / max(1, after[name]):.2f}"
        )
    one, many = speed["row_seconds"], speed["rows_per_second"]
    tokens = f" of {speed['row_tokens']} tokens" if speed["row_tokens"] else ""
    lines += [
        f"{'one row, ms' + tokens:<24}{one['before'] * 1e3:>22.2f}{one['after'] * 1e3:>22.2f}  "
        f"× {one['speedup']:.2f} as fast",
        f"{'rows a second by ' + str(speed['batch_rows']):<24}{many['before']:>22.1f}"
        f"{many['after']:>22.1f}  × {many['speedup']:.2f} as fast",
        f"measured on {table['num_rows']:,} rows; times on {speed['device']}, "
        f"{speed['threads']} threads, both models in turns, medians",
    ]
    for limit in table["gate"]:
        lines.append(_limit(limit))
    return "\n".join(lines)


def format_soup(table: Mapping[str, Any]) -> str:
    """Lines for people, of what `dray soup --json` gives."""
    metric = table["metric"]
    lines = [
        f"{table['how']} soup of {sum(one['in'] for one in table['soup'])} models, by {metric}"
    ]
    for one in table["soup"]:
        with_it = "" if one["with_it"] is None else f"  with it {one['with_it']:.6g}"
        alone = "undefined" if one["value"] is None else f"{one['value']:.6g}"
        lines.append(f"  {one['model']:<40} {alone:>12}  {'in ' if one['in'] else 'out'}{with_it}")
    lines += [
        f"{'':<24}{'best alone':>22}{'soup':>22}  {'difference (95 %)'}",
        *_metric_lines(table["metrics"]),
        f"measured on {table['num_rows']:,} rows",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _metric_lines(metrics: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, found in metrics.items():
        before, after, change = (found[key] for key in ("before", "after", "difference"))
        lines.append(f"{name:<24}{_interval(before):>22}{_interval(after):>22}  {_range(change)}")
    return lines


def _method(told: Mapping[str, Any]) -> str:
    settings = ",".join(
        f"{key}={value}" for key, value in told.items() if key != "name" and value not in (None, 0)
    )
    return f"{told['name']}:{settings}" if settings else str(told["name"])


def _interval(value: Mapping[str, float | None]) -> str:
    if value["value"] is None:
        return "undefined"
    if value["low"] is None:
        return f"{value['value']:.4f}"
    return f"{value['value']:.4f} ± {value['value'] - value['low']:.4f}"


def _range(value: Mapping[str, float | None]) -> str:
    if value["value"] is None:
        return ""
    if value["low"] is None or value["high"] is None:
        return f"{value['value']:+.4f}"
    return f"{value['value']:+.4f} ({value['low']:+.4f} … {value['high']:+.4f})"


def _limit(limit: Mapping[str, Any]) -> str:
    def amount(value: float) -> str:
        return f"{value:.2%}" if limit["relative"] else f"{value:.4f}"

    drop = "is undefined" if limit["drop"] is None else f"is worse by {amount(limit['drop'])}"
    verdict = "holds" if limit["holds"] else "DOES NOT HOLD"
    return f"gate         {limit['metric']} {drop}, at most {amount(limit['most'])}: {verdict}"
