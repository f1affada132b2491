"""What happens after an attempt failed: go on, go on differently, or give up; by cause, never by count alone.

A failure after which more was committed than after the one before is progress, and starts the count anew. What is
nobody's fault (a machine taken away) never uses the budget up; what would only fail again is not tried again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

HOPELESS = frozenset({"numerics", "configuration"})
"""Classes that a restart does not mend."""
FREE = frozenset({"preemption", "node_loss", "checkpoint", "spike"})
"""Classes that are not counted: each has its own bound or is nobody's fault."""
MEMORY = frozenset({"gpu_memory", "host_memory"})


@dataclass(frozen=True)
class Decision:
    """`retry` or not, why, and the micro batch to go on with where it changes."""

    retry: bool
    reason: str
    micro_rows: int | None = None


@dataclass
class Budget:
    """Counts the failures of one driver's attempts."""

    max_failures: int
    failures: int = 0
    committed: int = -1

    def decide(self, kind: str, *, committed_step: int, micro_rows: int, rows_per_rank: int) -> Decision:
        """What to do after a failure of this class, with the newest committed step and the batch it ran with."""
        if committed_step > self.committed:
            self.failures, self.committed = 0, committed_step
        if kind in HOPELESS:
            return Decision(False, f"{kind}: a restart would fail again")
        if kind in MEMORY:
            if micro_rows == 1:
                return Decision(False, "out of memory with one row in a forward pass: nothing is left to halve")
            smaller = max(rows for rows in range(1, micro_rows // 2 + 1) if rows_per_rank % rows == 0)
            return Decision(True, f"out of memory: micro batches of {smaller} rows from now on", smaller)
        if kind in FREE:
            return Decision(True, f"{kind}: not counted as a failure")
        self.failures += 1
        if self.failures > self.max_failures:
            return Decision(False, f"{self.failures} failures without a committed step between them; "
                                   f"resources.max_failures = {self.max_failures}")
        since = max(0, self.committed)
        return Decision(True, f"{kind}: failure {self.failures} of {self.max_failures} since step {since}")


def kind_of_errors(error_types: Iterable[str], default: str) -> str:
    """The class of a failure in which a rank raised one of dray's own errors, which mean one thing each."""
    own = {"CheckpointDamaged": "checkpoint", "LossSpike": "spike", "BadNumbers": "numerics", "SaveFailed": "storage",
           "GroupDissolved": "preemption"}
    names = (error_type.rpartition(".")[2] for error_type in error_types)
    return next((own[name] for name in names if name in own), default)
