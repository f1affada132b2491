"""Which checkpoints are kept: the newest, the best by a metric, and those that forks started from.

Deletes the marker before the files, so that a half-deleted checkpoint is never taken for one. Never deletes a sound
checkpoint to keep an unsound one.
"""

from __future__ import annotations

import math
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from dray.store.filesystem import delete_folder, exists, list_files
from dray.store.layout import MARKER_FILE, PINS, RUN_FILE
from dray.store.manifest import CheckpointInfo
from dray.store.records import load_json
from dray.store.run import Run

LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte")


def apply_retention(run: Run, keep_last: int, keep_best: int = 0, metric: str = "loss") -> list[str]:
    """Delete what need not be kept; the paths deleted.

    Kept: the newest `keep_last` sound checkpoints, the best `keep_best` by `metric` (lower is better for losses, higher
    for the rest), and every one that an existing fork started from. Besides, unsound ones older than the newest sound
    one go. Call it from the process that commits, between two saves.
    """
    if keep_last < 1 or keep_best < 0:
        raise ValueError(f"keep_last {keep_last}, keep_best {keep_best}: at least the newest checkpoint is kept")
    found = run.checkpoints(verified_only=False)
    sound = [info for info in found if info.verified]
    if not sound:
        return []
    newest = max((info.attempt, info.step) for info in sound)
    kept = {info.path for info in sound[-keep_last:]} | set(_best(run, sound, keep_best, metric)) | _pinned(run)
    doomed = [info for info in found if info.path not in kept
              and (info.verified or (info.attempt, info.step) < newest)]
    for info in doomed:
        with suppress(FileNotFoundError):
            run.filesystem.delete_file(f"{info.path}/{MARKER_FILE}")
        delete_folder(run.filesystem, info.path)
    return [info.path for info in doomed]


def _best(run: Run, sound: list[CheckpointInfo], keep_best: int, metric: str) -> list[str]:
    """Paths of the best checkpoints, by the validation row of their step or else by what they carry themselves."""
    rows = {row["step"]: row for row in run.validations()} if keep_best else {}
    sign = 1 if metric in LOWER_IS_BETTER else -1
    ranked = []
    for info in sound:
        value = rows.get(info.step, info.metrics).get(metric)
        if value is not None and not math.isnan(value):  # a NaN is never among the best
            ranked.append((sign * value, -info.step, info.path))
    return [path for _, _, path in sorted(ranked)[:keep_best]]


def _pinned(run: Run) -> set[str]:
    """Paths of the checkpoints that forks started from. A fork that is not there yet may be just beginning."""
    storage = run.path.removesuffix(run.name)
    fresh = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    pinned = set()
    for name in list_files(run.filesystem, f"{run.path}/{PINS}"):
        pin = load_json(run.filesystem, f"{run.path}/{PINS}/{name}")
        if pin["pinned"] > fresh or exists(run.filesystem, f"{storage}{pin['run']}/{RUN_FILE}"):
            pinned.add(f"{storage}{pin['checkpoint']}")
    return pinned
