"""What a person sees of a ladder's forecast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from dray.show.report import rendered

TOO_FEW = "too few rungs have a loss: a law wants six, of three sizes and three lengths"
RUNG_TITLES = ("parameters", "layers × width", "tokens", "FLOPs", "loss", "by the law")


def format_forecast(forecast: Mapping[str, Any] | None) -> str:
    """The forecast of a ladder as `Forecast.to_json` has it, as lines and a table."""
    if forecast is None:
        return f"  forecast  {TOO_FEW}"
    target, best = forecast["target"], forecast["best"]
    lines = [
        f"  forecast  loss {shown_interval(forecast['loss'])} of the spec: "
        f"{target['num_parameters']:,} parameters on {target['num_tokens']:,} tokens, "
        f"{describe_reach(forecast['reach'])}; the ladder took {forecast['share']:.1%} of its "
        "compute",
        f"  best      for {forecast['budget_flops']:.3g} FLOPs: {describe_best(best)}",
        f"  law       {describe_law(forecast)}",
    ]
    if forecast["check"] is not None:
        lines.append(
            f"  check     its largest rung, foretold by the others, is off by "
            f"{forecast['check']:+.2%}"
        )
    if forecast["missing"]:
        lines.append(f"  without   {', '.join(forecast['missing'])}")
    table = Table(box=None, pad_edge=False)
    for title in RUNG_TITLES:
        table.add_column(title, justify="right")
    for rung in forecast["rungs"]:
        table.add_row(*rung_cells(rung))
    return "\n".join([*lines, rendered(table)])


def describe_reach(reach: Mapping[str, float]) -> str:
    """How far beyond the ladder a model lies."""
    return (
        f"{reach['parameters']:.2g} times the parameters and {reach['tokens']:.2g} times the "
        "tokens of its largest rungs"
    )


def rung_cells(rung: Mapping[str, Any]) -> list[str]:
    """A rung as a row of a table with RUNG_TITLES."""
    return [
        f"{rung['num_parameters']:,}",
        f"{rung['num_layers']} × {rung['hidden_size']}",
        f"{rung['num_tokens']:,}",
        f"{rung['flops']:.3g}",
        f"{rung['loss']:.4f}",
        f"{rung['fitted'] / rung['loss'] - 1:+.2%}",
    ]


def describe_law(forecast: Mapping[str, Any]) -> str:
    """The law with its numbers, and what they do not tell."""
    law = forecast["law"]
    text = (
        f"L = {law['irreducible']:.3g} + {law['by_size']:.3g} / N^{law['alpha']:.3g} + "
        f"{law['by_tokens']:.3g} / D^{law['beta']:.3g}"
    )
    if forecast["untold"]:
        text += (
            f"; these rungs hardly tell how the loss goes with {' and '.join(forecast['untold'])}: "
            "give a larger --budget"
        )
    return text


def describe_best(best: Mapping[str, Any]) -> str:
    """The model that would do best, and what is to be said of it."""
    text = (
        f"{best['num_layers']} layers × {best['hidden_size']} ({best['num_parameters']:,} "
        f"parameters) on {best['num_tokens']:,} tokens, loss {shown_interval(best['loss'])}, "
        f"{describe_reach(best['reach'])}"
    )
    if best["edge"]:
        text += f"; {best['edge']} that was looked at: a better one may lie beyond"
    if best["is_seen_too_often"]:
        text += (
            f"; that is {best['epochs']:.1f} epochs of this corpus, and the law speaks of new "
            "tokens: it wants more data"
        )
    return text


def shown_interval(found: Mapping[str, float]) -> str:
    """A number with its interval."""
    return f"{found['value']:.4f} ({found['low']:.4f} to {found['high']:.4f})"
