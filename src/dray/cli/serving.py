"""`dray serve`, and what is done to a service: its keys, and the versions of its models."""

from __future__ import annotations

import argparse
import os
import re
from datetime import UTC, datetime

from dray.errors import SpecError

FOLLOWING = "services of this storage follow: within a second, or once new replicas are there"


def serve_command(arguments: argparse.Namespace) -> int:
    from dray.corpus.redacting import make_redactor
    from dray.serve.foreground import serve_models
    from dray.serve.limits import Limits
    from dray.serve.request_log import Logged
    from dray.serve.served import read_words
    from dray.serve.tls import read_tls
    from dray.show.progress import Display
    from dray.spec import Redaction

    redact = Redaction(mode=arguments.redact) if arguments.redact else None
    models = [read_words(words, arguments.storage) for words in arguments.models]
    for given in arguments.named or ():
        name, equals, words = given.partition("=")
        if not (name and equals and words):
            raise SpecError(f"--name {given}", "is no NAME=RUN", "as --name chat=assistant@best")
        models.append(read_words(words, arguments.storage, name))
    if arguments.log_bodies and not arguments.log:
        raise SpecError("--log-bodies", "needs --log FILE", "bodies are lines of the request log")
    log, bodies = arguments.log, arguments.log_bodies
    serve_models(
        models,
        host=arguments.host,
        port=arguments.port,
        replicas=_read_replicas(arguments.replicas),
        address=arguments.address,
        verbose=arguments.verbose,
        limits=Limits(),
        storage=arguments.storage,
        say=Display().say,
        tls=read_tls(arguments.tls_cert, arguments.tls_key),
        logged=Logged(file=os.path.abspath(log), bodies=bodies) if log else None,
        feedback=arguments.feedback,
        redactor=make_redactor(redact, "--redact"),
    )
    return 0


def _read_replicas(words: str) -> tuple[int, int]:
    """`2`, or `1-4`. Raises SpecError."""
    least, sign, most = words.partition("-")
    if not re.fullmatch(r"[0-9]{1,6}(-[0-9]{1,6})?", words):
        raise SpecError(f"--replicas {words}", "is no number of replicas", "2, or 1-4")
    return int(least), int(most if sign else least)


def key_create_command(arguments: argparse.Namespace) -> int:
    """The token is the one line of the result; it is shown this once."""
    from dray.serve.held_keys import create_key
    from dray.show.progress import Display

    token = create_key(
        arguments.storage,
        arguments.name,
        scopes=[word for word in arguments.scopes.split(",") if word],
        rate=arguments.rate,
        days=arguments.expires,
    )
    arguments.out.say(token)
    Display().say("this key is shown once: keep it where secrets are kept")
    return 0


def key_list_command(arguments: argparse.Namespace) -> int:
    from dray.serve.held_keys import list_keys

    for held, state in list_keys(arguments.storage):
        end = "never" if held.expires is None else _day(held.expires)
        rate = held.rate or "no limit"
        scopes = ",".join(held.scopes)
        arguments.out.say(f"{held.name}\t{state}\t{scopes}\t{rate}\tends {end}")
    return 0


def key_revoke_command(arguments: argparse.Namespace) -> int:
    from dray.serve.held_keys import revoke_key

    ended = revoke_key(arguments.storage, arguments.name)
    arguments.out.say(f"key {arguments.name} {'has ended' if ended else 'had ended before'}")
    return 0


def promote_command(arguments: argparse.Namespace) -> int:
    from dray.serve.following import state_told
    from dray.serve.promoting import promote
    from dray.serve.served import read_words
    from dray.serve.versions import Record
    from dray.show.progress import Display

    named = read_words(arguments.run, arguments.storage)
    record = Record(arguments.storage, arguments.name)
    state = promote(record, named, arguments.share, arguments.shadow)
    arguments.out.say(f"{arguments.name}: {state_told(state)}")
    Display().say(FOLLOWING)
    if len(record.history()) == 1:
        Display().say(
            f"{arguments.name} is a new name: `dray serve --name {arguments.name}=RUN` serves it"
        )
    return 0


def rollback_command(arguments: argparse.Namespace) -> int:
    from dray.serve.following import state_told
    from dray.serve.versions import Record
    from dray.show.progress import Display

    state = Record(arguments.storage, arguments.name).rollback()
    arguments.out.say(f"{arguments.name}: {state_told(state)}")
    Display().say(FOLLOWING)
    return 0


def versions_command(arguments: argparse.Namespace) -> int:
    from dray.serve.versions import Record, told

    record = Record(arguments.storage, arguments.name)
    state, history = record.read(), record.history()
    if not state.stable:
        raise SpecError(f"model {arguments.name!r}", "has no versions", "`dray serve` begins it")
    if arguments.json:
        document = {
            "name": arguments.name,
            "versions": [
                {"version": number, "role": state.role(number), **served.model_dump()}
                for number, served in state.versions.items()
            ],
            "history": [change.model_dump() for change in history],
        }
        arguments.out.say_json(document)
        return 0
    for number, served in state.versions.items():
        digest = (served.digest or "")[:12]
        arguments.out.say(f"{number}\t{state.role(number)}\t{told(served)}\t{digest}")
    for change in history:
        share = "" if change.share is None else f" for {change.share:.3g}"
        what = f"{change.deed} version {change.version}{share}"
        arguments.out.say(f"{_day(change.at)}\t{change.by}\t{what}")
    return 0


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
