"""Runs one stage of the preparation through Ray Data: a task for every piece of work that has no
record yet.

Only the descriptions of work and their records travel through Ray; text and tokens go from storage
to storage, so Ray's object store stays empty. Refuses nothing: an expected error comes back as it
is.
"""

from __future__ import annotations

import logging
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from typing import Any

from dray.corpus.parts import Preparation, load_record, record_name, staged
from dray.errors import StorageNotShared, UserError, one_line
from dray.storage.filesystem import list_files, shown
from dray.storage.retrying import retry

Progress = Callable[[str], None]
PROGRESS_SECONDS = 2.0
TASKS_AT_ONCE = 1024
"""Descriptions of work that Ray holds at a time."""


def _answer(
    function: Callable[[Preparation, Any], Any], job: Preparation, index: int, item: Any
) -> tuple[int, bytes]:
    """A task's result or its UserError, pickled: an expected error crosses Ray without its
    wrapping.

    The pieces of work write whole files and their record last, so one that meets a failing storage
    starts over.
    """
    try:
        return index, pickle.dumps(retry(lambda: function(job, item), shown(job.folder)))
    except UserError as error:
        return index, pickle.dumps(error)
    except FileNotFoundError as error:
        # The nodes were looked at before; this one may have joined since.
        return index, pickle.dumps(
            StorageNotShared(
                shown(job.folder),
                f"lacks on {socket.gethostname()} what was there for another task "
                f"({one_line(error)[:300]})",
                "every node that prepares rows sees the same storage and raw files",
                "name a shared file system or a bucket, or mount it there, too",
            )
        )


def _unwrap(answer: bytes) -> Any:
    result = pickle.loads(answer)
    if isinstance(result, UserError):
        raise result
    return result


def run_task(job: Preparation, function: Callable[[Preparation, Any], Any], item: Any) -> Any:
    """`function(job, item)` in one Ray task, while Ray Data and a worker are brought up for the
    next stage."""
    import ray

    answer = ray.remote(**job.task_options)(_answer).remote(function, job, 0, item)
    for _ in _run_tasks(job, "imports", _warm_up, [(0, None)]):
        pass
    return _unwrap(ray.get(answer)[1])


def _warm_up(job: Preparation, item: None) -> dict[str, Any]:
    """Imports what encoding needs."""
    with suppress(ImportError):
        import gigatoken  # noqa: F401
    return {}


def run_stage(
    job: Preparation,
    stage: str,
    function: Callable[[Preparation, Any], dict[str, Any]],
    items: Sequence[Any],
    say: Progress,
) -> list[dict[str, Any]]:
    """The records of `function(job, item)` for all items, in their order: read back, or made by Ray
    Data.

    Items are taken when their turn comes, so a sequence may make them as it is asked.
    """
    if not len(items):
        return []
    filesystem, path = staged(job, stage)
    there = list_files(filesystem, path)
    records = {
        index: load_record(job, stage, index)
        for index in range(len(items))
        if record_name(index) in there
    }
    missing = [index for index in range(len(items)) if records.get(index) is None]
    began = time.monotonic()
    answers = (
        answer
        for start in range(0, len(missing), TASKS_AT_ONCE)
        for answer in _run_tasks(
            job,
            stage,
            function,
            [(index, items[index]) for index in missing[start : start + TASKS_AT_ONCE]],
        )
    )
    with closing(answers):  # what Ray Data still does is ended while there is a Ray
        for done, (index, answer) in enumerate(answers, 1):
            records[index] = _unwrap(answer)
            if done == len(missing) or time.monotonic() - began > PROGRESS_SECONDS:
                began = time.monotonic()
                say(f"{stage}: {len(items) - len(missing) + done} of {len(items)}")
    return [record for _, record in sorted(records.items()) if record is not None]


def _run_tasks(
    job: Preparation,
    stage: str,
    function: Callable[[Preparation, Any], dict[str, Any]],
    tasks: Sequence[tuple[int, Any]],
) -> Iterator[tuple[int, bytes]]:
    if not tasks:
        return
    import ray.data

    def work(row: dict[str, Any]) -> dict[str, Any]:
        index, answer = _answer(function, job, row["index"], pickle.loads(row["item"]))
        return {"index": index, "answer": answer}

    with _quiet:
        rows = [{"index": index, "item": pickle.dumps(item)} for index, item in tasks]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            work, **job.task_options
        )
        dataset.context.enable_progress_bars = False
        dataset.set_name(f"prepare-{stage}")  # on the dashboard
        for row in dataset.iter_rows():
            yield row["index"], row["answer"]


class _Quiet:
    """Warnings of Ray Data still show while a block runs; plans and statistics do not. What is
    silenced belongs to the process: the last of several blocks at once ends it."""

    def __init__(self) -> None:
        self._lock, self._depth, self._level = threading.Lock(), 0, logging.NOTSET

    def __enter__(self) -> None:
        from ray.util.debug import log_once

        logger = logging.getLogger("ray.data")
        with self._lock:
            if not self._depth:
                self._level = logger.level
                logger.setLevel(logging.WARNING)
                log_once("ray_data_progress_manager_disabled")  # says so itself otherwise
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if not self._depth:
                logging.getLogger("ray.data").setLevel(self._level)


_quiet = _Quiet()
