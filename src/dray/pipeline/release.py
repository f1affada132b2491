"""`dray release`: prepare, train, evaluate against a gate, compress, export, promote and serve, as
far as a spec has sections for it.

What cannot be is refused before anything is written. Where a gate does not hold nothing after it is
done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from dray.cluster.connection import connect
from dray.cluster.needs import make_worker_needs
from dray.errors import SpecError
from dray.pipeline.stages import Done, Release, Told
from dray.spec import Spec
from dray.train.start import look

Say = Callable[[str], None]
AFTER_RAY = ("promote", "serve")
"""Stages that need no Ray that training has used."""


@dataclass
class Released:
    """How a call of `release` ended."""

    run: str
    step: int | None = None
    """The checkpoint that was released; None: it was not come to that."""
    stages: list[Done] = field(default_factory=list)
    missed: str = ""
    """The gate that does not hold; empty: all do."""


def release(
    spec: Spec,
    *,
    storage: str = "./runs",
    run_name: str | None = None,
    until: str | None = None,
    address: str | None = None,
    verbose: bool = False,
    say: Say = lambda line: None,
    report: Callable[[Released], None] = lambda released: None,
) -> Released:
    """Do the stages that the spec has (`Spec.stages`), up to `until`, each unless what it would
    make is there. The last one, `serve`, ends when the process is told to stop; `report` is called
    before that, or at the end.

    Raises UserError for what cannot be, before anything is written, and RunFailed where training or
    the service ends of itself. A gate that does not hold is told in what is returned.
    """
    wanted = _choose(spec, until)
    start = look(spec, storage, run_name)
    releasing = Release(spec, storage, start.name, address=address, verbose=verbose, say=say)
    releasing.check(wanted)
    released, reported = Released(start.name), False
    with ExitStack() as stack:
        resources = spec.resources
        stack.enter_context(
            connect(
                address,
                num_cpus=resources.max_workers * resources.cpus_per_worker + resources.reader_cpus,
                worker=make_worker_needs(resources),
                num_workers=resources.max_workers,
                verbose=verbose,
            )
        )
        for stage in wanted:
            if stage in AFTER_RAY:
                stack.close()
            if stage == "serve" and not releasing.is_served:
                report(released)
                reported = True
            began = time.monotonic()
            say(f"── {stage}")
            told: Told = getattr(releasing, stage)()
            say(f"{'there already: ' if told.was_there else ''}{told.what}")
            released.stages.append(
                Done(stage, told.was_there, told.what, time.monotonic() - began, told.artifact)
            )
            released.step = releasing.step
            if told.missed:
                released.missed = told.missed
                break
    if not reported:
        report(released)
    return released


def _choose(spec: Spec, until: str | None) -> Sequence[str]:
    """The stages up to one. Raises SpecError for one that the spec does not have."""
    stages = spec.stages
    if until is None:
        return stages
    if until not in stages:
        raise SpecError(
            f"--until {until}",
            "is no stage of this spec",
            f"it has {', '.join(stages)}; a section of its own gives it another one",
        )
    return stages[: stages.index(until) + 1]
