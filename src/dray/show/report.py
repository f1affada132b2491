"""Reads the store and explains it: one run as a page, all runs as a table, what was verified."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dray.corpus.account import describe, to_json
from dray.corpus.manifest import Manifest, SourceFile, load_manifest, load_source_files
from dray.doctor import Diagnosis
from dray.errors import UserError
from dray.ledger import LedgerReport
from dray.plan import format_bytes, format_seconds
from dray.privacy import told_privacy
from dray.runs import CheckpointReport, Run
from dray.runs.uptime import describe_interval, find_interval
from dray.show.compression import format_compression
from dray.show.progress import format_loss, format_values
from dray.storage.filesystem import open_filesystem

SPARK = "▁▂▃▄▅▆▇█"
MAX_OTHERS = 4


def format_runs(summaries: Sequence[Mapping[str, Any]]) -> str:
    """A table of runs, one a line."""
    if not summaries:
        return "no runs here"
    table = _table("run", "status", "step", "train loss", "validation", "tokens/s", "checkpoints")
    for summary in summaries:
        validation = summary["validation"].get("loss")
        table.add_row(
            summary["name"],
            summary["status"],
            f"{summary['step']}/{summary['num_steps'] or '?'}",
            _number(summary["train_loss"]),
            _number(validation),
            _number(summary["tokens_per_second"], ",.0f"),
            ", ".join(str(item["step"]) for item in summary["checkpoints"] if item["verified"])
            or "none",
        )
    return rendered(table)


def format_jobs(jobs: Sequence[Mapping[str, Any]]) -> str:
    """A table of a cluster's jobs, one a line."""
    if not jobs:
        return "no jobs of dray's there"
    table = _table("job", "status", "run", "storage", "command")
    for job in jobs:
        table.add_row(job["id"], job["status"], job["run"], job["storage"], job["command"])
    return rendered(table)


def format_summary(run: Run) -> str:
    """One run: where it stands, its losses as a line, its validation, its attempts and
    checkpoints."""
    summary, outline = run.summary(), run.outline()
    validation = {k: v for k, v in summary["validation"].items() if k != "step"}
    lines = [
        f"{summary['name']}  {summary['status']}  step "
        f"{summary['step']}/{summary['num_steps'] or '?'}"
        f"  fingerprint {summary['fingerprint'][:12]}",
        f"  folder       {run.uri}",
    ]
    if summary["reason"]:
        lines.append(f"  reason       {summary['reason']}")
    if outline.num_steps:
        losses = [math.nan if loss is None else loss for loss in outline.losses]
        lines += [
            f"  train loss   {format_loss(outline.first_loss)} {sparkline(losses)} "
            f"{format_loss(summary['train_loss'])}",
            f"  speed        {_number(summary['tokens_per_second'], ',.0f')} tokens/s; "
            f"{outline.tokens or 0:,} tokens, {format_seconds(outline.seconds)} of steps; peak "
            f"{format_bytes(outline.memory_bytes_max)} a rank",
        ]
    if validation:
        at = summary["validation"].get("step")
        lines.append(f"  validation   {format_values(validation)}  (step {at})")
    compressors = run.record().get("compressors")
    if compressors and validation.get("bits_per_byte") is not None:
        others = ", ".join(f"{name} {value:.3f}" for name, value in compressors.items())
        lines.append(
            f"  bits a byte  {validation['bits_per_byte']:.3f}; the same held-out text: {others}"
        )
    lines += _describe_data(run)
    if privacy := told_privacy(run):
        lines.append(f"  privacy      {privacy}")
    if table := summary.get("compression"):
        lines += [f"  {line}".rstrip() for line in format_compression(table).splitlines()]
    if told := find_interval(run):
        lines.append(f"  saves        {describe_interval(told)}")
    for attempt in summary["attempts"]:
        lines.append(
            f"  attempt {attempt['attempt']:<4} {attempt['num_ranks']} ranks from step "
            f"{attempt['start_step']}"
            f"{', ' + attempt['status'] if attempt.get('status') else ''}"
        )
    for item in summary["checkpoints"]:
        state = "sound" if item["verified"] else f"unsound: {item['problem']}"
        lines.append(f"  checkpoint   step {item['step']}  {format_bytes(item['bytes'])}  {state}")
    return "\n".join(lines)


def load_account(run: Run) -> dict[str, Any] | None:
    """What became of the run's raw data, as plain values; none where its corpus is gone."""
    found = _find_account(run)
    return to_json(*found) if found else None


def _describe_data(run: Run) -> list[str]:
    found = _find_account(run)
    return (
        [f"  {'data' if nth == 0 else '':<12} {line}" for nth, line in enumerate(describe(*found))]
        if found
        else []
    )


def _find_account(run: Run) -> tuple[Manifest, tuple[SourceFile, ...]] | None:
    try:
        place = open_filesystem(run.corpus)
        return load_manifest(*place), load_source_files(*place)
    except (UserError, OSError):  # a page about a run needs no corpus
        return None


def format_diagnosis(diagnosis: Diagnosis) -> str:
    """Why a run ended as it did: class and cause, where, the evidence, and the way out."""
    lines = [f"{diagnosis.run}  {diagnosis.fault}: {diagnosis.cause}"]
    place = [
        f"{name} {value}"
        for name, value in (
            ("attempt", diagnosis.attempt),
            ("rank", diagnosis.rank),
            ("node", diagnosis.node or None),
            ("process", diagnosis.pid),
            ("step", diagnosis.step),
        )
        if value is not None
    ]
    if diagnosis.attempt is not None:
        lines.append(f"  where        {', '.join(place)}")
    for exhibit in diagnosis.exhibits:
        lines.append(f"  {exhibit.kind:<12} {exhibit.source}")
        lines += [f"    │ {line.rstrip()}" for line in exhibit.lines if line.strip()]
    lines += [f"  meanwhile    {other}" for other in diagnosis.others[:MAX_OTHERS]]
    if len(diagnosis.others) > MAX_OTHERS:
        lines.append(f"  meanwhile    {len(diagnosis.others) - MAX_OTHERS} more ranks")
    lines += [
        f"  before       attempt {past.attempt}: {past.fault}, {past.cause}"
        for past in diagnosis.history
        if past.attempt != diagnosis.attempt
    ]
    lines += [f"  note         {note}" for note in diagnosis.notes]
    return "\n".join([*lines, f"  way out      {diagnosis.way_out}"])


def format_verification(report: CheckpointReport) -> str:
    """The outcome of `dray verify`."""
    lines = [f"step {report.step}  {'sound' if report.ok else 'DAMAGED'}  {report.path}"]
    lines += [
        f"  {file['file']}  {format_bytes(file['bytes'])}  "
        f"{'ok' if file['ok'] else file['problem']}"
        for file in report.files
    ]
    lines += [f"  {problem}" for problem in report.problems]
    if report.ok:
        lines += [
            f"  weights    {report.weights_sha256}",
            f"  optimizer  {report.optimizer_sha256}",
        ]
    return "\n".join(lines)


def format_ledger(report: LedgerReport) -> str:
    """The outcome of `dray verify --ledger`."""
    begun = f"; forked at step {report.start_step}" if report.start_step else ""
    lines = [
        f"{report.run}  ledger {'sound' if report.ok else 'BROKEN'} up to step "
        f"{report.committed_step}{begun}",
        f"  steps      {report.steps:,} committed, {report.uncommitted_steps:,} past the "
        f"checkpoint; {report.attempts:,} attempts, {report.redone_steps:,} steps done again",
        f"  rows       {report.rows_used:,} used; {report.repeated:,} repeated, "
        f"{report.skipped:,} skipped, {report.left_out:,} left out",
    ]
    apart = ", ".join(
        f"{name} {count:,}"
        for name, count in report.epochs_by_source.items()
        if count != report.epochs
    )
    lines.append(f"  epochs     {report.epochs:,} completed{f' ({apart})' if apart else ''}")
    if report.unlogged_steps:
        lines.append(
            f"  unlogged   {report.unlogged_steps:,} steps without a metrics row, proven by the "
            "checkpoint"
        )
    if report.left_out_batches:
        lines.append(f"  left out   batches {', '.join(map(str, report.left_out_batches))}")
    lines += (
        [f"  digest     {report.digest}"]
        if report.ok
        else [f"  {problem}" for problem in report.problems]
    )
    return "\n".join(lines)


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """Values as a line of block characters, averaged into `width` bins."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    size = max(1, len(finite) / width)
    bins = [
        finite[int(i * size) : max(int(i * size) + 1, int((i + 1) * size))]
        for i in range(min(width, len(finite)))
    ]
    means = [sum(part) / len(part) for part in bins]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(SPARK[min(7, int((value - low) / span * 8))] for value in means)


def _number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form)


def _table(*headers: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        table.add_column(header)
    return table


def rendered(table: Table) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=160).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().splitlines())
