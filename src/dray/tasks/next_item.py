"""The next item of a sequence: what somebody buys, watches or hears after what he had before. Items
are the vocabulary, and a causal transformer over their ids learns to tell each next one (SASRec:
Kang and McAuley, 2018, with the cross entropy over all items).

Rows are sequences; a longer one becomes several rows, of which the last is measured, and what the
others hold is left out of ranking there, too. Each next item is a target in training; a validation
measures the last one of a sequence alone. So a source of training leaves out what validation and
test measure: `gather.leave_out`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field as Limits

from dray.spec import Direction, Field, Head
from dray.spec.sections import Int, Section
from dray.tasks.rows import IGNORED, UNKNOWN_WORD, Column
from dray.tasks.task import Batch, Output, Task, TaskMetrics

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import nn

    from dray.tasks.rows import Encoded, Tools


class NextItem(Task):
    """Prediction of the next item."""

    class Settings(Section):
        """What may come next."""

        repeats: bool = False
        """Whether an item may come again: else those that a sequence has are left out of
        ranking."""
        num_told: Annotated[Int, Limits(ge=1, le=1000)] = 10
        """How many of the likeliest items a prediction tells."""

    name = "next_item"
    fields: Mapping[str, Field] = {"items": Field("names", column="items")}
    columns = (Column("final", "uint8"), Column("before", varies=True))
    metrics: Mapping[str, Direction] = {
        "loss": "lower",
        "hr_10": "higher",
        "ndcg_10": "higher",
        "mrr": "higher",
    }
    whole_words = predicts = tells_tokens = True
    head = Head("AutoModelForCausalLM", over="vocabulary", each="token", looks_ahead=False)

    @property
    def row_settings(self) -> dict[str, Any]:
        return {"packs_rows": self.packs, "task": self.name}

    def encode(self, texts: pa.Array, targets: pa.Array | None, tools: Tools) -> Encoded:
        from dray.tasks.parts.encoding import encode_sequences

        return encode_sequences(texts, tools)

    def collate(self, table: pa.Table, draw: int = 0) -> Batch:
        """`input_ids` and `labels` [rows, width], the item after each or IGNORED; `last` [rows],
        the place of the sequence's last item, -1 of rows without it; `before` [rows, any], what
        such a row had no room for, 0 where there is none: all int64."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        from dray.tasks.parts.columns import integer_column, list_column, padded_tokens, real_rows

        input_ids = padded_tokens(table, self.pad_token_id)["input_ids"]
        num_tokens, real = integer_column(table, "num_tokens"), real_rows(table)
        labels = torch.full_like(input_ids, IGNORED)
        labels[:, :-1] = input_ids[:, 1:]
        beyond = torch.arange(1, input_ids.shape[1] + 1) >= (num_tokens * real)[:, None]
        labels[beyond | (labels == UNKNOWN_WORD)] = IGNORED
        return {
            "input_ids": input_ids,
            "labels": labels,
            "last": torch.where(real & (integer_column(table, "final") > 0), num_tokens - 1, -1),
            "before": pad_sequence(list_column(table, "before"), batch_first=True).long(),
        }

    def objective(self, model: Any, label_smoothing: float = 0.0) -> nn.Module:
        from dray.tasks.parts.ranking import NextOfAllLoss

        return NextOfAllLoss(
            model,
            label_smoothing,
            num_told=self.settings.num_told,
            repeats=self.settings.repeats,
        )

    def predictions(self, batch: Batch, output: Output) -> list[Any]:
        found = []
        for items, scores in zip(output["told"].tolist(), output["scores"].tolist(), strict=True):
            # What has been had scores nothing: where few items are left, fewer are told.
            num_told = sum(score > 0 for score in scores)
            names = [self.token_names[item] for item in items[:num_told]]
            found.append({"prediction": names, "scores": scores[:num_told]})
        return found

    def join_predictions(
        self, pieces: Sequence[Any], given: Mapping[str, Any], untold: Sequence[int] = ()
    ) -> dict[str, Any]:
        """What follows the last of a sequence's rows."""
        return dict(pieces[-1])

    def new_metrics(self) -> TaskMetrics:
        from dray.tasks.parts.ranking import RankMetrics

        return RankMetrics()
