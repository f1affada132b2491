"""Causal language modelling on packed rows: every token of a row but its first is predicted from
those before it.

Documents packed into one row see each other, as in GPT-2 and its kin; the end-of-document token
keeps them apart. Padding at the end of a row cannot reach the tokens before it, so no attention
mask is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dray.tasks.columns import integer_column, real_rows, token_matrix
from dray.tasks.heads import find_head
from dray.tasks.losses import (
    LogitRule,
    count_correct,
    linear_cross_entropy,
    rows_at_once,
    summed_cross_entropy,
)
from dray.tasks.task import IGNORED, Batch, Output, TaskMetrics, Terms

if TYPE_CHECKING:
    import pyarrow as pa


class CausalLM:
    """Next-token prediction."""

    name = "causal_lm"

    def collate(self, table: pa.Table) -> Batch:
        """`input_ids` and `labels`, int64 [rows, sequence_tokens]; labels[:, t] is the token at t +
        1, or IGNORED.

        The last position has no label: rows keep their full, even width, and the logits are never
        cut and copied.
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

    def objective(self, model: Any, label_smoothing: float = 0.0) -> torch.nn.Module:
        return NextTokenLoss(model, label_smoothing)

    def new_metrics(self) -> TaskMetrics:
        return CausalLMMetrics()


class NextTokenLoss(nn.Module):
    """A language model with its loss: what is wrapped, compiled and called.

    `forward(batch)` gives `{"loss": (sum, count)}` and, where no gradient is wanted, what the
    metrics need. Labels are smoothed in training alone.
    """

    def __init__(self, model: Any, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        head = find_head(model)
        self.body_name = "" if head is None else _name_of(model, head.body)
        self.projection = None if head is None else ProjectionLoss(head.projection, head.rule)

    def forward(self, batch: Batch) -> tuple[Terms, Output]:
        smoothing = self.label_smoothing if self.training else 0.0
        if self.projection is not None:
            hidden = self.model.get_submodule(self.body_name)(input_ids=batch["input_ids"])[0]
            loss, correct = self.projection(
                hidden.flatten(0, 1), batch["labels"].flatten(), smoothing
            )
        elif torch.is_grad_enabled():
            loss, correct = self._from_logits(batch["input_ids"], batch["labels"], smoothing)
        else:
            loss, correct = self._by_rows(batch, smoothing)
        count = (batch["labels"] != IGNORED).sum()
        return {"loss": (loss, count)}, {} if correct is None else {
            "loss_sum": loss,
            "num_correct": correct,
        }

    def _from_logits(
        self, input_ids: Tensor, labels: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor | None]:
        logits = self.model(input_ids=input_ids).logits
        loss = summed_cross_entropy(logits.flatten(0, 1), labels.flatten(), smoothing)
        # Logits kept for metrics would outlive the backward pass.
        return loss, None if torch.is_grad_enabled() else (logits.argmax(dim=-1) == labels).sum()

    def _by_rows(self, batch: Batch, smoothing: float) -> tuple[Tensor, Tensor | None]:
        """As above, a few rows at a time, so that the logits of a whole batch need no room."""
        ids, labels = batch["input_ids"], batch["labels"]
        rows = rows_at_once(
            ids.shape[1], self.model.config.get_text_config().vocab_size, ids.device
        )
        parts = [
            self._from_logits(ids[at : at + rows], labels[at : at + rows], smoothing)
            for at in range(0, len(ids), rows)
        ]
        losses, corrects = zip(*parts, strict=True)
        return torch.stack(losses).sum(), torch.stack(corrects).sum()


class ProjectionLoss(nn.Module):
    """The loss of a language model's head, with the head's own parameters: called as a module, so
    that ZeRO-3, which gathers a module's parameters while it runs, finds it."""

    def __init__(self, projection: nn.Linear, rule: LogitRule) -> None:
        super().__init__()
        self.weight, self.bias, self.rule = projection.weight, projection.bias, rule

    def forward(
        self, hidden: Tensor, labels: Tensor, label_smoothing: float
    ) -> tuple[Tensor, Tensor | None]:
        """The summed loss, and where no gradient is wanted the number of labels that are
        likeliest."""
        loss = linear_cross_entropy(
            hidden, self.weight, self.bias, labels, label_smoothing=label_smoothing, rule=self.rule
        )
        return loss, None if torch.is_grad_enabled() else count_correct(
            hidden, self.weight, self.bias, labels
        )


def _name_of(model: nn.Module, part: nn.Module) -> str:
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[part]


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
        return {
            "losses": list(self._losses),
            "num_targets": self._num_targets,
            "num_correct": self._num_correct,
        }

    def merge(self, states: Iterable[dict[str, Any]]) -> CausalLMMetrics:
        for state in states:
            self._losses += state["losses"]
            self._num_targets += state["num_targets"]
            self._num_correct += state["num_correct"]
        return self

    def compute(self) -> dict[str, float]:
        """`loss` (nats a token), `perplexity`, `accuracy` (share of tokens predicted first),
        `num_targets`."""
        count = max(1, self._num_targets)
        loss = (
            math.fsum(self._losses) / count
        )  # exact, so independent of the order of batches and ranks
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": self._num_correct / count,
            "num_targets": float(self._num_targets),
        }

    def undefined(self) -> tuple[str, ...]:
        return () if self._num_targets else ("loss", "perplexity", "accuracy", "bits_per_byte")


def bits_per_byte(mean_loss: float, num_tokens: int, num_text_bytes: int) -> float:
    """Bits needed for a byte of text by a model that loses `mean_loss` nats a token on text of
    `num_tokens` tokens.

    Comparable across tokenisers, and with a compressor's ratio. The first token of each row, which
    no loss covers, is charged at the mean. Raises ValueError if there is no text.
    """
    if num_text_bytes <= 0:
        raise ValueError(f"num_text_bytes = {num_text_bytes}: there is no text to measure on")
    return mean_loss * num_tokens / math.log(2) / num_text_bytes
