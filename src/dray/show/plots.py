"""Plots as SVG text, drawn by matplotlib: no script, no fonts, nothing from elsewhere."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dray.errors import visible
from dray.processes.imports import require_package

COLORS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a")
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # letters stay letters: smaller, and they can be searched
    "svg.hashsalt": "dray",  # the same plot is the same text
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8c959f",
    "axes.labelcolor": "#57606a",
    "axes.grid": True,
    "grid.color": "#eaeef2",
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Line:
    """Points that belong together; those that are not finite are left out."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    marked: bool = False
    """Draw the points, not the line between them alone."""
    color: str | None = None


@contextmanager
def _figure(width: float = 5.2, height: float = 2.4) -> Iterator[tuple[Any, Any, list[str]]]:
    """A figure, its axes, and a list that gets its SVG when the block ends."""
    require_package("matplotlib", "report", "a report")
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawn: list[str] = []
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        yield figure, axes, drawn
        text = io.StringIO()
        canvas.print_svg(text, metadata={"Date": None, "Creator": None})
    drawn.append(text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2])


def draw_lines(
    lines: Sequence[Line], *, x_label: str, y_label: str, log: bool = False, log_x: bool = False
) -> str:
    """Lines over one axis; empty text where none has a point."""
    shown = [(line, _finite(line)) for line in lines]
    shown = [(line, points) for line, points in shown if points]
    if not shown:
        return ""
    with _figure() as (_, axes, drawn):
        for index, (line, points) in enumerate(shown):
            xs, ys = zip(*points, strict=True)
            axes.plot(
                xs,
                ys,
                label=_plain(line.name),
                color=line.color or COLORS[index % len(COLORS)],
                linewidth=1.3,
                marker="o" if line.marked or len(points) == 1 else None,
                markersize=3,
            )
        axes.set_xlabel(_plain(x_label))
        axes.set_ylabel(_plain(y_label))
        if log and all(y > 0 for _, points in shown for _, y in points):
            axes.set_yscale("log")
        if log_x:
            axes.set_xscale("log")
        if len(shown) > 1 and len(shown) <= len(COLORS):
            axes.legend()
    return drawn[0]


def draw_spans(
    rows: Sequence[tuple[str, float, float, str]],
    marks: Sequence[tuple[float, str, str]],
    *,
    x_label: str,
) -> str:
    """Bars on a time axis, one a row (name, begin, end, colour), and marks (time, text, colour)."""
    if not rows:
        return ""
    with _figure(10.6, 0.6 + 0.28 * (len(rows) + bool(marks))) as (_, axes, drawn):
        for place, (_, begin, end, color) in enumerate(rows):
            axes.barh(place, max(end - begin, 1e-9), left=begin, color=color, height=0.6)
        for time, text, color in marks:
            axes.axvline(time, color=color, linewidth=1)
            axes.annotate(
                _plain(text),
                (time, len(rows) - 0.4),
                rotation=0,
                fontsize=7,
                color=color,
                ha="left",
                va="bottom",
            )
        axes.set_yticks(range(len(rows)), [_plain(name) for name, *_ in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4 + bool(marks))
        axes.invert_yaxis() if not marks else None
        axes.set_xlabel(_plain(x_label))
        axes.grid(visible=False, axis="y")
    return drawn[0]


def draw_bars(
    names: Sequence[str], values: Sequence[float], errors: Sequence[float], *, x_label: str
) -> str:
    """One bar a name, with its uncertainty."""
    if not names:
        return ""
    with _figure(5.2, 0.7 + 0.26 * len(names)) as (_, axes, drawn):
        places = range(len(names))
        axes.barh(places, values, xerr=errors, color=COLORS[0], height=0.6, ecolor="#57606a")
        axes.set_yticks(places, list(map(_plain, names)))
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel(_plain(x_label))
        axes.grid(visible=False, axis="y")
    return drawn[0]


def draw_grid(values: Sequence[Sequence[float]]) -> str:
    """Numbers in their places: green above 0, red below."""
    if not values or not values[0]:
        return ""
    most = max(abs(value) for row in values for value in row) or 1.0
    with _figure(2.6, 2.6) as (_, axes, drawn):
        axes.grid(visible=False)
        axes.imshow(values, cmap="RdYlGn", vmin=-most, vmax=most, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
    return drawn[0]


def draw_points(
    points: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    log_x: bool,
    ticks: Sequence[str] | None = None,
) -> str:
    """Points in groups; `ticks` names the places of an axis that holds words."""
    if not any(points.values()):
        return ""
    with _figure(3.4, 2.3) as (_, axes, drawn):
        for index, (name, group) in enumerate(points.items()):
            if group:
                xs, ys = zip(*group, strict=True)
                axes.scatter(
                    xs, ys, s=16, label=_plain(name), color=COLORS[index % len(COLORS)], alpha=0.8
                )
        if log_x:
            axes.set_xscale("log")
        if ticks is not None:
            axes.set_xticks(range(len(ticks)), list(map(_plain, ticks)))
        axes.set_xlabel(_plain(x_label))
        axes.set_ylabel(_plain(y_label))
        if len(points) > 1:
            axes.legend(fontsize=7)
    return drawn[0]


def draw_parallel(
    names: Sequence[str],
    labels: Sequence[tuple[str, str]],
    rows: Sequence[tuple[Sequence[float | None], float]],
) -> str:
    """Parallel coordinates: each row goes through its place (0 to 1) on each axis, coloured by its
    own value (0: best, 1: worst). `labels` stand at the ends of the axes."""
    if not rows or len(names) < 2:
        return ""
    with _figure(10.6, 3.2) as (_, axes, drawn):
        from matplotlib import colormaps

        colors = colormaps["viridis"]
        for places, value in sorted(rows, key=lambda row: -row[1]):
            there = [(axis, place) for axis, place in enumerate(places) if place is not None]
            if len(there) > 1:
                xs, ys = zip(*there, strict=True)
                width = 2.2 if value == 0 else 0.9
                axes.plot(xs, ys, color=colors(min(1.0, value) * 0.9), linewidth=width, alpha=0.85)
        axes.set_xticks(range(len(names)), list(map(_plain, names)))
        axes.set_yticks([])
        axes.set_ylim(-0.12, 1.12)
        axes.grid(visible=False)
        for axis, (low, high) in enumerate(labels):
            axes.axvline(axis, color="#8c959f", linewidth=0.8)
            axes.annotate(_plain(low), (axis, -0.03), ha="center", va="top", fontsize=7)
            axes.annotate(_plain(high), (axis, 1.03), ha="center", va="bottom", fontsize=7)
    return drawn[0]


def _plain(text: str) -> str:
    """A text that matplotlib draws as it is, and does not read as a formula."""
    return visible(text).replace("$", r"\$")


def _finite(line: Line) -> list[tuple[float, float]]:
    return [
        (x, float(y))
        for x, y in zip(line.xs, line.ys, strict=True)
        if y is not None and math.isfinite(y)
    ]
