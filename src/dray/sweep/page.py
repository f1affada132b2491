"""A sweep as a page: what was found, which parameters mattered, what it cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from dray.plan import Law, format_seconds
from dray.runs.layout import make_trial_name
from dray.show.html import Page
from dray.show.plots import COLORS, Line, draw_bars, draw_lines, draw_parallel, draw_points
from dray.show.sweeps import shown
from dray.sweep.events import COMPLETED, Event, Reported
from dray.sweep.importance import measure_importance
from dray.sweep.record import Sweep
from dray.sweep.space import Parameter, Value
from dray.sweep.study import Study, Trial
from dray.sweep.summary import load_study, summarize_record

MOST_LINES = 200
"""Trials whose curves are drawn: the newest."""


def make_sweep_page(
    sweep: Sweep, *, first: Callable[[Page, Mapping[str, Any], Study], None] | None = None
) -> Page:
    """The page of a sweep; `first` adds what is to be looked at before its trials, by the record
    and what is known of them."""
    record, events = sweep.record(), [event for _, event in sweep.events()]
    page = Page(f"Sweep {sweep.name}")
    if not events:
        page.note("No trial has begun yet.")
        return page
    study = load_study(sweep, record, events)
    summary = summarize_record(sweep, record, study)
    metric = str(summary["metric"])
    cost = study.cost()
    best = summary["best"]
    page.facts(
        {
            "status": summary["status"],
            "reason": summary["reason"],
            "trials": f"{len(study.trials)}"
            + (f" of {summary['num_trials']}" if summary["num_trials"] else ""),
            "metric": f"{metric} ({summary['mode']})",
            "best": _spread(best["value"], best["deviation"]) if best else "none yet",
            "best trial": best["name"] if best else "",
            **_beside_law(record.get("law"), best),
            "steps": f"{summary['steps']:,}",
            "tokens": f"{summary['tokens']:,}",
            "time in steps": format_seconds(cost.hours * 3600),
            "hours of the clock": f"{summary['hours']:.2f}" if summary.get("hours") else "",
            **({"GPU hours": f"{cost.gpu_hours:.2f}"} if study.scale.gpus else {}),
            **({"money": f"{cost.money:.2f}"} if cost.money else {}),
            "steps saved by stopping": f"{_saved(study):.0%}",
            "folder": sweep.uri,
        }
    )
    if first is not None:
        first(page, record, study)
    if "ladder" not in record:  # of rungs none has won
        if best:
            page.section(
                "The best", "" if best["is_complete"] else "It was stopped before its end."
            )
            page.table(["key", "value"], [[k, shown(v)] for k, v in best["parameters"].items()])
        _add_search(page, events, study, metric)
        _add_parameters(page, study, metric)
    _add_trials(page, summary, metric)
    page.section("Space")
    space = study.space.model_dump(mode="json", exclude_defaults=True)
    page.code(yaml.safe_dump(space, sort_keys=False, allow_unicode=True))
    return page


def _beside_law(kept: dict[str, Any] | None, best: dict[str, Any] | None) -> dict[str, str]:
    """What the Step Law said, and how far from it the best lay."""
    if not kept:
        return {}
    found = (best or {}).get("parameters", {})
    return {
        f"the Step Law's {path.rpartition('.')[2].replace('_', ' ')}": f"{number:.3g}"
        + (f"; the best: {found[path] / number:.2g} times that" if path in found else "")
        for path, number in Law(**kept).numbers().items()
    }


def _saved(study: Study) -> float:
    """Which share of the steps stopping has saved."""
    over = [trial for trial in study.trials.values() if trial.is_over]
    done = sum(_progress(study, trial) for trial in over)
    return max(0.0, 1 - done / max(1.0, float(len(over) * study.scale.total_steps)))


def _progress(study: Study, trial: Trial) -> float:
    """How far a trial went itself, in steps of the sweep's own batch."""
    if trial.status == COMPLETED and not trial.parent:
        return float(study.scale.total_steps)
    last = trial.reports[-1].progress if trial.reports else 0.0
    return max(0.0, last - trial.parent_step)


def _add_search(page: Page, events: Sequence[Event], study: Study, metric: str) -> None:
    """How the trials did, and how soon the best was there."""
    best = study.best()
    lines = []
    for trial in list(study.trials.values())[-MOST_LINES:]:
        is_best = best is not None and trial.number == best.trial.number
        lines.append(
            Line(
                "best" if is_best else "",
                [report.progress for report in trial.reports],
                [report.value for report in trial.reports],
                color=COLORS[1] if is_best else "#8c959f",
            )
        )
    lines.sort(key=lambda line: line.color == COLORS[1])
    page.section(
        "The search",
        f"Progress is counted in steps of {study.scale.global_rows} rows, the spec's own batch."
        if not study.scale.counts_steps
        else "",
    )
    page.plots(
        [
            ("Each trial", draw_lines(lines, x_label="progress (steps)", y_label=metric)),
            (
                "Best so far against steps spent",
                draw_lines(
                    [_best_so_far(events, study)], x_label="steps of all trials", y_label=metric
                ),
            ),
        ]
    )


def _best_so_far(events: Sequence[Event], study: Study) -> Line:
    sign, spent, best = study.scale.sign, dict[int, float](), math.inf
    xs, ys = list[float](), list[float | None]()
    for event in events:
        if not isinstance(event, Reported):
            continue
        spent[event.trial] = event.progress - study.trials[event.trial].parent_step
        if event.value is None:
            continue
        best = min(best, sign * event.value)
        xs.append(sum(spent.values()))
        ys.append(sign * best)
    return Line("best", xs, ys, color=COLORS[0])


def _add_parameters(page: Page, study: Study, metric: str) -> None:
    """Which parameters mattered, and where the good values lie."""
    sign, space = study.scale.sign, study.space
    trials = [trial for trial in study.trials.values() if trial.best(sign) is not None]
    if not trials or not space.parameters:
        return
    page.section("The parameters")
    known = study.known()
    importance = measure_importance(space, known, study.scale.mode)
    paths = list(space.parameters)
    values = {trial.number: float(trial.best(sign).value or 0.0) for trial in trials}  # type: ignore[union-attr]
    plots = [
        (
            "Importance (PED-ANOVA, with its standard deviation)",
            draw_bars(
                [item.path for item in importance],
                [item.share for item in importance],
                [item.deviation for item in importance],
                x_label="share",
            ),
        )
    ]
    for path in paths:
        given = space.parameters[path]
        groups: dict[str, list[tuple[float, float]]] = {"to the end": [], "stopped": []}
        for trial in trials:
            if path in trial.drawn:
                group = "to the end" if trial.status == COMPLETED else "stopped"
                groups[group].append((_place(given, trial.drawn[path]), values[trial.number]))
        words = [shown(value) for value in given.listed] if given.listed is not None else None
        plots.append(
            (
                path,
                draw_points(
                    groups,
                    x_label=path.rpartition(".")[2],
                    y_label=metric,
                    log_x=given.loguniform is not None,
                    ticks=words,
                ),
            )
        )
    page.plots(plots)
    if not importance:
        page.note("Too few trials to tell which parameters mattered.")
    ranked = sorted(trials, key=lambda trial: sign * values[trial.number])
    rows = [
        (
            [_share(space.parameters[path], trial.drawn.get(path)) for path in paths],
            index / max(1, len(ranked) - 1),
        )
        for index, trial in enumerate(ranked)
    ]
    page.plots(
        [
            (
                f"Parallel coordinates: dark lines are better trials by {metric}",
                draw_parallel(
                    [path.rpartition(".")[2] for path in paths],
                    [_ends(space.parameters[path]) for path in paths],
                    rows,
                ),
            )
        ]
    )


def _add_trials(page: Page, summary: dict[str, Any], metric: str) -> None:
    page.section("Trials")
    paths = list(dict.fromkeys(path for trial in summary["trials"] for path in trial["parameters"]))
    best = summary["best"]["name"] if summary["best"] else ""
    trials: Sequence[dict[str, Any]] = summary["trials"]
    has_parents = any("parent" in trial for trial in trials)
    page.table(
        ["trial", "status", "step", *paths, metric, "time", *(["from"] * has_parents), "cause"],
        [
            [
                trial["name"].rpartition("/")[2],
                trial["status"],
                trial["step"],
                *(shown(trial["parameters"].get(path)) for path in paths),
                shown(trial["metrics"].get(metric)),
                format_seconds(trial["seconds"]),
                *(
                    [f"{trial['parent']} @ {trial['parent_step']}" if "parent" in trial else ""]
                    * has_parents
                ),
                f"{trial['cause']}: {trial['reason']}" if trial["cause"] else trial["reason"],
            ]
            for trial in trials
        ],
        best=next((at for at, trial in enumerate(trials) if trial["name"] == best), None),
    )
    page.note(f"Each is a run: dray show {make_trial_name(summary['name'], 1)}")


# ---- places on an axis -------------------------------------------------------------------------


def _place(given: Parameter, value: Value) -> float:
    """Where a value lies on an axis: words by their order."""
    return float(given.listed.index(value)) if given.listed is not None else float(value)


def _share(given: Parameter, value: Value | None) -> float | None:
    """Where a value lies between the ends of its range, from 0 to 1."""
    if value is None:
        return None
    if given.listed is not None:
        return given.listed.index(value) / max(1, len(given.listed) - 1)
    low, high = given.ends()
    if given.loguniform is not None:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return float((value - low) / (high - low)) if high > low else 0.5


def _ends(given: Parameter) -> tuple[str, str]:
    ends = given.ends()
    return shown(ends[0]), shown(ends[-1])


def _spread(value: float, deviation: float | None) -> str:
    return f"{value:.6g}" + ("" if deviation is None else f" ± {deviation:.3g}")
