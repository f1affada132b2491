"""What a task is: the one thing the training loop knows about what is being learnt.

A task turns rows into a batch, a batch into a summed loss, and outputs into metrics that add up over ranks. It owns no
model, optimiser or process group, and never divides by a count: the loop divides by the targets of the global batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

IGNORED = -100
"""The label of a position without a target."""

Batch = dict[str, "Tensor"]
Output = dict[str, "Tensor"]


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
        """Rows of a token shard with their `row_id` as tensors on the CPU. Rows with row_id < 0 get no targets."""

    def num_targets(self, batch: Batch) -> int:
        """Number of terms in the batch's loss."""

    def loss_sum(self, model: Any, batch: Batch, label_smoothing: float) -> tuple[Tensor, Output]:
        """The loss summed over the batch's targets (fp32), and what the metrics need where no gradient is wanted.

        `model` is called with keyword arguments and returns an object with `logits`.
        """

    def new_metrics(self) -> TaskMetrics:
        """Empty sums."""
