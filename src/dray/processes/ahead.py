"""Work that a thread does ahead of the one who wants it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from typing import Generic, TypeVar

from dray.errors import caught

CLOSED_SECONDS = 0.2
"""How soon a thread that has made enough sees that nobody asks any more."""

T = TypeVar("T")


class _End:
    """The end of the pieces, or the error in its place."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class _Piece(Generic[T]):
    def __init__(self, value: T) -> None:
        self.value = value


def run_ahead(pieces: Iterable[T], depth: int, *, name: str) -> Generator[T]:
    """The same pieces, of which up to `depth` are made before they are asked for, in a thread of
    that name, which starts at once.

    An error in the thread is raised here, in its place. The thread ends with the pieces, or when
    this is closed.
    """
    ready: queue.Queue[_Piece[T] | _End] = queue.Queue(depth)
    closed = threading.Event()

    def put(found: _Piece[T] | _End) -> None:
        while not closed.is_set():
            with suppress(queue.Full):
                ready.put(found, timeout=CLOSED_SECONDS)
                return

    def fill() -> None:
        for piece in pieces:
            put(_Piece(piece))
            if closed.is_set():
                return

    threading.Thread(
        target=lambda: put(_End(caught(fill, BaseException)[1])), name=name, daemon=True
    ).start()
    return _take(ready.get, closed)


def _take(get: Callable[[], _Piece[T] | _End], closed: threading.Event) -> Generator[T]:
    try:
        while isinstance(found := get(), _Piece):
            yield found.value
        if found.error is not None:
            raise found.error
    finally:
        closed.set()
