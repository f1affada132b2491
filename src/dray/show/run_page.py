"""One run as a page: how it learnt, how fast, what befell it, what it was made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from dray.doctor import diagnose
from dray.doctor.diagnosis import Past
from dray.errors import caught
from dray.plan import format_bytes, format_seconds
from dray.privacy import told_privacy
from dray.runs import Run
from dray.runs.records import finite
from dray.show.html import Page
from dray.show.plots import COLORS, Line, draw_lines, draw_spans
from dray.show.report import load_account
from dray.spec import dump_spec

POINTS = 600
"""Of a curve: what lies closer together is averaged."""
COLUMNS = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "data_wait_seconds_max",
    "step_seconds_max",
)
MOST_ROWS = 200
"""Of a table: what is left out is counted."""


def make_run_page(run: Run) -> Page:
    """The page of a run. Raises StoreError where its folder cannot be read."""
    summary, plan = run.summary(), caught(run.plan)[0] or {}
    page = Page(f"Run {run.name}")
    curves = read_curves(run, int(plan.get("num_steps") or summary["step"] or 1))
    seconds, privacy = curves.seconds, told_privacy(run)
    page.facts(
        {
            "status": summary["status"],
            "reason": summary["reason"],
            "step": f"{summary['step']:,} of {summary['num_steps'] or '?'}",
            "tokens": f"{curves.tokens:,}" if curves.tokens else "",
            "time in steps": format_seconds(seconds) if seconds else "",
            "train loss": _number(summary["train_loss"]),
            **{
                f"validation {name}": _number(value)
                for name, value in summary["validation"].items()
                if name not in ("step", "num_targets")
            },
            "privacy": privacy or "",
            "begun": str(summary["created"])[:19].replace("T", " "),
            "fingerprint": summary["fingerprint"][:12],
            "folder": run.uri,
        }
    )
    _add_curves(page, run, curves)
    _add_time(page, run, summary)
    _add_plan(page, plan, curves)
    _add_checkpoints(page, summary["checkpoints"])
    _add_data(page, run)
    page.section("Spec")
    page.code(dump_spec(run.spec()))
    return page


# ---- curves ------------------------------------------------------------------------------------


@dataclass
class Curves:
    """Columns of a run's metrics, averaged over equal stretches of steps."""

    steps: list[float] = field(default_factory=list)
    values: dict[str, list[float | None]] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0
    memory_bytes: float = 0.0


def read_curves(run: Run, num_steps: int, columns: Sequence[str] = COLUMNS) -> Curves:
    """The curves of a run, however long it is, in one pass."""
    width = max(1, -(-num_steps // POINTS))
    curves = Curves(values={name: [] for name in columns})
    wanted = ["step", "tokens", "seconds", "memory_bytes_max", *columns]
    sums: dict[str, list[float]] = {name: [] for name in columns}
    last: int | None = None

    def close(bucket: int) -> None:
        curves.steps.append(min((bucket + 1) * width, num_steps) if width > 1 else bucket + 1)
        for name, found in sums.items():
            curves.values[name].append(sum(found) / len(found) if found else None)
            found.clear()

    for row in run.iterate_history(wanted):
        bucket = (int(row["step"]) - 1) // width
        if last is not None and bucket != last:
            close(last)
        last = bucket
        curves.seconds += float(row.get("seconds") or 0.0)
        curves.tokens = int(row.get("tokens") or curves.tokens)
        curves.memory_bytes = max(curves.memory_bytes, float(row.get("memory_bytes_max") or 0.0))
        for name in columns:
            value = row.get(name)
            if (number := finite(value)) is not None:
                sums[name].append(number)
    if last is not None:
        close(last)
    return curves


def _add_curves(page: Page, run: Run, curves: Curves) -> None:
    if not curves.steps:
        page.note("No step is done yet.")
        return
    validations = run.validations()
    steps = [float(row["step"]) for row in validations]
    names = [
        name
        for name in (validations[-1] if validations else {})
        if name not in ("step", "attempt", "kind", "time", "num_targets", "loss")
    ]

    def values(name: str) -> list[float | None]:
        return [finite(row.get(name)) for row in validations]

    def curve(name: str, color: str = COLORS[0]) -> list[Line]:
        return [Line(name, curves.steps, curves.values[name], color=color)]

    page.section("How it learnt")
    page.plots(
        [
            (
                "Loss",
                draw_lines(
                    [
                        Line("training", curves.steps, curves.values["loss"]),
                        Line("validation", steps, values("loss"), marked=True),
                    ],
                    x_label="step",
                    y_label="loss",
                ),
            ),
            *(
                (
                    f"Validation: {name.replace('_', ' ')}",
                    draw_lines(
                        [Line(name, steps, values(name), marked=True)],
                        x_label="step",
                        y_label=name,
                    ),
                )
                for name in names
            ),
            (
                "Learning rate",
                draw_lines(curve("learning_rate"), x_label="step", y_label="learning rate"),
            ),
            (
                "Gradient norm",
                draw_lines(curve("grad_norm"), x_label="step", y_label="norm", log=True),
            ),
        ]
    )
    page.section("How fast")
    waits = [
        None if wait is None or not step else 100 * wait / step
        for wait, step in zip(
            curves.values["data_wait_seconds_max"], curves.values["step_seconds_max"], strict=True
        )
    ]
    page.plots(
        [
            (
                "Tokens a second",
                draw_lines(curve("tokens_per_second"), x_label="step", y_label="tokens/s"),
            ),
            (
                "Waiting for data",
                draw_lines(
                    [Line("share", curves.steps, waits)], x_label="step", y_label="% of a step"
                ),
            ),
        ]
    )


# ---- time --------------------------------------------------------------------------------------

_ENDS = {"completed": COLORS[2], "early_stopped": COLORS[2], "interrupted": COLORS[3]}


def _add_time(page: Page, run: Run, summary: Mapping[str, Any]) -> None:
    """Attempts as bars on a time axis, with what befell them."""
    events = run.events()
    times = [time for event in events if (time := _seconds(event.get("time"))) is not None]
    attempts = [
        (attempt, begin)
        for attempt in summary["attempts"]
        if (begin := _seconds(attempt.get("started"))) is not None
    ]
    if not attempts:
        return
    origin = attempts[0][1]
    latest = max([*times, *(begin for _, begin in attempts)])
    rows, marks = [], []
    for index, (attempt, begin) in enumerate(attempts):
        following = attempts[index + 1][1] if index + 1 < len(attempts) else latest
        end = _seconds(attempt.get("ended")) or following
        color = _ENDS.get(
            str(attempt.get("status")), COLORS[1] if index + 1 < len(attempts) else COLORS[5]
        )
        name = f"attempt {attempt['attempt']}, {attempt['num_ranks']} ranks"
        rows.append((name, (begin - origin) / 60, (end - origin) / 60, color))
    for event in events:
        at = _seconds(event.get("time"))
        if at is None:
            continue
        minute = (at - origin) / 60
        if event["kind"] == "attempt_failed":
            marks.append((minute, str(event.get("cause", "failed")), COLORS[1]))
        elif event["kind"] in ("loss_spike", "hang"):
            marks.append((minute, str(event["kind"]).replace("_", " "), COLORS[3]))
    page.section("Attempts, failures and restarts")
    page.plots([("", draw_spans(rows[-40:], marks[-40:], x_label="minutes since the first start"))])
    past = {item.attempt: item for item in diagnose(run).history}
    page.table(
        ["attempt", "ranks", "from step", "to step", "ended", "cause", "what was said"],
        [
            [
                attempt["attempt"],
                attempt["num_ranks"],
                attempt["start_step"],
                attempt.get("end_step"),
                attempt.get("status") or ("goes on" if index + 1 == len(attempts) else "was lost"),
                *_failure(past.get(attempt["attempt"])),
            ]
            for index, (attempt, _) in enumerate(attempts)
        ][-MOST_ROWS:],
    )
    _say_left_out(page, len(attempts), MOST_ROWS, "attempts")


def _failure(past: Past | None) -> tuple[str, str]:
    return ("", "") if past is None else (str(past.fault), past.cause)


def _say_left_out(page: Page, count: int, most: int, what: str) -> None:
    if count > most:
        page.note(f"{count - most} earlier {what} are left out.")


# ---- what it was planned to take, and what it is made of ---------------------------------------


def _add_plan(page: Page, plan: Mapping[str, Any], curves: Curves) -> None:
    """The plan beside what was measured."""
    if "zero_stage" not in plan or not curves.steps:
        return
    rates = [rate for rate in curves.values["tokens_per_second"] if rate]
    half = sorted(rates)[len(rates) // 2] if rates else None
    planned = plan.get("step_seconds")
    wanted = plan["tokens_per_step"] / planned if planned else None
    memory = plan.get("memory", {}).get("total")
    page.section("The plan and what was measured")
    rows: list[list[object]] = [
        [
            "tokens a second (median)",
            _number(wanted, ",.0f"),
            _number(half, ",.0f"),
            _ratio(half, wanted),
        ],
        [
            "memory of a rank at its peak",
            format_bytes(memory) if memory else None,
            format_bytes(curves.memory_bytes) if curves.memory_bytes else None,
            _ratio(curves.memory_bytes, memory),
        ],
        [
            "time",
            format_seconds(plan["est_seconds"]) if plan.get("est_seconds") else None,
            format_seconds(curves.seconds),
            _ratio(curves.seconds, plan.get("est_seconds")),
        ],
    ]
    page.table(["", "planned", "measured", "measured ÷ planned"], rows)
    page.note(
        f"ZeRO stage {plan['zero_stage']}, {plan['precision']}, {plan['num_ranks']} ranks, "
        f"{plan['num_parameters']:,} parameters. {plan.get('zero_reason', '')}"
    )


def _add_checkpoints(page: Page, checkpoints: Sequence[Mapping[str, Any]]) -> None:
    if not checkpoints:
        return
    page.section("Checkpoints")
    page.table(
        ["step", "attempt", "size", "state"],
        [
            [
                item["step"],
                item["attempt"],
                format_bytes(item["bytes"]),
                "sound" if item["verified"] else f"unsound: {item['problem']}",
            ]
            for item in checkpoints
        ][-MOST_ROWS:],
    )


def _add_data(page: Page, run: Run) -> None:
    account = load_account(run)
    if account is None:
        return
    page.section("Data")
    page.facts(
        {
            "files": f"{account['num_files']:,}",
            "read": format_bytes(account["num_source_bytes"]),
            "documents kept": f"{account['num_documents']:,}",
            "tokens": f"{account['num_tokens']:,}",
            "records that could not be read": f"{account['num_bad']:,}",
            "documents cut": f"{account['num_truncated_documents']:,}",
            "tokens lost by that": f"{account['num_truncated_tokens']:,}",
        }
    )
    if account["dropped"]:
        page.table(
            ["dropped because", "documents"],
            [[name.replace("_", " "), f"{count:,}"] for name, count in account["dropped"].items()],
        )
    if account["documents_by_label"]:
        page.table(
            ["class", "training documents"],
            [[name, f"{count:,}"] for name, count in account["documents_by_label"].items()],
        )


# ---- words and numbers -------------------------------------------------------------------------


def _seconds(time: object) -> float | None:
    try:
        return datetime.fromisoformat(str(time)).timestamp()
    except ValueError:
        return None


def _number(value: object, form: str = ".6g") -> str | None:
    return format(value, form) if isinstance(value, int | float) else None


def _ratio(measured: float | None, planned: float | None) -> str | None:
    return f"{measured / planned:.2f}" if measured and planned else None
