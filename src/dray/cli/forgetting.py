"""Where a document went, and a run made again without it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from dray.errors import SpecError, StoreError, one_line


def forget_command(arguments: argparse.Namespace) -> int:
    from dray.release.forgetting import find_document, find_text, require_clean
    from dray.runs import Run
    from dray.show.trail import format_trail

    if arguments.run_name is not None and arguments.again is None:
        raise SpecError("--run", "goes with --again RUN", "it names the run that is made again")
    if arguments.digest is not None:
        if not re.fullmatch("[0-9a-f]{32}", arguments.digest):
            rule = "32 hexadecimal digits, as `dray forget` prints them"
            raise SpecError(f"--digest {arguments.digest[:100]}", "is no digest", rule)
        text = find_text(arguments.storage, arguments.digest)
    else:
        text = _read(arguments.text)
    trail = find_document(arguments.storage, text)
    told = trail.to_json()
    if arguments.again is not None:
        require_clean(trail, Run.open(arguments.storage, arguments.again))
        told["again"] = _again(arguments, text, trail.digest)
    if arguments.json:
        arguments.out.say_json(told)
    else:
        arguments.out.say(format_trail(told))
    return 0


def _read(path: str) -> str:
    rule, way_out = "a document is the text of a file", "save it as UTF-8, and nothing else in it"
    try:
        return Path(path).read_text(encoding="utf-8-sig").removesuffix("\n")
    except IsADirectoryError as error:
        raise StoreError(path, "is a folder", rule, "name the file") from error
    except FileNotFoundError as error:
        raise StoreError(path, "is not there", rule, "check the path") from error
    except UnicodeDecodeError as error:
        raise StoreError(path, "is not UTF-8", rule, way_out) from error
    except OSError as error:
        raise StoreError(path, f"cannot be read ({one_line(error)})", rule) from error


def _again(arguments: argparse.Namespace, text: str, digest: str) -> dict[str, object]:
    """Train a run's spec without the document, and prove that it is not there."""
    from dray.ledger import verify_ledger
    from dray.pipeline.continuing import next_name
    from dray.release.forgetting import find_document
    from dray.runs import Run
    from dray.spec import make_spec
    from dray.train.driver import train

    old = Run.open(arguments.storage, arguments.again)
    name = arguments.run_name or next_name(arguments.storage, old.name)
    begun = Run.find(arguments.storage, name)
    if begun is not None and digest not in begun.spec().data.cleaning.forget:
        rule = "a run made again without the document is a new one"
        raise SpecError(f"--run {name}", "is a run that may have it", rule, "give another name")
    tree = old.spec().model_dump(mode="json")
    forgotten = dict.fromkeys([*tree["data"]["cleaning"].get("forget", ()), digest])
    tree["data"]["cleaning"]["forget"] = [*forgotten]
    spec = make_spec(tree | {"name": name}, "dray forget", kept=True)
    train(
        spec,
        storage=arguments.storage,
        run_name=name,
        address=arguments.address,
        verbose=arguments.verbose,
    )
    after = find_document(arguments.storage, text)
    report = verify_ledger(Run.open(arguments.storage, name))
    own = next((one for one in after.runs if one.run == name), None)
    return {
        "run": name,
        "rows": [] if own is None else own.rows,
        "ledger_ok": report.ok,
        "ledger_digest": report.digest,
        "problems": report.problems,
    }
