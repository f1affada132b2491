"""Which checkpoint a run goes on from, and whether what it had committed is still there.

A run that has committed a step never begins again by itself: a node that reads wrongly, or a
storage that lost files, must not undo weeks of training without anyone being asked.
"""

from __future__ import annotations

from dray.errors import CheckpointsLost
from dray.runs.checkpoint_manifest import CheckpointInfo
from dray.runs.layout import REJECTED_FILE
from dray.runs.run import Run


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
