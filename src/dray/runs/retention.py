"""Which checkpoints are kept: the newest, the best by a metric, those that forks started from,
those being read.

Says what it will delete and looks at the pins again before it does; deletes the marker before the
files, so that a half-deleted checkpoint is never taken for one. Never deletes a sound checkpoint to
keep an unsound one, nor one that was set aside: whether it is damaged, or the node that said so, is
for a person to find out.
"""

from __future__ import annotations

from dray.runs.checkpoint_manifest import CheckpointInfo
from dray.runs.layout import DELETING_FILE, MARKER_FILE
from dray.runs.pins import pinned_checkpoints
from dray.runs.records import finite
from dray.runs.run import Run
from dray.storage.filesystem import delete_file, delete_folder, write_bytes


def apply_retention(
    run: Run, keep_last: int, keep_best: int = 0, metric: str = "loss", *, sign: int = 1
) -> list[str]:
    """Delete what need not be kept; the paths deleted.

    Kept: the newest `keep_last` sound checkpoints, the best `keep_best` by `sign` times
    `metric` (1: lower is better, -1: higher is), every one that an existing fork started from, and
    every one that is held by a reader (`Run.hold`). Besides, unsound ones older than the newest
    sound one go, but for those that were set aside. Call it from the process that commits, between
    two saves.
    """
    if keep_last < 1 or keep_best < 0:
        raise ValueError(
            f"keep_last {keep_last}, keep_best {keep_best}: at least the newest checkpoint is kept"
        )
    found = run.checkpoints(verified_only=False)
    sound = [info for info in found if info.verified]
    if not sound:
        return []
    newest = max((info.attempt, info.step) for info in sound)
    kept = (
        {info.path for info in sound[-keep_last:]}
        | set(_best(run, sound, keep_best, metric, sign))
        | _pinned(run)
    )
    doomed = [
        info
        for info in found
        if info.path not in kept
        and not info.set_aside
        and (info.verified or (info.attempt, info.step) < newest)
    ]
    return _delete(run, doomed) if doomed else []


def _delete(run: Run, doomed: list[CheckpointInfo]) -> list[str]:
    """Announce, look again, delete. A reader pins first and looks for the announcement afterwards:
    of the two, at least one sees the other."""
    for info in doomed:
        write_bytes(run.filesystem, f"{info.path}/{DELETING_FILE}", b"", durable=False)
    pinned = _pinned(run)
    for info in doomed:
        if info.path in pinned:
            delete_file(run.filesystem, f"{info.path}/{DELETING_FILE}")
        else:
            delete_file(run.filesystem, f"{info.path}/{MARKER_FILE}")
            delete_folder(run.filesystem, info.path)
    return [info.path for info in doomed if info.path not in pinned]


def _best(
    run: Run, sound: list[CheckpointInfo], keep_best: int, metric: str, sign: int
) -> list[str]:
    """Paths of the best checkpoints, by the validation row of their step or else by what they carry
    themselves."""
    oldest = min((info.step for info in sound), default=0)
    rows = {row["step"]: row for row in run.validations(since=oldest)} if keep_best else {}
    ranked = []
    for info in sound:
        value = finite(rows.get(info.step, info.metrics).get(metric))
        if value is not None:
            ranked.append((sign * value, -info.step, info.path))
    return [path for _, _, path in sorted(ranked)[:keep_best]]


def _pinned(run: Run) -> set[str]:
    return pinned_checkpoints(run.filesystem, run.path, run.path.removesuffix(run.name))
