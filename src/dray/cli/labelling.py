"""The command that labels records by rules."""

from __future__ import annotations

import argparse


def label_command(arguments: argparse.Namespace) -> int:
    from dray.corpus.labelling.labelled import label_records
    from dray.corpus.labelling.rules import read_rules
    from dray.release.evaluate import as_source
    from dray.show.labelling import format_labelled
    from dray.show.progress import Display
    from dray.spec import Source

    sources = [Source.model_validate(as_source(text)) for text in arguments.data]
    told = label_records(
        read_rules(arguments.rules),
        sources,
        arguments.file,
        by=arguments.by,
        least=arguments.least,
        gold=arguments.gold,
        program=arguments.program,
        say=Display().say,
    )
    if arguments.json:
        arguments.out.say_json(told)
    else:
        arguments.out.say(format_labelled(told))
    return 0
