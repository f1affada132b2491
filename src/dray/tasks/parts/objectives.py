"""Losses around models, which tasks share: what is wrapped, compiled and called.

`forward(batch)` gives `{"loss": (sum, count)}` and, where no gradient is wanted, what the metrics
need. Labels are smoothed in training alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dray.tasks.parts.graphs import takes_segments
from dray.tasks.parts.heads import find_head, heeds_tokens_by_themselves
from dray.tasks.parts.losses import (
    LogitRule,
    count_correct,
    linear_cross_entropy,
    rows_at_once,
    summed_cross_entropy,
)
from dray.tasks.rows import IGNORED

if TYPE_CHECKING:
    from dray.tasks.task import Batch, Output, Terms

NumberCost = Callable[[Tensor, Tensor], Tensor]


class NextTokenLoss(nn.Module):
    """A language model and the summed cross entropy of its tokens, of which only a chunk has its
    logits at a time. A batch that has `position_ids` gives them to the model."""

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
            hidden = self.model.get_submodule(self.body_name)(**_places(batch))[0]
            loss, correct = self.projection(
                hidden.flatten(0, 1), batch["labels"].flatten(), smoothing
            )
        elif torch.is_grad_enabled():
            loss, correct = self._from_logits(_places(batch), batch["labels"], smoothing)
        else:
            loss, correct = self._by_rows(batch, smoothing)
        count = (batch["labels"] != IGNORED).sum()
        return {"loss": (loss, count)}, {} if correct is None else {
            "loss_sum": loss,
            "num_correct": correct,
        }

    taught = True
    """Whether it can learn from another model's outputs."""

    def outputs_of(self, model: Any, batch: Batch) -> None:
        """Let another model see what its own sees of a batch."""
        (model if self.projection is None else model.base_model)(**_places(batch))

    def rows_of(self, model: Any, output: Any) -> Tensor:
        """What became of a batch in a model, as rows beside the labels: [labels, …]."""
        hidden: Tensor = output.logits if hasattr(output, "logits") else output[0]
        return hidden.flatten(0, -2)

    def head_of(self, model: Any) -> nn.Module | None:
        """What makes logits of such rows; None: they are logits."""
        head: nn.Module | None = None
        if self.projection is not None:
            head = model.get_output_embeddings()
        return head

    def _from_logits(
        self, inputs: Batch, labels: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor | None]:
        logits = self.model(**inputs).logits
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
            self._from_logits(
                {name: values[at : at + rows] for name, values in _places(batch).items()},
                labels[at : at + rows],
                smoothing,
            )
            for at in range(0, len(ids), rows)
        ]
        losses, corrects = zip(*parts, strict=True)
        return torch.stack(losses).sum(), torch.stack(corrects).sum()


def _places(batch: Batch) -> Batch:
    return {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}


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


class LabelLoss(nn.Module):
    """A model that gives logits for each row, or for each token, and the summed cross entropy of
    the labels; metrics get the softmax."""

    def __init__(self, model: Any, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing
        self.takes_segments = takes_segments(model)

    taught = True

    def outputs_of(self, model: Any, batch: Batch) -> None:
        """As `NextTokenLoss.outputs_of`."""
        model(**model_inputs(batch, self.takes_segments))

    def rows_of(self, model: Any, output: Any) -> Tensor:
        """As `NextTokenLoss.rows_of`."""
        logits: Tensor = output.logits
        return logits.flatten(0, -2)

    def head_of(self, model: Any) -> None:
        """Its rows are logits."""

    def forward(self, batch: Batch) -> tuple[Terms, Output]:
        logits = self.model(**model_inputs(batch, self.takes_segments)).logits
        smoothing = self.label_smoothing if self.training else 0.0
        labels = batch["labels"].flatten()
        loss = summed_cross_entropy(logits.flatten(0, -2), labels, smoothing)
        terms: Terms = {"loss": (loss, (labels != IGNORED).sum())}
        if torch.is_grad_enabled():
            return terms, {}
        return terms, {"loss_sum": loss, "scores": torch.softmax(logits.float(), dim=-1)}


class HiddenTokenLoss(nn.Module):
    """A model that guesses hidden tokens, and the summed cross entropy of these.

    Only the `places` of a batch go from the body through the head, where that looks at each token
    by itself; else all tokens do.
    """

    def __init__(self, model: Any, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing
        self._places: Tensor | None = None
        self.selects = heeds_tokens_by_themselves(model)
        if self.selects:
            model.base_model.register_forward_hook(self._select)

    def forward(self, batch: Batch) -> tuple[Terms, Output]:
        labels, places = batch["labels"].flatten(), batch["places"]
        if self.selects:
            labels = torch.where(places < 0, IGNORED, labels[places.clamp(min=0)])
        logits = self._logits(model_inputs(batch, False), places if self.selects else None)
        smoothing = self.label_smoothing if self.training else 0.0
        loss = summed_cross_entropy(logits.flatten(0, -2), labels, smoothing)
        terms: Terms = {"loss": (loss, (labels != IGNORED).sum())}
        if torch.is_grad_enabled():
            return terms, {}
        num_correct = (logits.argmax(dim=-1).flatten() == labels).sum()
        return terms, {"loss_sum": loss, "num_correct": num_correct}

    def _logits(self, inputs: Batch, places: Tensor | None) -> Tensor:
        """The model's logits: of all tokens, [rows, tokens, classes], or of some, [1, places,
        classes]."""
        self._places = places
        try:
            logits: Tensor = self.model(**inputs).logits
            return logits
        finally:
            self._places = None

    def _select(self, body: nn.Module, given: Any, output: Any) -> Any:
        """What the body gives on to the head."""
        if self._places is None:
            return output
        chosen = output[0].flatten(0, 1)[self._places.clamp(min=0)][None]
        if isinstance(output, tuple):
            return (chosen, *output[1:])
        output["last_hidden_state"] = chosen
        return output


class ManyLabelsLoss(nn.Module):
    """A classifier of rows with any number of labels each: the binary cross entropy of each label,
    of which a row counts the mean. Smoothing draws targets towards a half."""

    def __init__(self, model: Any, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing
        self.takes_segments = takes_segments(model)

    def forward(self, batch: Batch) -> tuple[Terms, Output]:
        logits = self.model(**model_inputs(batch, self.takes_segments)).logits.float()
        real = batch["labels"][:, 0] != IGNORED
        targets = batch["labels"].clamp(min=0).float()
        if self.training and self.label_smoothing:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / 2
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=-1)
        loss = (losses * real).sum()
        terms: Terms = {"loss": (loss, real.sum())}
        if torch.is_grad_enabled():
            return terms, {}
        return terms, {"loss_sum": loss, "scores": torch.sigmoid(logits)}


class NumberLoss(nn.Module):
    """A model of one number a row, and the sum of what its errors cost: `loss` of numbers [rows]
    and of those wanted, each by itself."""

    def __init__(self, model: Any, loss: NumberCost) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.takes_segments = takes_segments(model)

    def forward(self, batch: Batch) -> tuple[Terms, Output]:
        found = self.model(**model_inputs(batch, self.takes_segments)).logits.float()[:, 0]
        real = batch["labels"].isfinite()
        wanted = torch.where(real, batch["labels"].nan_to_num(), found.detach())
        loss = self.loss(found, wanted).sum()
        terms: Terms = {"loss": (loss, real.sum())}
        return terms, {} if torch.is_grad_enabled() else {"loss_sum": loss, "numbers": found}


def model_inputs(batch: Batch, takes_segments: bool) -> Batch:
    """What of a batch a model takes."""
    names = ("input_ids", "attention_mask", *(["token_type_ids"] if takes_segments else []))
    return {name: batch[name] for name in names if name in batch}
