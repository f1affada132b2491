"""The run folder on any filesystem: layout, commit with checksums, retention, metrics rows, events, trackers."""

from __future__ import annotations

from dray.store.filesystem import open_filesystem

__all__ = ["open_filesystem"]
