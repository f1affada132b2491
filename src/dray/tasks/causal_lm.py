"""Causal language modelling on packed rows: every token of a row but its first is predicted from
those before it.

Documents packed into one row see each other, as in GPT-2 and its kin; the end-of-document token
keeps them apart. Padding at the end of a row cannot reach the tokens before it, so no attention
mask is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dray.spec import Direction, Field, Head
from dray.tasks.rows import IGNORED
from dray.tasks.task import Batch, Held, Task, TaskMetrics

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import nn


class CausalLM(Task):
    """Next-token prediction."""

    name = "causal_lm"
    fields: Mapping[str, Field] = {"text": Field("text")}
    metrics: Mapping[str, Direction] = {
        "loss": "lower",
        "perplexity": "lower",
        "accuracy": "higher",
        "bits_per_byte": "lower",
    }
    is_default = packs = generates = True
    head = Head("AutoModelForCausalLM", over="vocabulary", each="token", looks_ahead=False)

    @property
    def row_settings(self) -> dict[str, Any]:
        return {"packs_rows": self.packs}

    def collate(self, table: pa.Table, draw: int = 0) -> Batch:
        """`input_ids` and `labels`, int64 [rows, sequence_tokens]; labels[:, t] is the token at t +
        1, or IGNORED.

        The last position has no label: rows keep their full, even width, and the logits are never
        cut and copied.
        """
        import torch

        from dray.tasks.parts.columns import integer_column, real_rows, token_matrix

        input_ids = token_matrix(table)
        num_rows, width = input_ids.shape
        labels = torch.full_like(input_ids, IGNORED)
        labels[:, :-1] = input_ids[:, 1:]
        num_tokens = integer_column(table, "num_tokens") * real_rows(table)
        labels[torch.arange(1, width + 1).expand(num_rows, -1) >= num_tokens[:, None]] = IGNORED
        return {"input_ids": input_ids, "labels": labels}

    def objective(self, model: Any, label_smoothing: float = 0.0) -> nn.Module:
        from dray.tasks.parts.objectives import NextTokenLoss

        return NextTokenLoss(model, label_smoothing)

    def new_metrics(self) -> TaskMetrics:
        from dray.tasks.parts.metrics import TokenMetrics

        return TokenMetrics()

    def complete(self, values: Mapping[str, float], held: Held) -> dict[str, float]:
        """`bits_per_byte` besides: it needs the text's length."""
        from dray.tasks.parts.metrics import bits_per_byte

        found = bits_per_byte(values["loss"], held.num_tokens, held.num_text_bytes)
        return {**values, "bits_per_byte": found}
