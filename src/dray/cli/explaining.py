"""The command that explains predictions."""

from __future__ import annotations

import argparse

from dray.cli.looking import locate
from dray.processes.imports import require_package


def explain_command(arguments: argparse.Namespace) -> int:
    from dray.release.explaining.explain import Wanted, explain
    from dray.release.trained import load_trained
    from dray.show.explanation import format_explanation, make_explanation_page
    from dray.show.html import write_page
    from dray.show.progress import Display

    storage, name = locate(arguments)
    wanted = Wanted(
        arguments.method,
        arguments.rows,
        arguments.neighbours,
        arguments.by,
        arguments.search,
        not arguments.no_trace,
    )
    wanted.check()
    require_package("captum", "explain", "an explanation")
    if arguments.html:
        require_package("matplotlib", "report", "a page")
    trained = load_trained(storage, name, arguments.step, arguments.weights)
    found = explain(trained, arguments.data, wanted, Display().say).to_json()
    if arguments.html:
        write_page(make_explanation_page(found), arguments.html)
    if arguments.json:
        arguments.out.say_json(found)
        return 0
    arguments.out.say(format_explanation(found))
    if arguments.html:
        arguments.out.say(f"{arguments.html} written: open it in a browser")
    return 0
