"""What happens after an attempt failed: go on, go on differently, or give up; by cause, never by
count alone.

A failure after which more was committed than after the one before is progress, and starts the count
anew. What is nobody's fault (a machine taken away) never uses the budget up; what would only fail
again is not tried again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dray.errors import Cause

HOPELESS = frozenset({Cause.NUMERICS, Cause.CONFIGURATION})
"""Causes that a restart does not mend."""
FREE = frozenset({Cause.PREEMPTION, Cause.CHECKPOINT, Cause.SPIKE})
"""Causes that are not counted: each has its own bound or is nobody's fault."""
MAX_NODE_LOSSES = 5
"""Nodes lost in a row, without a committed step between them, that are nobody's fault. From then on
it may well be the run that takes them down: a host that runs out of memory often takes its raylet
along, and leaves no other trace."""
MEMORY = frozenset({Cause.GPU_MEMORY, Cause.HOST_MEMORY})


@dataclass(frozen=True)
class Decision:
    """`retry` or not, why, and the micro batch to go on with where it changes."""

    retry: bool
    reason: str
    micro_rows: int | None = None


@dataclass(frozen=True)
class SmallerBatch:
    """A micro batch that was halved when memory ran out, as run.json keeps it.

    Once may be an accident: another program's spike. So the plan's own micro batch is tried again
    once a step has been committed and the group starts anyway. If memory runs out again after that,
    the smaller one stays.
    """

    micro_rows: int
    step: int
    """The step that was committed when memory ran out, the last time."""
    times: int
    """How often it ran out, with committed steps in between."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> SmallerBatch | None:
        """What run.json remembers, if memory ever ran out."""
        if not record.get("micro_rows"):
            return None
        return cls(
            int(record["micro_rows"]),
            int(record.get("micro_rows_step", 0)),
            int(record.get("micro_rows_times", 1)),
        )

    @classmethod
    def after(
        cls, before: SmallerBatch | None, micro_rows: int, committed_step: int
    ) -> SmallerBatch:
        """What is to be remembered now that memory ran out, after what was remembered."""
        again = before is not None and committed_step > before.step
        return cls(micro_rows, committed_step, (before.times if before else 1) + again)

    def to_record(self) -> dict[str, int]:
        return {
            "micro_rows": self.micro_rows,
            "micro_rows_step": self.step,
            "micro_rows_times": self.times,
        }

    def is_needed(self, committed_step: int) -> bool:
        """Whether an attempt that goes on from this step takes the smaller micro batch."""
        return self.times > 1 or committed_step <= self.step


@dataclass
class Budget:
    """Counts the failures of one driver's attempts."""

    max_failures: int
    failures: int = 0
    nodes_lost: int = 0
    committed: int = -1

    def decide(
        self, cause: Cause, *, committed_step: int, micro_rows: int, rows_per_rank: int
    ) -> Decision:
        """What to do after a failure of this cause, with the newest committed step and the batch it
        ran with."""
        if committed_step > self.committed:
            self.failures, self.nodes_lost, self.committed = 0, 0, committed_step
        if cause in HOPELESS:
            return Decision(False, f"{cause}: a restart would fail again")
        if cause in MEMORY:
            if micro_rows == 1:
                return Decision(
                    False, "out of memory with one row in a forward pass: nothing is left to halve"
                )
            smaller = max(
                rows for rows in range(1, micro_rows // 2 + 1) if rows_per_rank % rows == 0
            )
            return Decision(True, f"out of memory: micro batches of {smaller} rows", smaller)
        if cause in FREE:
            return Decision(True, f"{cause}: not counted as a failure")
        if cause is Cause.NODE_LOSS:
            return self._lose_node()
        self.failures += 1
        if self.failures > self.max_failures:
            return Decision(
                False,
                f"{self.failures} failures without a committed step between them; "
                f"resources.max_failures = {self.max_failures}",
            )
        since = max(0, self.committed)
        return Decision(
            True, f"{cause}: failure {self.failures} of {self.max_failures} since step {since}"
        )

    def _lose_node(self) -> Decision:
        self.nodes_lost += 1
        allowed = max(MAX_NODE_LOSSES, self.max_failures)
        if self.nodes_lost > allowed:
            return Decision(
                False,
                f"{self.nodes_lost} nodes were lost without a committed step between them: the "
                "run may take them down itself (look for the kernel's out-of-memory killer on "
                "them), or checkpoints are too far apart (checkpoint.every_minutes)",
            )
        return Decision(
            True,
            f"node_loss: not counted as a failure; loss {self.nodes_lost} of {allowed} since step "
            f"{max(0, self.committed)}",
        )
