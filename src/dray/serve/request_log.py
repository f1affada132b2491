"""The log of requests: a line of JSON for each, in files of bounded size.

A line has no word of what was asked or answered unless `bodies` are asked for. Whoever answers
never waits for the disk: lines go through a bounded queue to a thread of their own, which takes
personal data out of bodies where that is wanted. What finds it full, or the disk, is lost and
counted. Files are for their owner alone.
"""

from __future__ import annotations

import logging
import os
import queue
from contextlib import suppress
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from dray.corpus.redacting import Redactor
from dray.errors import StoreError
from dray.processes.streams import make_json
from dray.serve.redacting import redact_bodies

FILE_BYTES, NUM_FILES = 50_000_000, 5
"""Of each file, and how many there are: FILE, and FILE.1 (newer) to FILE.4 (older)."""
WAITING_LINES, WAITING_BODIES = 10_000, 200
"""Lines that wait for the disk at most; of lines with bodies fewer, since they are long."""
BODY_BYTES = 100_000
"""Of a body that is kept, at most."""


class Logged(BaseModel):
    """What is logged of requests, and where."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Annotated[str, Field(min_length=1)]
    bodies: bool = False
    """Whether what is asked and answered is kept, too."""


def check_log(logged: Logged) -> None:
    """Raise StoreError where the file cannot be written, before anything is started."""
    try:
        os.close(os.open(logged.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
    except OSError as error:
        rule = "the log's folder is there, and may be written to"
        raise StoreError(logged.file, error.strerror or str(error), rule) from error


class RequestLog:
    """A log that is open until it is closed."""

    def __init__(
        self,
        logged: Logged,
        redactor: Redactor | None = None,
        *,
        file_bytes: int = FILE_BYTES,
        waiting: int | None = None,
    ) -> None:
        self.bodies = logged.bodies
        size = waiting or (WAITING_BODIES if logged.bodies else WAITING_LINES)
        lines: queue.Queue[Any] = queue.Queue(size)
        self._in = _Lines(lines)
        self._out = _Files(logged.file, maxBytes=file_bytes, backupCount=NUM_FILES - 1)
        self._out.setFormatter(_Form(redactor))
        self._listener = QueueListener(lines, self._out)
        self._listener.start()

    @property
    def num_lost(self) -> int:
        """Lines that are not in the files."""
        return self._in.num_lost + self._out.num_lost

    def write(self, told: dict[str, Any]) -> None:
        """One line, with the time before it. Returns at once, and raises nothing."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"at": at, **told}
        self._in.emit(logging.LogRecord("requests", logging.INFO, "", 0, line, None, None))

    def close(self) -> None:
        """Write what waits, and end."""
        self._in.wait_for_room()
        self._listener.stop()
        with suppress(OSError):  # what a full disk did not take is counted already
            self._out.close()


class _Form(logging.Formatter):
    """How a line is written: without personal data, where there is a redactor."""

    def __init__(self, redactor: Redactor | None) -> None:
        super().__init__()
        self._redactor = redactor

    def format(self, record: logging.LogRecord) -> str:
        line: Any = record.msg
        if self._redactor is not None:
            line = redact_bodies(line, self._redactor)
        return make_json(line, ascii_only=True)


class _Lines(QueueHandler):
    """Where lines wait."""

    num_lost = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.num_lost += 1

    def wait_for_room(self) -> None:
        """The word that ends the listener must not be lost."""
        assert isinstance(self.queue, queue.Queue)
        self.queue.join()


class _Files(RotatingFileHandler):
    """Where they are written."""

    num_lost = 0

    def __init__(self, file: str, **options: Any) -> None:
        super().__init__(Path(file).absolute(), encoding="ascii", **options)

    def _open(self) -> TextIOWrapper:
        def private(path: str, flags: int) -> int:
            descriptor = os.open(path, flags, 0o600)
            with suppress(OSError):  # one that was there, and is somebody else's
                os.fchmod(descriptor, 0o600)
            return descriptor

        return open(self.baseFilename, "a", encoding="ascii", opener=private)

    def handleError(self, record: logging.LogRecord) -> None:
        """A disk that is full, or a file that is gone."""
        self.num_lost += 1
