"""How a submitted command begins on the cluster: `python -m dray.cli.arrival VERSIONS -- WORDS`.

The versions of both sides are compared before anything else. A job has one log, so the lines of
the command's result are marked there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import TextIO, cast

from dray.cli import main
from dray.errors import UserError
from dray.jobs.arrival import ARRIVAL, RESULT, compare, versions_here


class _Marked:
    """A stream that marks each line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._begun = stream, False
        self.encoding = stream.encoding

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            self._stream.write(line if self._begun else f"{RESULT} {line}")
            self._begun = not line.endswith("\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()


def arrive(words: Sequence[str]) -> int:
    """Compare the versions, and run the command in this process."""
    different = compare(json.loads(words[0]), versions_here())
    print(f"{ARRIVAL} {different or 'equal'}", flush=True)
    if different:
        return UserError.exit_code
    with redirect_stdout(cast(TextIO, _Marked(sys.stdout))):
        return main(list(words[2:]))


if __name__ == "__main__":
    raise SystemExit(arrive(sys.argv[1:]))
