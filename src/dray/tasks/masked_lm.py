"""Masked language modelling on packed rows: some tokens are hidden, and guessed from both sides.

Which ones is drawn for each row at each step from the seed, the step and the row's id, so that a
row is hidden otherwise every time it comes, and a resumed run hides the same. Of hidden tokens four
in five become the mask, one in ten another token, and one in ten stays (Devlin et al., 2018).

Validations measure the loss of what was hidden so. A thorough evaluation hides each token by
itself: the mean over all of them is the pseudo-log-likelihood (Salazar et al., 2020), at the cost
of as many passes as a row has tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field as Key

from dray.spec import Direction, Field, Head
from dray.spec.sections import Float, Section
from dray.tasks.rows import IGNORED, Column
from dray.tasks.task import Batch, Task, TaskMetrics

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor, nn

    from dray.tasks.rows import Encoded, Tools

SPECIAL = 2
"""Of the column `starts`: no word's token."""
PLACES_MULTIPLE = 64


class MaskedLM(Task):
    """Prediction of hidden tokens."""

    class Settings(Section):
        """What is hidden."""

        share: Annotated[Float, Key(gt=0, lt=1)] = 0.15
        """Share of the words, or tokens, that are hidden."""
        whole_words: bool = True
        """Whether all tokens of a word are hidden together."""

    name = "masked_lm"
    fields: Mapping[str, Field] = {"text": Field("text")}
    metrics: Mapping[str, Direction] = {
        "loss": "lower",
        "masked_perplexity": "lower",
        "accuracy": "higher",
    }
    columns = (Column("starts", dtype="uint8", each="token", pad=SPECIAL),)
    packs = True
    masks = True
    head = Head("AutoModelForMaskedLM", over="vocabulary", each="token")

    one_by_one = False
    """Whether each token is hidden by itself."""

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self.head = replace(type(self).head, share=self.settings.share)

    @property
    def row_settings(self) -> dict[str, Any]:
        return {"packs_rows": self.packs, "task": self.name}

    def encode(self, texts: pa.Array, targets: pa.Array | None, tools: Tools) -> Encoded:
        encoded = super().encode(texts, targets, tools)
        return replace(encoded, columns={"starts": tools.word_starts[encoded.tokens]})

    def collate(self, table: pa.Table, draw: int = 0) -> Batch:
        """`input_ids` with what is hidden, `labels` with what it was (else IGNORED), and
        `attention_mask`: int64 [rows, sequence_tokens]; `places` of the labels, int64."""
        import numpy as np
        import torch

        from dray.tasks.parts.columns import integer_column, matrix

        tokens, inside, may_hide = _read_rows(table)
        starts, (num_rows, width) = matrix(table, "starts"), tokens.shape
        ids = integer_column(table, "row_id") if "row_id" in table.column_names else None
        chosen, fates, others = (np.empty((num_rows, width)) for _ in range(3))
        for row in range(num_rows):
            place = row if ids is None else int(ids[row])
            key = np.array([draw, place % 2**64], np.uint64)
            random = np.random.Generator(np.random.Philox(key=key))
            chosen[row], fates[row], others[row] = random.random((3, width))
        drawn = torch.from_numpy(chosen)
        first = torch.arange(width).expand(num_rows, -1)
        if self.settings.whole_words:  # a word goes by what its first token drew
            begins = (starts == 1) | ~may_hide
            begins[:, 0] = True
            first = torch.where(begins, first, 0).cummax(dim=1).values
            drawn = drawn.gather(1, first)
        hidden = may_hide & (drawn < self.settings.share)
        lonely = may_hide.any(dim=1) & ~hidden.any(dim=1)  # a row without a target teaches nothing
        lowest = torch.where(may_hide, drawn, 2.0).argmin(dim=1, keepdim=True)
        hidden |= lonely[:, None] & may_hide & (first == first.gather(1, lowest))
        fate = torch.from_numpy(fates)
        other = (torch.from_numpy(others) * self.vocab_size).long()
        shown = torch.where(hidden & (fate < 0.8), int(self.mask_token_id or 0), tokens)
        shown = torch.where(hidden & (fate >= 0.9), other, shown)
        labels = torch.where(hidden, tokens, IGNORED)
        return _make_batch(shown, inside, labels)

    def thorough(self) -> MaskedLM:
        exact = copy.copy(self)
        exact.one_by_one = True
        return exact

    def passes(self, table: pa.Table, draw: int, num_rows: int) -> Iterator[Batch]:
        if not self.one_by_one:
            yield from super().passes(table, draw, num_rows)
            return
        import torch

        tokens, inside, may_hide = _read_rows(table)
        for places in torch.split(may_hide.nonzero(), num_rows):  # (row, position) of each token
            rows, positions = places[:, 0], places[:, 1]
            hidden = torch.zeros(len(rows), tokens.shape[1], dtype=torch.bool)
            hidden[torch.arange(len(rows)), positions] = True
            shown = tokens[rows].masked_fill(hidden, int(self.mask_token_id or 0))
            yield _make_batch(shown, inside[rows], tokens[rows].masked_fill(~hidden, IGNORED))

    def objective(self, model: Any, label_smoothing: float = 0.0) -> nn.Module:
        from dray.tasks.parts.objectives import HiddenTokenLoss

        return HiddenTokenLoss(model, label_smoothing)

    def new_metrics(self) -> TaskMetrics:
        from dray.tasks.parts.metrics import TokenMetrics

        return TokenMetrics("pseudo_perplexity" if self.one_by_one else "masked_perplexity")


def _make_batch(shown: Tensor, inside: Tensor, labels: Tensor) -> Batch:
    """`places`: where labels are, counted through the rows; -1 fills them up to one of few
    sizes."""
    places = (labels.flatten() != IGNORED).nonzero()[:, 0]
    size = max(1, -(-len(places) // PLACES_MULTIPLE)) * PLACES_MULTIPLE
    filled = places.new_full((size,), -1)
    filled[: len(places)] = places
    batch = {"input_ids": shown, "attention_mask": inside.long(), "labels": labels}
    return batch | {"places": filled}


def _read_rows(table: pa.Table) -> tuple[Tensor, Tensor, Tensor]:
    """Rows' tokens, int64, and as bool which of them a row has, and which may be hidden:
    [rows, sequence_tokens] each."""
    import torch

    from dray.tasks.parts.columns import integer_column, matrix, real_rows, token_matrix

    tokens, num_tokens = token_matrix(table), integer_column(table, "num_tokens")
    # A row without any token to attend to would give NaN.
    inside = torch.arange(tokens.shape[1])[None, :] < num_tokens.clamp(min=1)[:, None]
    may_hide = inside & (matrix(table, "starts") != SPECIAL) & real_rows(table)[:, None]
    return tokens, inside, may_hide
