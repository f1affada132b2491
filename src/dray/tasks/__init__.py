"""Tasks: what is learnt. One file a task; `task.py` says what each must offer, and an entry point
of the group `dray.tasks` (pyproject.toml) names it.

Tasks share losses around models (`objectives.py`, on `losses.py` and `heads.py`), metrics
(`metrics.py`) and the way from columns to tensors (`columns.py`).
"""

from dray.tasks.rows import IGNORED
from dray.tasks.task import (
    Batch,
    Corpus,
    Decode,
    Held,
    Output,
    Task,
    TaskMetrics,
    Terms,
    draw_of,
)

__all__ = [
    "IGNORED",
    "Batch",
    "Corpus",
    "Decode",
    "Held",
    "Output",
    "Task",
    "TaskMetrics",
    "Terms",
    "draw_of",
]
