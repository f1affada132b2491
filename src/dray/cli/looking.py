"""Commands that look at what a storage has."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import asdict
from typing import TYPE_CHECKING

from dray.errors import StoreError

if TYPE_CHECKING:
    from dray.runs import Run
    from dray.sweep.record import Sweep


def locate(arguments: argparse.Namespace, *, sweeps: bool = False) -> tuple[str, str]:
    """Storage and name of a run given by name or by the path of its folder. A trial of a sweep is
    SWEEP/0007, and the best one SWEEP/best. Raises StoreError for a sweep, unless `sweeps` may be
    named."""
    storage, name = split_place(arguments.run, arguments.storage)
    folder, _, last = name.rpartition("/")
    if not sweeps and _find_sweep(storage, name) is not None:
        raise StoreError(
            f"run {name!r}",
            "is a sweep, whose trials are runs",
            way_out=f"name one of them: {name}/0001, or {name}/best",
        )
    if last != "best" or not folder:
        return storage, name
    from dray.runs.layout import make_trial_name
    from dray.sweep.record import Sweep
    from dray.sweep.summary import find_trial

    return storage, make_trial_name(folder, find_trial(Sweep.open(storage, folder), last).number)


def split_place(given: str, storage: str) -> tuple[str, str]:
    """Storage and name by what a person gave: a name in `storage`, or a path."""
    given = given.rstrip("/")
    folder, slash, last = given.rpartition("/")
    if not slash:
        return storage, given
    if last == "best" or last.isdecimal():
        from dray.sweep.record import Sweep

        above, inner, sweep = folder.rpartition("/")
        place = (above or "/") if inner else storage
        if Sweep.find(place, sweep) is not None:
            return place, f"{sweep}/{last}"
    return folder or "/", last


def runs_command(arguments: argparse.Namespace) -> int:
    from dray.runs import list_runs
    from dray.show.report import format_runs
    from dray.show.sweeps import format_sweeps
    from dray.sweep.record import list_sweeps
    from dray.sweep.summary import summarize

    if arguments.address:
        return _say_jobs(arguments)
    summaries = [run.summary() for run in list_runs(arguments.storage)]
    if arguments.json:
        arguments.out.say_json(summaries)
        return 0
    sweeps = [summarize(sweep) for sweep in list_sweeps(arguments.storage)]
    if summaries or not sweeps:
        arguments.out.say(format_runs(summaries))
    if sweeps:
        arguments.out.say(format_sweeps(sweeps))
    return 0


def _say_jobs(arguments: argparse.Namespace) -> int:
    from dray.jobs import JobServer
    from dray.show.report import format_jobs

    jobs = JobServer(arguments.address).jobs()
    if arguments.json:
        arguments.out.say_json([asdict(job) for job in jobs])
    else:
        arguments.out.say(format_jobs([asdict(job) for job in jobs]))
    return 0


def show_command(arguments: argparse.Namespace) -> int:
    from dray.privacy import privacy_of
    from dray.runs import Run
    from dray.show.report import format_summary, load_account

    if arguments.augment is not None:
        return _say_augmented(arguments)
    storage, name = locate(arguments, sweeps=True)
    sweep = _find_sweep(storage, name)
    if sweep is not None:
        say_sweep(sweep, arguments)
        return 0
    run = Run.open(storage, name)
    if arguments.json:
        told = {**run.summary(), "data": load_account(run)}
        if (privacy := privacy_of(run)) is not None:
            told["privacy"] = privacy
        arguments.out.say_json(told)
    else:
        arguments.out.say(format_summary(run))
    return 0


def _say_augmented(arguments: argparse.Namespace) -> int:
    from dray.corpus.manifest import load_run_manifest
    from dray.corpus.prepare import find
    from dray.runs import Run
    from dray.show.augmented import find_examples, format_examples
    from dray.spec import load_spec

    if arguments.run.endswith((".yaml", ".yml")):
        spec = load_spec(arguments.run)
        corpus = find(spec, arguments.storage)
        if corpus is None:
            raise StoreError(
                arguments.run,
                "its corpus is not prepared",
                "examples are of its training rows",
                f"dray prepare {arguments.run}",
            )
        folder, manifest = corpus.folder, corpus.manifest
    else:
        run = Run.open(*locate(arguments))
        spec, manifest, folder = run.spec(), load_run_manifest(run), run.corpus
    found = find_examples(spec, folder, manifest, max(0, arguments.augment))
    if arguments.json:
        arguments.out.say_json(found)
    else:
        arguments.out.say(format_examples(found))
    return 0


def say_sweep(sweep: Sweep, arguments: argparse.Namespace) -> None:
    """Show a sweep; of a ladder its forecast, too."""
    from dray.ladder.forecast import load_forecast
    from dray.show.ladders import format_forecast
    from dray.show.sweeps import format_sweep
    from dray.sweep.summary import load_study, summarize_record

    record = sweep.record()
    study = load_study(sweep, record) if "scale" in record else None
    summary = summarize_record(sweep, record, study)
    text = format_sweep(summary, with_best="ladder" not in record)  # of rungs none has won
    if "ladder" in record:
        found = load_forecast(record["ladder"], study)
        summary["forecast"] = found.to_json() if found else None
        text += f"\n{format_forecast(summary['forecast'])}"
    if arguments.json:
        arguments.out.say_json(summary)
    else:
        arguments.out.say(text)


def report_command(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from dray.ladder.page import add_forecast
    from dray.runs import Run
    from dray.show.run_page import make_run_page
    from dray.sweep.page import make_sweep_page

    storage, name = locate(arguments, sweeps=True)
    sweep = _find_sweep(storage, name)
    page = (
        make_run_page(Run.open(storage, name))
        if sweep is None
        else make_sweep_page(sweep, first=add_forecast)
    )
    path = Path(arguments.file or f"{name.replace('/', '-')}-report.html")
    try:
        path.write_text(page.render(), encoding="utf-8")
    except OSError as error:
        raise StoreError(
            str(path), f"cannot be written ({error.strerror})", way_out="name another file by --out"
        ) from error
    arguments.out.say(f"{path} written: open it in a browser")
    return 0


def _find_sweep(storage: str, name: str) -> Sweep | None:
    from dray.sweep.record import Sweep

    return Sweep.find(storage, name)


def doctor_command(arguments: argparse.Namespace) -> int:
    from dray.doctor import diagnose
    from dray.runs import Run
    from dray.show.report import format_diagnosis

    diagnosis = diagnose(Run.open(*locate(arguments)))
    if arguments.json:
        arguments.out.say_json(diagnosis.to_json())
    else:
        arguments.out.say(format_diagnosis(diagnosis))
    return 0


def verify_command(arguments: argparse.Namespace) -> int:
    from dray.runs import Run, find_checkpoint, verify_checkpoint
    from dray.show.report import format_verification

    if _names_export(arguments):
        return _verify_export(arguments)
    if arguments.key:
        raise StoreError(
            f"--key {arguments.key}",
            f"{arguments.run} is no exported folder",
            "exports are signed, runs are not",
            "leave --key out, or name the folder by its path",
        )
    storage, name = locate(arguments)
    if os.path.isdir(arguments.run) and Run.find(storage, name) is None:
        raise StoreError(
            arguments.run,
            "is neither a run nor an exported folder",
            "a run has a run.json, an exported folder a dray-manifest.json",
            "`dray runs` lists the runs of a storage",
        )
    run = Run.open(storage, name)
    if arguments.ledger:
        return _verify_ledger(run, arguments)
    report = verify_checkpoint(run, find_checkpoint(run, arguments.step))
    if arguments.json:
        arguments.out.say_json(report.to_json())
    else:
        arguments.out.say(format_verification(report))
    return 0 if report.ok else 3


def _names_export(arguments: argparse.Namespace) -> bool:
    """Whether what is to be verified is an exported folder: a run's name in the storage comes
    first, where no path is written."""
    from dray.release.export.manifest import is_export
    from dray.runs import Run
    from dray.spec import RUN_NAME

    given = arguments.run
    if not is_export(given):
        return False
    by_path = "/" in given or not re.fullmatch(RUN_NAME, given)
    return bool(by_path or arguments.key) or Run.find(arguments.storage, given) is None


def _verify_export(arguments: argparse.Namespace) -> int:
    from dray.release.export.manifest import format_report, verify_folder
    from dray.release.export.signing import load_public_key

    if arguments.ledger or arguments.step is not None:
        raise StoreError(
            "--ledger" if arguments.ledger else "--step",
            f"{arguments.run} is an exported folder",
            "it is of one step, and has no ledger",
            "verify the run that its README.md names",
        )
    key = load_public_key(arguments.key) if arguments.key else None
    report = verify_folder(arguments.run, key)
    if arguments.json:
        arguments.out.say_json(report.to_json())
    else:
        arguments.out.say(format_report(report))
    return 0 if report.ok else 3


def _verify_ledger(run: Run, arguments: argparse.Namespace) -> int:
    from dray.ledger import verify_ledger
    from dray.show.report import format_ledger

    report = verify_ledger(run, arguments.step)
    if arguments.json:
        arguments.out.say_json(report.to_json())
    else:
        arguments.out.say(format_ledger(report))
    return 0 if report.ok else 3
