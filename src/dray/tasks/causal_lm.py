"""Causal language modelling on packed rows: every token of a row but its first is predicted from those before it.

Documents packed into one row see each other, as in GPT-2 and its kin; the end-of-document token keeps them apart.
Padding at the end of a row cannot reach the tokens before it, so no attention mask is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dray.tasks.columns import integer_column, real_rows, token_matrix
from dray.tasks.losses import summed_cross_entropy
from dray.tasks.task import IGNORED, Batch, Output, TaskMetrics

if TYPE_CHECKING:
    import pyarrow as pa


class CausalLM:
    """Next-token prediction."""

    name = "causal_lm"

    def collate(self, table: pa.Table) -> Batch:
        """`input_ids` and `labels`, int64 [rows, sequence_tokens]; labels[:, t] is the token at t + 1, or IGNORED.

        The last position has no label: rows keep their full, even width, and the logits are never cut and copied.
        """
        input_ids = token_matrix(table)
        num_rows, width = input_ids.shape
        labels = torch.full_like(input_ids, IGNORED)
        labels[:, :-1] = input_ids[:, 1:]
        num_tokens = integer_column(table, "num_tokens") * real_rows(table)
        labels[torch.arange(1, width + 1).expand(num_rows, -1) >= num_tokens[:, None]] = IGNORED
        return {"input_ids": input_ids, "labels": labels}

    def num_targets(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def loss_sum(self, model: Any, batch: Batch, label_smoothing: float) -> tuple[Tensor, Output]:
        logits = model(input_ids=batch["input_ids"]).logits
        loss = summed_cross_entropy(logits.reshape(-1, logits.shape[-1]), batch["labels"].reshape(-1), label_smoothing)
        if torch.is_grad_enabled():
            return loss, {}  # logits kept for metrics would outlive the backward pass
        return loss, {"loss_sum": loss, "num_correct": (logits.argmax(dim=-1) == batch["labels"]).sum()}

    def new_metrics(self) -> TaskMetrics:
        return CausalLMMetrics()


class CausalLMMetrics:
    """Summed loss, targets and correctly predicted tokens."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._num_targets = 0
        self._num_correct = 0

    def update(self, batch: Batch, output: Output) -> None:
        self._losses.append(float(output["loss_sum"]))
        self._num_targets += int((batch["labels"] != IGNORED).sum())
        self._num_correct += int(output["num_correct"])

    def state(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "num_targets": self._num_targets, "num_correct": self._num_correct}

    def merge(self, states: Iterable[dict[str, Any]]) -> CausalLMMetrics:
        for state in states:
            self._losses += state["losses"]
            self._num_targets += state["num_targets"]
            self._num_correct += state["num_correct"]
        return self

    def compute(self) -> dict[str, float]:
        """`loss` (nats a token), `perplexity`, `accuracy` (share of tokens predicted first), `num_targets`."""
        count = max(1, self._num_targets)
        loss = math.fsum(self._losses) / count  # exact, so independent of the order of batches and ranks
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": self._num_correct / count,
                "num_targets": float(self._num_targets)}

    def undefined(self) -> tuple[str, ...]:
        return () if self._num_targets else ("loss", "perplexity", "accuracy", "bits_per_byte")


def bits_per_byte(mean_loss: float, num_tokens: int, num_text_bytes: int) -> float:
    """Bits needed for a byte of text by a model that loses `mean_loss` nats a token on text of `num_tokens` tokens.

    Comparable across tokenisers, and with a compressor's ratio. The first token of each row, which no loss covers, is
    charged at the mean. Raises ValueError if there is no text.
    """
    if num_text_bytes <= 0:
        raise ValueError(f"num_text_bytes = {num_text_bytes}: there is no text to measure on")
    return mean_loss * num_tokens / math.log(2) / num_text_bytes
