"""The command line: parse, call, print, exit code. Nothing here computes.

`parser.py` has all commands and their options; what they call is in `beginning.py` (init, plan,
prepare, train, tune), `using.py` (what is done with a trained model) and `looking.py` (what a
storage has).

`--help` and `plan` import neither torch nor ray; every other command imports what it needs when it
is called. Exit codes: 0 done; 2 the user's mistake; 3 the run failed; 130 interrupted with its
state saved (143 by SIGTERM, 129 by SIGHUP). Whatever goes wrong is one line on standard error.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence

from dray.cli.parser import build_parser, parse
from dray.errors import DrayError, RunFailed, UserError
from dray.processes.signals import Stopped, stops
from dray.processes.streams import ReaderLeft, open_streams, results_apart, warn
from dray.redaction import redact

__all__ = ["build_parser", "main"]


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
