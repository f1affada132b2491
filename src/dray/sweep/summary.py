"""A sweep as plain values, for people and programs, and the spec of its best trial."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from dray.errors import StoreError
from dray.plan import Law
from dray.runs.layout import make_trial_name
from dray.spec import make_spec
from dray.sweep.events import Event
from dray.sweep.policies import NoPolicy
from dray.sweep.record import Sweep
from dray.sweep.space import Space, around_law, find_in, make_space, with_values
from dray.sweep.study import WAITING, Best, Scale, Study, Trial


def summarize(sweep: Sweep) -> dict[str, Any]:
    """What `dray show SWEEP --json` prints: name, status, metric, mode, trials, best, …"""
    record = sweep.record()
    return summarize_record(sweep, record, load_study(sweep, record) if "scale" in record else None)


def summarize_record(
    sweep: Sweep, record: Mapping[str, Any], study: Study | None
) -> dict[str, Any]:
    """The same of what has been read already; `study` is none for a sweep without trials."""
    status = record["status"]
    if study is None:  # its corpus was not there yet
        return {
            "name": sweep.name,
            "status": status,
            "reason": record.get("reason", ""),
            "created": record["created"],
            "metric": make_space(record["space"]).metric,
            "mode": make_space(record["space"]).mode,
            "trials": [],
            "best": None,
        }
    if status == "running" and not sweep.is_driven(time.time()):
        status = "interrupted"
    if status != "running":
        study.interrupt()
    summary = summarize_study(study, sweep.name, status, record["metric"])
    return summary | {
        "reason": record.get("reason", ""),
        "created": record["created"],
        "hours": record.get("hours"),
    }


def load_study(
    sweep: Sweep,
    record: Mapping[str, Any] | None = None,
    events: Iterable[Event] | None = None,
) -> Study:
    """What is known of a sweep, by its log; for looking at it, not for going on with it. `record`
    and `events`: what has been read of it already."""
    record = record or sweep.record()
    if "scale" not in record:
        raise StoreError(f"sweep {sweep.name!r}", "has begun no trial yet")
    space, tree = make_space(record["space"]), record["spec"]
    if record.get("law"):
        tree, space = with_law(tree, space, Law(**record["law"]))
    study = Study(space, tree, make_spec(tree), Scale(**record["scale"]), NoPolicy())
    for event in (event for _, event in sweep.events()) if events is None else events:
        study.apply(event)
    return study


def with_law(tree: Mapping[str, Any], space: Space, law: Law) -> tuple[Mapping[str, Any], Space]:
    """Spec and space with the law's numbers where they ask for them."""
    spec = make_spec(tree)
    given = spec.model_dump()
    asked = {path: number for path, number in law.numbers().items() if not find_in(given, path)}
    return with_values(tree, asked), around_law(space, law)


def find_trial(sweep: Sweep, which: str) -> Trial:
    """A trial by its number or `best`. Raises StoreError if there is none."""
    study = load_study(sweep)
    best = study.best() if which == "best" else None
    number = best.trial.number if best else int(which) if which.isdecimal() else 0
    if number not in study.trials:
        raise StoreError(
            f"sweep {sweep.name!r}",
            f"has no trial {which!r}" if which != "best" else "no trial has a result yet",
            way_out=f"`dray show {sweep.name}` lists them",
        )
    return study.trials[number]


def best_trials(sweep: Sweep, number: int) -> list[str]:
    """Names of the trials with the best results, the best one first. Raises StoreError where there
    are fewer."""
    study = load_study(sweep)
    sign = study.scale.sign
    best = [(trial.best(sign), trial.number) for trial in study.trials.values()]
    found = [(one.value * sign, trial) for one, trial in best if one and one.value is not None]
    if len(found) < number:
        raise StoreError(
            f"sweep {sweep.name!r}",
            f"has results of {len(found)} trials, not of {number}",
            way_out=f"`dray show {sweep.name}` lists them",
        )
    return [make_trial_name(sweep.name, trial) for _, trial in sorted(found)[:number]]


def summarize_study(study: Study, name: str, status: str, metric: str) -> dict[str, Any]:
    """The state of a sweep as plain values."""
    sign = study.scale.sign
    best = study.best()
    trials = [summarize_trial(trial, name, metric, sign) for trial in study.trials.values()]
    return {
        "name": name,
        "status": status,
        "metric": metric,
        "mode": study.scale.mode,
        "num_trials": study.num_wanted,
        "total_steps": study.scale.total_steps,
        "steps": sum(trial["step"] for trial in trials),
        "tokens": sum(trial["tokens"] for trial in trials),
        "trials": trials,
        "best": None
        if best is None
        else {
            "name": make_trial_name(name, best.trial.number),
            "value": best.value,
            "deviation": best.deviation,
            "is_complete": best.is_complete,
            "parameters": dict(best.trial.parameters),
            "step": getattr(best.trial.best(sign), "step", None),
        },
    }


def summarize_trial(trial: Trial, sweep: str, metric: str, sign: int) -> dict[str, Any]:
    """One trial as plain values; `metrics` are those of its best validation."""
    best = trial.best(sign)
    return {
        "name": make_trial_name(sweep, trial.number),
        "status": "waiting" if trial.status == WAITING else trial.status,
        "step": trial.step,
        "starts": trial.starts,
        **(
            {"parent": make_trial_name(sweep, trial.parent), "parent_step": trial.parent_step}
            if trial.parent
            else {}
        ),
        "parameters": dict(trial.parameters),
        "metrics": {} if best is None else {**best.metrics, metric: best.value},
        "best_step": None if best is None else best.step,
        "tokens": trial.tokens,
        "seconds": trial.seconds,
        "cause": trial.cause,
        "reason": trial.reason,
    }


def make_best_spec(tree: Mapping[str, Any], sweep: str, best: Best, metric: str) -> str:
    """A spec file with the values of the best trial, and where they come from."""
    name = make_trial_name(sweep, best.trial.number)
    values = "".join(f"\n#   {path}: {value}" for path, value in best.trial.parameters.items())
    spread = "" if best.deviation is None else f" ± {best.deviation:.3g} over its repeats"
    note = "" if best.is_complete else "\n# No trial went to its end: this one was stopped before."
    head = (
        f"# Trial {name}, the best of the sweep {sweep}: {metric} {best.value:.6g}{spread}."
        f"\n# Its values:{values}{note}\n"
    )
    settled = with_values(tree, best.trial.parameters)
    return head + yaml.safe_dump(settled, sort_keys=False, allow_unicode=True, width=100)
