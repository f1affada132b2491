"""Models that write answers: the loss of an encoder with a decoder behind it, and what a model
writes when it is asked.

Writing is transformers' own `generate`, without sampling. It takes many forward passes, so a
validation does not do it; an evaluation to the letter and predictions do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dray.models.config import longest_row
from dray.tasks.parts.losses import summed_cross_entropy
from dray.tasks.rows import IGNORED
from dray.tasks.task import Batch, Output, Terms

WIDTH_MULTIPLE = 8


class DecodedLoss(nn.Module):
    """A model with an encoder and a decoder, and the summed cross entropy of the labels, which the
    decoder is given one place later, as if it had written them (teacher forcing)."""

    def __init__(self, model: Any, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing
        self.start = int(model.config.decoder_start_token_id)

    def forward(self, batch: Batch) -> tuple[Terms, Output]:
        labels = batch["labels"]
        given = torch.full_like(labels, self.start)
        given[:, 1:] = labels[:, :-1].clamp(min=0)  # behind an answer nothing is asked
        logits = self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=given,
        ).logits
        smoothing = self.label_smoothing if self.training else 0.0
        loss = summed_cross_entropy(logits.flatten(0, 1), labels.flatten(), smoothing)
        terms: Terms = {"loss": (loss, (labels != IGNORED).sum())}
        if torch.is_grad_enabled():
            return terms, {}
        num_correct = (logits.argmax(dim=-1) == labels).sum()
        return terms, {"loss_sum": loss, "num_correct": num_correct}


class WritingLoss(nn.Module):
    """An objective whose model writes besides: `written` [rows, width] are the ids of what it
    answers to each row's `prompt`."""

    def __init__(
        self, objective: Any, *, most_tokens: int, beams: int, pad_token_id: int | None
    ) -> None:
        super().__init__()
        self.objective, self.model = objective, objective.model
        self.most_tokens, self.beams, self.pad_token_id = most_tokens, beams, pad_token_id

    def forward(self, batch: Batch) -> tuple[Terms, Output]:
        terms, output = self.objective(batch)
        written = write(
            self.model,
            batch["prompt"],
            batch["prompt_mask"],
            most_tokens=self.most_tokens,
            beams=self.beams,
            pad_token_id=self.pad_token_id,
        )
        return terms, {**output, "written": written}


@torch.no_grad()
def write(
    model: Any,
    prompt: Tensor,
    mask: Tensor,
    *,
    most_tokens: int,
    beams: int = 1,
    pad_token_id: int | None = None,
) -> Tensor:
    """The likeliest answers that a search with `beams` finds, int64 [rows, width], padded behind
    their end. `prompt` and `mask` [rows, width]: padded before the prompts, or where an encoder
    reads them behind. An answer ends at the row that the model takes, too."""
    config = model.config
    apart, longest = bool(getattr(config, "is_encoder_decoder", False)), longest_row(config)
    taken = 0 if apart else prompt.shape[1]
    room = most_tokens if longest is None else max(1, min(most_tokens, longest - taken))
    found: Tensor = model.generate(
        input_ids=prompt,
        attention_mask=mask,
        max_new_tokens=room,
        num_beams=beams,
        do_sample=False,
        use_cache=True,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.eos_token_id if pad_token_id is None else pad_token_id,
    )
    return found[:, 1 if apart else taken :]


def pad_before(rows: Sequence[Tensor], filler: int) -> tuple[Tensor, Tensor]:
    """Prompts of any lengths as `prompt` and `prompt_mask`, int64 [rows, width]: each ends where
    the row does. An empty one is one token of filler, since a row without any gives NaN."""
    width = max([1, *(len(row) for row in rows)])
    prompt = torch.full((len(rows), width), filler, dtype=torch.int64)
    mask = torch.zeros_like(prompt)
    for index, row in enumerate(rows):
        prompt[index, width - len(row) :] = row
        mask[index, width - max(1, len(row)) :] = 1
    return prompt, mask


def pad_behind(rows: Sequence[Tensor], filler: int) -> Tensor:
    """Numbers of any lengths as int64 [rows, width], of one of few widths."""
    longest = max([1, *(len(row) for row in rows)])
    width = -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    found = torch.full((len(rows), width), filler, dtype=torch.int64)
    for index, row in enumerate(rows):
        found[index, : len(row)] = row
    return found
