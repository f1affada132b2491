"""The run folder on any filesystem: layout, commit with checksums, retention, metrics rows, events,
trackers.

Every other part reaches storage through these names; nothing outside knows how a run folder looks
inside.
"""

from __future__ import annotations

from dray.runs.beginning import (
    check_identity,
    check_storage,
    create_run,
    find_begun,
    find_origin,
    fork_run,
    keep_checkpoint,
    moved_paths,
    open_or_create,
)
from dray.runs.checkpoint_choice import (
    choose_checkpoint,
    find_checkpoint,
    find_resume_checkpoint,
)
from dray.runs.checkpoint_manifest import CheckpointInfo, RankFile
from dray.runs.checkpoint_reader import (
    CheckpointReader,
    CheckpointReport,
    inspect_checkpoint,
    verify_checkpoint,
)
from dray.runs.commit import CheckpointWriter
from dray.runs.drivers import Driver
from dray.runs.layout import Fragment, make_fragment_key, parse_fragment_key
from dray.runs.retention import apply_retention
from dray.runs.row_log import make_limits
from dray.runs.run import Run, list_names, list_runs, verify_all
from dray.runs.trackers import Tracker, Trackers, build_trackers, check_trackers
from dray.storage.filesystem import open_filesystem

__all__ = [
    "CheckpointInfo",
    "CheckpointReader",
    "CheckpointReport",
    "CheckpointWriter",
    "Driver",
    "Fragment",
    "RankFile",
    "Run",
    "Tracker",
    "Trackers",
    "apply_retention",
    "build_trackers",
    "check_identity",
    "check_storage",
    "check_trackers",
    "choose_checkpoint",
    "create_run",
    "find_begun",
    "find_checkpoint",
    "find_origin",
    "find_resume_checkpoint",
    "fork_run",
    "inspect_checkpoint",
    "keep_checkpoint",
    "list_names",
    "list_runs",
    "make_fragment_key",
    "make_limits",
    "moved_paths",
    "open_filesystem",
    "open_or_create",
    "parse_fragment_key",
    "verify_all",
    "verify_checkpoint",
]
