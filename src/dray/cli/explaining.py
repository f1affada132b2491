"""The command that explains predictions."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dray.cli.looking import locate
from dray.processes.imports import require_package

if TYPE_CHECKING:
    from dray.release.trained import Trained
    from dray.show.html import Page


def explain_command(arguments: argparse.Namespace) -> int:
    from dray.release.explaining.explain import Wanted, explain
    from dray.release.trained import open_trained
    from dray.show.explanation import format_explanation, make_explanation_page
    from dray.show.progress import Display

    storage, name = locate(arguments)
    if arguments.html:
        require_package("matplotlib", "report", "a page")
    trained = open_trained(storage, name, arguments.step, arguments.weights)
    if trained.task.finds_features:
        return _tell_features(arguments, trained)
    wanted = Wanted(
        arguments.method,
        10 if arguments.rows is None else arguments.rows,
        arguments.neighbours,
        arguments.by,
        arguments.search,
        not arguments.no_trace,
    )
    wanted.check()
    require_package("captum", "explain", "an explanation")
    found = explain(trained, arguments.data, wanted, Display().say).to_json()
    _give(arguments, found, format_explanation, make_explanation_page)
    return 0


def _tell_features(arguments: argparse.Namespace, trained: Trained) -> int:
    """What an explanation is of a task whose models find features."""
    from dray.release.explaining.features import WantedFeatures, tell_features
    from dray.show.features import format_features, make_features_page
    from dray.show.progress import Display

    given = {"num_records": arguments.rows, "num_features": arguments.features}
    wanted = WantedFeatures(**{key: value for key, value in given.items() if value is not None})
    found = tell_features(trained, arguments.data, wanted, Display().say)
    _give(arguments, found, format_features, make_features_page)
    return 0


def _give(
    arguments: argparse.Namespace,
    found: dict[str, Any],
    form: Callable[[dict[str, Any]], str],
    make_page: Callable[[dict[str, Any]], Page],
) -> None:
    """Print what was found, and write the page that is asked for."""
    from dray.show.html import write_page

    if arguments.html:
        write_page(make_page(found), arguments.html)
    if arguments.json:
        arguments.out.say_json(found)
        return
    arguments.out.say(form(found))
    if arguments.html:
        arguments.out.say(f"{arguments.html} written: open it in a browser")
