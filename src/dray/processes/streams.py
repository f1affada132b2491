"""Standard output for results and nothing else; standard error for all other words; neither can end
a command badly.

Streams that are closed are as good as /dev/null, a reader that goes away ends a command quietly,
and what a stream's encoding cannot say is said with other signs. Only a result that is lost (a full
disk) is an error.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO, cast

from dray.errors import StoreError, visible
from dray.redaction import redact

_SIGNS = {
    "→": "->",
    "←": "<-",
    "×": "x",
    "…": "...",
    "─": "-",
    "│": "|",
    "·": "*",
    "≥": ">=",
    "≤": "<=",
    "≈": "~",
    "−": "-",
    "–": "-",
    "✓": "ok",
    "✗": "x",
}


class ReaderLeft(Exception):
    """Whoever read standard output went away: nothing more is to be said."""


def _with_other_signs(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(
        _SIGNS.get(sign, "?") for sign in error.object[error.start : error.end]
    ), error.end


codecs.register_error("other_signs", _with_other_signs)


def open_streams() -> None:
    """Give this process the standard streams that it was started without, or the files that it
    opens would become them; and let no sign be an error."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="other_signs")


def make_json(document: Any, *, indent: int | None = None, ascii_only: bool = False) -> str:
    """A document as JSON that every program reads: a number that is not finite is null, for which
    Python would write words that JSON has not."""
    return json.dumps(
        _with_nulls(document), indent=indent, ensure_ascii=ascii_only, default=str, allow_nan=False
    )


def _with_nulls(document: Any) -> Any:
    if isinstance(document, Mapping):
        return {key: _with_nulls(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [_with_nulls(value) for value in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document


class Results:
    """The stream for a command's result. Its methods raise ReaderLeft, and StoreError where nothing
    can be written."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def say(self, text: str) -> None:
        """Print a part of the result, without signs that steer a terminal."""
        with self._told():
            self.stream.write(visible(text) + "\n")
            self.stream.flush()

    def say_json(self, document: Any) -> None:
        """Print the result as one JSON document, in ASCII where the stream takes nothing else."""
        self._say_json(document, indent=2)

    def say_record(self, record: Any) -> None:
        """Print one of many results as a line of JSON."""
        self._say_json(record, indent=None)

    def _say_json(self, document: Any, indent: int | None) -> None:
        text = make_json(document, indent=indent)
        try:
            text.encode(self.stream.encoding or "utf-8")
        except UnicodeEncodeError:
            text = make_json(document, indent=indent, ascii_only=True)
        self.say(text)

    def finish(self) -> None:
        """Write out what others (the parser's help) have printed."""
        with self._told():
            self.stream.flush()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError as error:
            self._drop()
            raise ReaderLeft from error
        except OSError as error:
            self._drop()
            raise StoreError(
                "standard output",
                f"cannot be written ({error.strerror})",
                "the result goes there",
                "free its disk, or send it elsewhere",
            ) from error

    def _drop(self) -> None:
        """Let what is left in the stream's buffer go nowhere, or Python would try again at its
        end."""
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)


@contextmanager
def results_apart() -> Iterator[Results]:
    """Where results go. Whatever else is printed meanwhile, by libraries in C too, goes to standard
    error."""
    stdout = cast(TextIO, sys.stdout)
    if (
        stdout is not sys.__stdout__ or stdout.fileno() != 1
    ):  # someone listens in already, as a test does
        with redirect_stdout(sys.stderr):
            yield Results(stdout)
        return
    stdout.flush()
    descriptor = os.dup(1)
    os.dup2(2, 1)
    try:
        with (
            open(
                descriptor, "w", encoding=stdout.encoding, errors="other_signs", closefd=False
            ) as stream,
            redirect_stdout(sys.stderr),
        ):
            yield Results(stream)
    finally:
        os.dup2(descriptor, 1)
        os.close(descriptor)


def warn(text: str, prefix: str = "dray: ") -> None:
    """Say something on standard error, freed of secrets and of signs that steer a terminal. Where
    nobody can hear it, it is not said."""
    with suppress(OSError, ValueError):
        print(f"{prefix}{visible(redact(text))}", file=sys.stderr, flush=True)


class Forgiving:
    """A stream whose writes never fail: a terminal may be closed, and a disk with a log on it be
    full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def write_records(records: Iterator[dict[str, Any]], path: str, what: str = "predictions") -> None:
    """Write records as lines of JSON into a new file; it is there once it is whole. `what` they
    are. Raises StoreError if the file exists or cannot be written."""
    if os.path.lexists(path):
        raise StoreError(path, "is there already", f"{what} go to a new file", "name another")
    partial = f"{path}.partial"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            for record in records:
                file.write(make_json(record) + "\n")
        os.rename(partial, path)
    except OSError as error:
        raise StoreError(path, f"cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            os.remove(partial)
