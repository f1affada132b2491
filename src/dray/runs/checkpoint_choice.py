"""Which checkpoint is meant: the one that a run goes on from, that a person names, or that is to be
verified.

A run that has committed a step never begins again by itself: a node that reads wrongly, or a
storage that lost files, must not undo weeks of training without anyone being asked.
"""

from __future__ import annotations

from typing import Literal

from dray.errors import CheckpointsLost, SpecError, StoreError
from dray.runs.checkpoint_manifest import CheckpointInfo
from dray.runs.layout import REJECTED_FILE
from dray.runs.records import finite
from dray.runs.run import Run


def read_step(step: str, words: str) -> int | Literal["best"]:
    """The step behind RUN@ on a command line. Raises SpecError that names all the words."""
    if step == "best":
        return "best"
    if not (step.isascii() and step.isdigit() and len(step) < 12):
        raise SpecError(words, f"@{step} is no step", "it is a number, or best")
    return int(step)


def find_resume_checkpoint(run: Run) -> CheckpointInfo | None:
    """The newest sound checkpoint: a fork's origin's while it has committed none of its own, none
    in a new run.

    Raises CheckpointsLost for a run that committed steps of which nothing sound is left.
    """
    newest = run.latest_checkpoint()
    if newest is not None and newest.path.startswith(f"{run.path}/"):
        return newest
    lost = run.lost_steps()
    if not lost:
        return newest
    told = [f"step {step}: {problem}" for step, problem in sorted(lost.items(), reverse=True)]
    more = f" and {len(told) - 3} more" if len(told) > 3 else ""
    raise CheckpointsLost(
        f"run {run.name!r}",
        f"none of its checkpoints can be used: {'; '.join(told[:3])}{more}",
        "a run that has committed a step does not begin again by itself",
        f"if a node or the storage was at fault, mend it and delete the file {REJECTED_FILE} in a "
        "checkpoint's folder, which is then tried again; to begin again, give another name with "
        "--run",
    )


def choose_checkpoint(run: Run, step: str | int | None) -> CheckpointInfo:
    """The checkpoint a person means. Raises StoreError that lists the steps there are."""
    found = run.checkpoints()
    if step is None:
        newest = run.latest_checkpoint()
        if newest is not None:
            return newest
    elif step == "best":
        spec = run.spec()
        metric, sign = spec.validation.metric, spec.metric_sign
        scored = [
            (sign * value, info)
            for info in found
            if (value := finite(info.metrics.get(metric))) is not None
        ]
        if scored:
            return min(scored, key=lambda item: item[0])[1]
    else:
        for info in found:
            if str(info.step) == str(step):
                return info
    steps = ", ".join(str(info.step) for info in found) or "none"
    raise StoreError(
        f"run {run.name!r}", f"no sound checkpoint {step or ''}".strip(), f"steps with one: {steps}"
    )


def find_checkpoint(run: Run, step: int | None = None) -> CheckpointInfo:
    """The checkpoint of a step, sound or not; by default the newest that was committed. For `dray
    verify`, which says what is wrong with it. Raises StoreError, with the steps there are, if there
    is none."""
    found = run.checkpoints(verified_only=False)
    if step is None:
        chosen = [info for info in found if info.committed] or found
        if not chosen and run.origin() and (newest := run.latest_checkpoint()):
            return newest
    else:
        same = [info for info in found if info.step == step]
        chosen = [info for info in same if info.committed] or same
    if not chosen:
        steps = ", ".join(str(info.step) for info in found) or "none"
        raise StoreError(
            f"run {run.name!r}",
            "has no checkpoint" + (f" of step {step}" if step is not None else ""),
            way_out=f"steps with one: {steps}",
        )
    return chosen[-1]
