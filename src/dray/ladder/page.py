"""A ladder's part of its sweep's page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dray.ladder.forecast import load_forecast
from dray.show.html import Page
from dray.show.ladders import (
    RUNG_TITLES,
    TOO_FEW,
    describe_best,
    describe_law,
    describe_reach,
    rung_cells,
    shown_interval,
)
from dray.show.plots import Line, draw_lines
from dray.sweep.study import Study


def add_forecast(page: Page, record: Mapping[str, Any], study: Study) -> None:
    """What a sweep tells that is a ladder, with its rungs and the law through them; of another
    sweep nothing."""
    if "ladder" not in record:
        return
    page.section("The forecast", "Intervals hold nine tenths of the laws of rungs drawn again.")
    found = load_forecast(record["ladder"], study)
    if found is None:
        page.note(f"There is none: {TOO_FEW}.")
        return
    forecast = found.to_json()
    check = forecast["check"]
    page.facts(
        {
            "loss of the spec": shown_interval(forecast["loss"]),
            "law": describe_law(forecast),
            "compute of the ladder": f"{forecast['share']:.1%} of the spec's",
            "its largest rung by the others": "" if check is None else f"{check:+.2%}",
            "without the rungs": ", ".join(forecast["missing"]),
            "the spec lies beyond": describe_reach(forecast["reach"]),
        }
    )
    page.note(f"Best for {forecast['budget_flops']:.3g} FLOPs: {describe_best(forecast['best'])}.")
    by_size: dict[int, list[Mapping[str, Any]]] = {}
    for rung in forecast["rungs"]:
        by_size.setdefault(rung["num_parameters"], []).append(rung)
    lines = []
    for size, rungs in sorted(by_size.items()):
        ordered = sorted(rungs, key=lambda rung: rung["flops"])
        flops = [rung["flops"] for rung in ordered]
        lines.append(Line(f"{size:,}", flops, [rung["loss"] for rung in ordered], marked=True))
    target = forecast["target"]
    lines.append(
        Line("the spec, foretold", [target["flops"]], [forecast["loss"]["value"]], marked=True)
    )
    page.plots(
        [
            (
                "Loss against compute, a line for each number of parameters",
                draw_lines(lines, x_label="FLOPs", y_label="loss", log_x=True),
            )
        ]
    )
    page.table(RUNG_TITLES, [rung_cells(rung) for rung in forecast["rungs"]])
