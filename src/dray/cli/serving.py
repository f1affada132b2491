"""`dray serve`."""

from __future__ import annotations

import argparse

from dray.errors import SpecError


def serve_command(arguments: argparse.Namespace) -> int:
    from dray.serve.foreground import serve_models
    from dray.serve.limits import Limits
    from dray.serve.served import read_words
    from dray.show.progress import Display

    models = [read_words(words, arguments.storage) for words in arguments.models]
    for given in arguments.named or ():
        name, equals, words = given.partition("=")
        if not (name and equals and words):
            raise SpecError(f"--name {given}", "is no NAME=RUN", "as --name chat=assistant@best")
        models.append(read_words(words, arguments.storage, name))
    serve_models(
        models,
        host=arguments.host,
        port=arguments.port,
        replicas=arguments.replicas,
        address=arguments.address,
        verbose=arguments.verbose,
        limits=Limits(),
        say=Display().say,
    )
    return 0
