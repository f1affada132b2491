"""The command line: parse, call, print, exit code. Nothing here computes.

`parser.py` has all commands and their options; what they call is in `beginning.py` (init, plan,
prepare, train, tune), `using.py` (what is done with a trained model) and `looking.py` (what a
storage has).

`--help` and `plan` import neither torch nor ray; every other command imports what it needs when it
is called. Exit codes: 0 done; 2 the user's mistake; 3 the run failed; 130 interrupted with its
state saved (143 by SIGTERM, 129 by SIGHUP). Whatever goes wrong is one line on standard error.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout

from dray.cli.parser import build_parser
from dray.errors import DrayError, RunFailed, SpecError, StoreError, UserError
from dray.processes.signals import Stopped, stops
from dray.processes.streams import ReaderLeft, Results, open_streams, results_apart, warn
from dray.redaction import redact

__all__ = ["build_parser", "main", "parse"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Standard output gets the command's result and
    nothing else."""
    open_streams()
    with results_apart() as out, stops():
        try:
            arguments = parse(argv, out)
            return int(arguments.command(arguments))
        except ReaderLeft:
            return 0
        except SystemExit:  # of the parser, which has said all
            raise
        except BaseException as error:
            return _tell(error, argv)


def _tell(error: BaseException, argv: Sequence[str] | None) -> int:
    """Say on standard error, in a line, why a command ends. Returns the exit code."""
    if isinstance(error, RunFailed):
        warn(str(error))
        if error.diagnosis:
            warn(error.diagnosis, prefix="")
        return error.exit_code
    if isinstance(error, DrayError):
        warn(str(error))
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        number = error.number if isinstance(error, Stopped) else int(signal.SIGINT)
        warn(f"interrupted by {signal.Signals(number).name}")
        return 128 + number
    return _tell_unexpected(error, argv)


def _tell_unexpected(error: BaseException, argv: Sequence[str] | None) -> int:
    """An error that nobody foresaw is one line, too; its traceback goes to a file, and to
    --verbose."""
    text = redact("".join(traceback.format_exception(error)))
    what = next(iter(str(error).splitlines()), "")
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        what = f"{where}{error.strerror}"
    elif isinstance(error, MemoryError):
        what = "out of memory"
    else:
        what = f"{type(error).__name__}: {what}".rstrip(": ")
    if "--verbose" in (sys.argv[1:] if argv is None else argv):
        warn(text, prefix="")
    try:
        descriptor, path = tempfile.mkstemp(prefix="dray-error-", suffix=".log")
        with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        warn(f"{what[:300]}; this was not foreseen; the traceback is in {path}")
    except OSError:
        warn(f"{what[:300]}; this was not foreseen; --verbose shows the traceback")
    return UserError.exit_code if isinstance(error, OSError) else RunFailed.exit_code


def parse(argv: Sequence[str] | None, out: Results) -> argparse.Namespace:
    """The arguments of a command, and `out` for its result. Raises SystemExit where the parser has
    said all."""
    parser = build_parser()
    try:
        with redirect_stdout(out.stream):
            arguments, rest = parser.parse_known_args(argv)
    except SystemExit:
        out.finish()
        raise
    # argparse takes positionals only in one run; overrides may stand after options too.
    if rest and (not hasattr(arguments, "overrides") or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    for text in sys.argv[1:] if argv is None else argv:
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text):
            raise SpecError(
                ascii(text)[:200],
                "is not UTF-8",
                "arguments are text that files and records can hold",
                "rename the file, or set LANG=C.UTF-8",
            )
    if getattr(arguments, "storage", None) == "":
        raise StoreError(
            "--storage", "is empty", "runs need a folder or a URI", "leave it out for ./runs"
        )
    try:
        os.getcwd()
    except OSError as error:
        raise StoreError(
            "the working directory",
            f"cannot be used ({error.strerror})",
            "relative paths start there",
            "cd into a folder that exists",
        ) from error
    arguments.out = out
    return arguments
