"""What a task is: the one thing the training loop knows about what is being learnt.

A task turns rows into a batch, puts a summed loss around a model, and turns outputs into metrics
that add up over ranks. It owns no optimiser or process group, and never divides by a count: the
loop divides by the targets of the global batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor, nn

IGNORED = -100
"""The label of a position without a target."""

Batch = dict[str, "Tensor"]
Output = dict[str, "Tensor"]
Terms = dict[str, tuple["Tensor", "Tensor"]]
"""Named parts of a loss: the sum over a batch's targets, and their number."""


class TokenIds(Protocol):
    """What a task needs to know of a corpus; its manifest has it."""

    @property
    def pad_token_id(self) -> int | None: ...

    @property
    def labels(self) -> Sequence[str]: ...


class TaskMetrics(Protocol):
    """Sums over the batches of one validation, which add up over ranks in any order."""

    def update(self, batch: Batch, output: Output) -> None:
        """Add one batch."""

    def state(self) -> dict[str, Any]:
        """The sums as plain values that can be sent anywhere."""

    def merge(self, states: Iterable[dict[str, Any]]) -> TaskMetrics:
        """Add the sums of others, and return self."""

    def compute(self) -> dict[str, float]:
        """The metrics by name. `loss` is always among them."""

    def undefined(self) -> tuple[str, ...]:
        """Names of those whose value stands for nothing on the rows seen."""


class Task(Protocol):
    """One file a task."""

    name: str

    def collate(self, table: pa.Table) -> Batch:
        """Rows of a token shard with their `row_id` as tensors on the CPU. Rows with row_id < 0 get
        no targets."""

    def num_targets(self, batch: Batch) -> int:
        """Number of terms in the batch's loss."""

    def objective(self, model: Any, label_smoothing: float = 0.0) -> nn.Module:
        """The model with its loss inside, as `model`: what is wrapped, compiled and called.

        `forward(batch)` gives the terms of the loss, each summed over the batch's targets (fp32)
        beside their number, and what the metrics need where no gradient is wanted. Labels are
        smoothed in training alone.
        """

    def new_metrics(self) -> TaskMetrics:
        """Empty sums."""
