"""A run that was judged, as text and as one page: metrics with their intervals, curves, the
confusion matrix, slices, another run beside it, checks. What it says comes from
`release/judging/judge.py`, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dray.show.html import Page
from dray.show.plots import Line, draw_lines, draw_points

MOST_SHOWN = 200
"""Checks in a page's table: failed ones first."""
MOST_LETTERS = 600
"""Of a text in a table."""


def format_judgement(more: Mapping[str, Any]) -> str:
    """What was asked for besides metrics, for a terminal."""
    parts: list[str] = []
    judged = more.get("judgement", {})
    if judged:
        parts.append(f"{judged['num']:,} {judged['unit']}s judged")
        parts.append(_columns(_metric_rows(judged["metrics"])))
    if "calibration" in judged:
        found = judged["calibration"]
        before, after = found["before"], found["after"]
        parts.append(
            f"temperature {found['temperature']:.4g}, fitted on {found['num_fitted']:,} rows; "
            f"on the other {found['num_measured']:,}: "
            f"ECE {before['ece']:.4f} → {after['ece']:.4f}, "
            f"log loss {before['log_loss']:.4f} → {after['log_loss']:.4f}"
        )
    for kind, slices in judged.get("slices", {}).items():
        parts += [f"by {kind}", _columns(_slice_rows(slices))]
    if "against" in more:
        parts += [_against_title(more["against"]), _columns(_against_rows(more["against"]))]
        if "right_answers" in more["against"]:
            parts.append(_right_answers(more["against"]))
    if "checks" in more:
        parts += [_checks_title(more["checks"]), _columns(_check_rows(more["checks"]))]
    parts += judged.get("missing", [])
    return "\n".join(parts)


def make_judgement_page(
    result: Mapping[str, Any],
    more: Mapping[str, Any],
    report: Mapping[str, Mapping[str, float]],
) -> Page:
    """The page of an evaluation: what `evaluate` tells, what was asked besides, and the task's own
    table."""
    page = Page(f"Evaluation of {result['run']}")
    page.facts({key: _number(value) for key, value in result.items() if key != "run"})
    judged = more["judgement"]
    note = f"Of {judged['num']:,} {judged['unit']}s."
    if "level" in judged:
        note += (
            f" Intervals hold {judged['level']:.0%} of {judged['num_draws']:,} samples of the "
            f"{judged['unit']}s, drawn with replacement (seed {judged['seed']})."
        )
    page.section(
        "Metrics", " ".join([note, *(f"There is {one}." for one in judged.get("missing", []))])
    )
    _add_table(page, _metric_rows(judged["metrics"]))
    if report:
        page.section("By class")
        first = next(iter(report.values()))
        rows = [[name, *map(_number, values.values())] for name, values in report.items()]
        page.table(["", *first], rows)
    _add_curves(page, judged)
    _add_confusion(page, judged)
    for kind, slices in judged.get("slices", {}).items():
        page.section(f"By {kind}")
        _add_table(page, _slice_rows(slices))
    if "against" in more:
        _add_against(page, more["against"])
    _add_worst(page, judged)
    if "checks" in more:
        _add_checks(page, more["checks"])
    return page


def _add_curves(page: Page, judged: Mapping[str, Any]) -> None:
    curves, plots = judged.get("curves", {}), []
    if curves:
        roc = [
            Line(
                f"{name} (AUC {one['auc']:.3f})",
                one["roc"]["false_positive_rate"],
                one["roc"]["true_positive_rate"],
            )
            for name, one in curves.items()
        ]
        chance = Line("chance", [0, 1], [0, 1], color="#8c959f")
        shown = draw_lines(
            [*roc, chance], x_label="false positive rate", y_label="true positive rate"
        )
        plots.append(("ROC", shown))
        precise = [
            Line(
                f"{name} (AP {one['average_precision']:.3f})",
                one["precision_recall"]["recall"],
                one["precision_recall"]["precision"],
            )
            for name, one in curves.items()
        ]
        shown = draw_lines(precise, x_label="recall", y_label="precision")
        plots.append(("Precision and recall", shown))
    if "reliability" in judged:
        plots.append(("Reliability", _draw_reliability(judged)))
    if "residuals" in judged:
        points = list(zip(judged["residuals"]["wanted"], judged["residuals"]["found"], strict=True))
        shown = draw_points({"": points}, x_label="wanted", y_label="found", log_x=False)
        plots.append(("Found beside wanted", shown))
    if plots:
        page.section("Curves", _reliability_note(judged))
        page.plots(plots)


def _draw_reliability(judged: Mapping[str, Any]) -> str:
    kinds = {"as it is": judged["reliability"]}
    if "calibration" in judged:
        kinds = {name: judged["calibration"][name] for name in ("before", "after")}
    lines = [
        Line(
            f"{name} (ECE {one['ece']:.3f})",
            [place["confidence"] for place in one["bins"]],
            [place["accuracy"] for place in one["bins"]],
            marked=True,
        )
        for name, one in kinds.items()
    ]
    ideal = Line("as it says", [0, 1], [0, 1], color="#8c959f")
    return draw_lines([*lines, ideal], x_label="probability", y_label="share that is right")


def _reliability_note(judged: Mapping[str, Any]) -> str:
    if "reliability" not in judged:
        return ""
    one = judged["reliability"]
    note = (
        f"Expected calibration error: {one['ece']:.4f} over 15 bins of equal width, "
        f"{one['ece_equal_mass']:.4f} over bins of equally many rows."
    )
    if "calibration" not in judged:
        return note
    found = judged["calibration"]
    return (
        f"{note} A temperature of {found['temperature']:.4g}, fitted on {found['num_fitted']:,} "
        f"rows and measured on the other {found['num_measured']:,}: "
        f"ECE {found['before']['ece']:.4f} before, {found['after']['ece']:.4f} after; "
        f"log loss {found['before']['log_loss']:.4f} before, "
        f"{found['after']['log_loss']:.4f} after."
    )


def _add_confusion(page: Page, judged: Mapping[str, Any]) -> None:
    if "confusion" not in judged:
        return
    labels, counts = judged["confusion"]["labels"], judged["confusion"]["counts"]
    page.section("Confusion matrix", "Rows are what was wanted, columns what was found.")
    rows = [
        [name, *(f"{count:,}" for count in row)] for name, row in zip(labels, counts, strict=True)
    ]
    page.table(["", *labels], rows)


def _add_against(page: Page, against: Mapping[str, Any]) -> None:
    note = (
        f"On the same {against['num']:,} {against['unit']}s; positive differences: the other run "
        "is higher. p-values are of a paired permutation test with "
        f"{against['num_draws']:,} draws, of each metric by itself."
    )
    page.section(_against_title(against), note)
    _add_table(page, _against_rows(against))
    if "right_answers" in against:
        page.note(_right_answers(against))


def _add_worst(page: Page, judged: Mapping[str, Any]) -> None:
    worst = judged["worst"]
    if not worst:
        return
    page.section("Worst errors", f"The {judged['unit']}s of which the model is most wrong.")
    page.table(
        list(worst[0]), [[_short(_number(value)) for value in one.values()] for one in worst]
    )


def _add_checks(page: Page, checks: Mapping[str, Any]) -> None:
    page.section(_checks_title(checks))
    _add_table(page, _check_rows(checks))
    outcomes = sorted(checks["outcomes"], key=lambda one: one["passed"])
    if len(outcomes) > MOST_SHOWN:
        page.note(f"{MOST_SHOWN} of {len(outcomes):,}, failed ones first.")
    names = ("line", "kind", "passed", "prompt", "answer", "note")
    rows = [
        [
            one["line"],
            one["kind"],
            "yes" if one["passed"] else "no",
            *(_short(one.get(name, "")) for name in names[3:]),
        ]
        for one in outcomes[:MOST_SHOWN]
    ]
    page.table(names, rows)


Rows = list[list[str]]


def format_together(found: Mapping[str, Any]) -> str:
    """Models alone and together, and how far they are from the best one alone."""
    names = list(found["models"][0]["metrics"])
    rows = [
        ["model", *names],
        *([one["name"], *(_number(one["metrics"][name]) for name in names)]
          for one in found["models"]),
    ]  # fmt: skip
    fitted = f", fitted on {found['num_fitted']:,} held-out" if "num_fitted" in found else ""
    lines = [
        f"{found['num']:,} {found['unit']}s{fitted}; best alone by {found['metric']}: "
        f"{found['best']}",
        "",
        _columns(rows),
    ]
    for name, metrics in found["against_best"].items():
        title = f"{name} against {found['best']} ({found['level']:.0%}, paired)"
        lines += ["", title, _columns(_against_rows({"metrics": metrics}))]
    return "\n".join(lines)


def _metric_rows(metrics: Mapping[str, Mapping[str, Any]]) -> Rows:
    has_intervals = any("low" in one for one in metrics.values())
    head = ["metric", "value", *(["low", "high"] if has_intervals else [])]
    return [head, *([name, *(_number(one.get(key)) for key in head[1:])]
                    for name, one in metrics.items())]  # fmt: skip


def _slice_rows(slices: Mapping[str, Mapping[str, Any]]) -> Rows:
    names = list(next(iter(slices.values()))["metrics"]) if slices else []
    rows = [["slice", "num", *names]]
    for name, one in slices.items():
        cells = [_cell(one["metrics"][metric]) for metric in names]
        rows.append([_short(name, 60), f"{one['num']:,}", *cells])
    return rows


def _cell(one: Mapping[str, Any]) -> str:
    value = _number(one["value"], 4)
    if one.get("low") is None:
        return value
    return f"{value} ({_number(one['low'], 3)} to {_number(one['high'], 3)})"


def _against_rows(against: Mapping[str, Any]) -> Rows:
    names = ("first", "second", "difference", "low", "high", "p_value")
    rows = [["metric", *names]]
    for name, one in against["metrics"].items():
        rows.append([name, *(_number(one[key]) for key in names)])
    return rows


def _check_rows(checks: Mapping[str, Any]) -> Rows:
    rows = [["checks", "num", "passed", "share", "low", "high"]]
    for name, one in {"all": checks, **checks["kinds"], **checks.get("groups", {})}.items():
        shares = (_number(one[key], 4) for key in ("share", "low", "high"))
        rows.append([name, f"{one['num']:,}", f"{one['passed']:,}", *shares])
    return rows


def _against_title(against: Mapping[str, Any]) -> str:
    return f"Against {against['run']}, step {against['step']:,}"


def _checks_title(checks: Mapping[str, Any]) -> str:
    return f"Checks: {checks['passed']:,} of {checks['num']:,} passed"


def _right_answers(against: Mapping[str, Any]) -> str:
    found = against["right_answers"]
    return (
        f"Right in the first run alone: {found['only_first']:,}; in the second alone: "
        f"{found['only_second']:,}; McNemar's exact test: p = {found['p_value']:.4g}"
    )


def _add_table(page: Page, rows: Rows) -> None:
    page.table(rows[0], rows[1:])


def _columns(rows: Rows) -> str:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _number(value: Any, digits: int = 5) -> str:
    if value is None:
        return "undefined"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _short(text: Any, most: int = MOST_LETTERS) -> str:
    shown = str(text)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"
