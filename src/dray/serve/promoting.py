"""A version begins to answer for a name: whole, pinned, and of the kind that the name is asked for.

Refuses a model of another task: who asks a classifier for classes would get an error from then on.
Models that write text are of one kind whatever they learnt by, so that a chat follows a plain
language model, and one of preferences a chat.
"""

from __future__ import annotations

import os
from contextlib import suppress

from dray.errors import SpecError, StoreError, UserError
from dray.release.exported import open_exported
from dray.release.trained import open_trained
from dray.serve.pinning import check_sound, pin
from dray.serve.served import Served
from dray.serve.versions import Record, State, told
from dray.tasks import Task

WRITES = "a model that writes text"


def promote(
    record: Record, named: Served, share: float | None = None, shadow: bool = False
) -> State:
    """Let it answer for a name: all requests, a share of them, or copies of them. Raises StoreError
    for what is not there or damaged, SpecError for what cannot answer there."""
    check_sound(named)
    served = pin(named)
    check_kind(record, _kind_of(served), told(served))
    return record.promote(served, share, shadow)


def kind_of_task(task: Task) -> str:
    """What a model of that task is to those who ask it, in words."""
    return WRITES if task.generates and task.continues else f"a model of {task.name}"


def check_kind(record: Record, kind: str, what: str) -> None:
    """Raise SpecError where the version that answers for a name is a model of another kind. One
    that is gone, so that nobody can tell, is not compared."""
    state = record.read()
    if not state.stable:
        return
    answering, known = state.versions[state.stable], None
    with suppress(UserError):
        known = _kind_of(answering)
    if known is not None and known != kind:
        raise SpecError(
            f"model {record.name!r}",
            f"{told(answering)} is {known}, and {what} is {kind}",
            "a name goes on answering what it is asked",
            "serve it by another name: `dray serve --name NAME=RUN`",
        )


def _kind_of(served: Served) -> str:
    """Of a run's spec, or what an exported folder says. Raises UserError where neither is there."""
    if served.folder is None:
        opened = open_trained(str(served.storage), str(served.run), served.step, served.weights)
        return kind_of_task(opened.spec.task)
    exported = open_exported(served.folder)
    if exported is None and not os.path.isfile(os.path.join(served.folder, "config.json")):
        raise StoreError(served.folder, "holds no model")
    return WRITES if exported is None else kind_of_task(exported.spec.task)
