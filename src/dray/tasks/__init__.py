"""Tasks: what is learnt. One file a task; `task.py` says what each must offer, `rows.py` what its
rows are, and an entry point of the group `dray.tasks` (pyproject.toml) names it. `rewards.py` finds
the programs that judge answers. What tasks share is in `parts/`.
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
