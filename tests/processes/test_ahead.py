"""Work made ahead in a thread: the same pieces in the same order, so many and no more, and errors
where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from dray.processes.ahead import run_ahead


def wait_until_ended() -> None:
    deadline = time.monotonic() + 10
    while (left := [t for t in threading.enumerate() if t.name == "feeder"]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.01)
    assert left == []


def test_few_pieces_are_made_ahead_and_all_arrive_in_order() -> None:
    made: list[int] = []

    def pieces() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    ahead = run_ahead(pieces(), 2, name="feeder")
    time.sleep(0.2)
    assert made == [0, 1, 2]  # it starts before anything is asked for
    assert next(ahead) == 0
    time.sleep(0.2)
    assert made == [0, 1, 2, 3]  # one is in use, two are ready, and one waits for a place
    assert list(ahead) == list(range(1, 20))
    wait_until_ended()


def test_an_error_comes_after_what_was_made_before_it_with_its_own_place() -> None:
    def pieces() -> Iterator[int]:
        yield 1
        raise OSError("a shard is gone")

    ahead = run_ahead(pieces(), 2, name="feeder")
    assert next(ahead) == 1
    with pytest.raises(OSError, match="a shard is gone") as raised:
        next(ahead)
    assert raised.traceback[-1].name == "pieces"
    wait_until_ended()


def test_closing_ends_the_thread_though_nothing_is_asked_for_any_more() -> None:
    ahead = run_ahead(iter(range(10**9)), 2, name="feeder")
    next(ahead)
    ahead.close()
    wait_until_ended()
