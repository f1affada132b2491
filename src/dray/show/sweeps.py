"""What a person sees of a sweep: a table of its trials, live on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast

from rich.console import Console
from rich.live import Live
from rich.table import Table

from dray.plan import format_seconds
from dray.processes.streams import Forgiving
from dray.redaction import redact
from dray.show.progress import Display
from dray.show.report import rendered

MOST_ROWS = 24
"""Trials in a live table: those at work, and the best and newest of the others."""
Summarize = Callable[[], Mapping[str, Any]]


class SweepDisplay:
    """Shows the trials of one sweep."""

    def __init__(self, stream: TextIO | None = None) -> None:
        forgiving = cast(TextIO, Forgiving(stream or sys.stderr))
        self._console = Console(file=forgiving, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._summarize: Summarize | None = None

    @contextmanager
    def trials(self, summarize: Summarize) -> Iterator[None]:
        """Show what `summarize` tells while the block runs."""
        self._summarize = summarize
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, transient=True, refresh_per_second=4) as self._live:
            yield
        self._live = None

    def look(self) -> None:
        """Bring the live table up to date."""
        if self._live is not None and self._summarize is not None:
            self._live.update(make_table(self._summarize(), MOST_ROWS))

    def ended(self, trial: Mapping[str, Any]) -> None:
        """Tell how a trial ended."""
        values = "  ".join(f"{path} {shown(value)}" for path, value in trial["parameters"].items())
        found = "  ".join(f"{name} {shown(value)}" for name, value in trial["metrics"].items())
        status = "paused" if trial["status"] == "waiting" else trial["status"]
        why = f"  {trial['cause']}: {trial['reason']}" if trial["cause"] else ""
        self.say(
            f"trial {trial['name']}  {status} at step {trial['step']}  {values}  "
            f"{found or 'no result'}{why}"
        )

    def say(self, text: str) -> None:
        """Show one remark on a line of its own."""
        self._console.print(redact(text), markup=False)

    def of_trial(self, number: int) -> Display:
        """The display of one trial: its remarks, with its number, without its steps."""
        return _TrialDisplay(self, number)


class _TrialDisplay(Display):
    def __init__(self, whole: SweepDisplay, number: int) -> None:
        super().__init__()
        self._whole, self._number = whole, number

    @contextmanager
    def steps(self, num_steps: int, done: int) -> Iterator[None]:
        yield

    def step(self, row: Mapping[str, Any]) -> None:
        pass

    def validation(self, step: int, values: Mapping[str, float | None]) -> None:
        pass

    def say(self, text: str) -> None:
        self._whole.say(f"trial {self._number:04d}: {text}")


def format_sweep(summary: Mapping[str, Any], *, with_best: bool = True) -> str:
    """A sweep as a page: where it stands, its trials, what was best."""
    wanted = summary.get("num_trials")
    lines = [
        f"{summary['name']}  {summary['status']}  {len(summary['trials'])}"
        f"{f'/{wanted}' if wanted else ''} trials  {summary['metric']} ({summary['mode']})"
    ]
    if summary.get("reason"):
        lines.append(f"  reason  {summary['reason']}")
    best = summary["best"]
    if best is not None and with_best:
        values = "  ".join(f"{path} {shown(value)}" for path, value in best["parameters"].items())
        spread = "" if best["deviation"] is None else f" ± {best['deviation']:.3g}"
        early = "" if best["is_complete"] else " (stopped before its end)"
        lines.append(
            f"  best    {best['name']}  {summary['metric']} {best['value']:.6g}{spread}{early}"
            f"  {values}"
        )
    if summary["trials"]:
        lines.append(rendered(make_table(summary)))
    return "\n".join(lines)


def format_sweeps(summaries: Sequence[Mapping[str, Any]]) -> str:
    """A table of sweeps, one a line."""
    table = Table(box=None, pad_edge=False)
    for title in ("sweep", "status", "trials", "best"):
        table.add_column(title, overflow="fold")
    for summary in summaries:
        best = summary["best"]
        table.add_row(
            summary["name"],
            summary["status"],
            str(len(summary["trials"])),
            f"{best['name']}  {summary['metric']} {best['value']:.6g}" if best else "",
        )
    return rendered(table)


def make_table(summary: Mapping[str, Any], most: int | None = None) -> Table:
    """The trials of a sweep as a table, the best first among those that have ended."""
    metric = str(summary["metric"])
    sign = 1 if summary["mode"] == "min" else -1
    paths = list(dict.fromkeys(path for trial in summary["trials"] for path in trial["parameters"]))
    table = Table(box=None, pad_edge=False)
    for title in ("trial", "status", "step", *_short(paths), metric, "time", "cause"):
        table.add_column(title, overflow="fold")

    def rank(trial: Mapping[str, Any]) -> tuple[bool, float, str]:
        value = trial["metrics"].get(metric)
        return (
            trial["status"] != "running",
            sign * value if value is not None else 1e300,
            trial["name"],
        )

    for trial in sorted(summary["trials"], key=rank)[:most]:
        table.add_row(
            trial["name"].rpartition("/")[2],
            trial["status"],
            str(trial["step"]),
            *(shown(trial["parameters"].get(path)) for path in paths),
            shown(trial["metrics"].get(metric)),
            format_seconds(trial["seconds"]),
            trial["cause"],
        )
    left = 0 if most is None else len(summary["trials"]) - most
    if left > 0:
        table.add_row(f"and {left} more")
    return table


def _short(paths: Sequence[str]) -> list[str]:
    """The last words of dotted paths, where these differ."""
    names = [path.rpartition(".")[2] for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def shown(value: object) -> str:
    """A value as a table has it."""
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
