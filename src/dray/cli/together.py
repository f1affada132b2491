"""Commands of several models together: what `dray evaluate` and `dray predict` do where more than
one run is named."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dray.cli.looking import split_place
from dray.errors import PlanError, SpecError

if TYPE_CHECKING:
    from dray.release.soup import Ingredient
    from dray.release.together import Combine

ALONE = ("slices", "calibrate", "checks", "texts", "html", "thorough", "adapter", "no_adapters")
"""Options of one model alone."""


def is_together(arguments: argparse.Namespace) -> bool:
    """Whether more than one run is named. Raises SpecError where none is, PlanError for options of
    several models where there is one."""
    if arguments.others or arguments.sweep is not None:
        for option in ALONE:
            if getattr(arguments, option, None):
                raise PlanError(
                    f"--{option.replace('_', '-')}", "is of one model", "several are named",
                    "leave it out",
                )  # fmt: skip
        return True
    if arguments.run is None:
        raise SpecError("RUN", "is not given", "a run, or --sweep SWEEP", "dray runs lists them")
    if arguments.combine is not None:
        raise PlanError("--combine", "is of several models", "one is named", "name others, too")
    return False


def _members(arguments: argparse.Namespace) -> list[Ingredient]:
    """The runs that are named, and the best trials of a sweep, each with its step."""
    from dray.release.soup import Ingredient
    from dray.sweep.record import Sweep
    from dray.sweep.summary import best_trials

    named = [] if arguments.run is None else [arguments.run, *arguments.others]
    found = [Ingredient.read(words) for words in named]
    found = [one if one.step else Ingredient(one.run, arguments.step) for one in found]
    if arguments.sweep is not None:
        names = best_trials(Sweep.open(arguments.storage, arguments.sweep), arguments.best)
        found += [Ingredient(name, "best") for name in names]
    return found


def evaluate_together(arguments: argparse.Namespace) -> int:
    """Models alone and together, with paired tests."""
    from dray.release.judging.judge import Asked
    from dray.release.soup import Ingredient
    from dray.show.judgement import format_together

    Asked(arguments.intervals).check()
    how: Combine = arguments.combine or "soft"
    if how == "stacking" and not arguments.data:
        raise PlanError(
            "--combine stacking",
            "the held-out rows are what it is fitted on",
            "it is measured on others",
            "give --data",
        )
    beside = [Ingredient.read(arguments.against)] if arguments.against else []
    settings = {"workers": arguments.workers, "num_draws": arguments.intervals}
    found = judged_together(arguments, _members(arguments), how, beside, **settings)
    if arguments.json:
        arguments.out.say_json(found)
    else:
        arguments.out.say(format_together(found))
    return 0


def judged_together(
    arguments: argparse.Namespace,
    members: Sequence[Ingredient],
    how: Combine,
    beside: Sequence[Ingredient],
    *,
    workers: int | None = None,
    num_draws: int | None = None,
) -> dict[str, Any]:
    """Models alone, together, and others beside them, on the same rows."""
    from dray.release.evaluate import measure_run
    from dray.release.together import judge_together

    def measured(one: Ingredient, data: Any) -> Any:
        place, name = split_place(one.run, arguments.storage)
        return measure_run(
            place,
            name,
            data=data,
            step=one.step,
            weights=arguments.weights if one in members else "trained",
            workers=workers,
            address=arguments.address,
            verbose=arguments.verbose,
            by_row=True,
        )

    return judge_together(
        [measured(one, arguments.data) for one in members],
        how,
        fitted=[measured(one, None) for one in members] if how == "stacking" else (),
        beside=[measured(one, arguments.data) for one in beside],
        metric=arguments.metric,
        num_draws=num_draws,
    )


def give_records(arguments: argparse.Namespace, records: Iterator[dict[str, Any]]) -> None:
    """Records as the result, a line each, or into the file that is named."""
    from dray.processes.streams import write_records

    if arguments.file is not None:
        write_records(records, arguments.file)
        return
    for record in records:
        arguments.out.say_record(record)


def predict_together_command(arguments: argparse.Namespace) -> int:
    """What models say together of each record."""
    from dray.release.predict import Counts
    from dray.release.predict_together import predict_together
    from dray.show.progress import Display

    counts = Counts()
    places = [(*split_place(one.run, arguments.storage), one.step) for one in _members(arguments)]
    how: Combine = arguments.combine or "soft"
    found = predict_together(places, arguments.data, how, arguments.weights, counts)
    give_records(arguments, found)
    bad = f", {counts.num_bad:,} could not be read" if counts.num_bad else ""
    Display().say(f"{counts.num_predicted:,} records predicted by {len(places)} models{bad}")
    return 0
