"""One label a document: sentiment, topic, language. Rows are documents, padded to the longest of
their batch.

The corpus keeps rows of like length together, so little of a batch is padding. The model pools as
its architecture does: encoders their own way, decoders at the last token that is not padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dray.spec import Direction, Field, Head
from dray.tasks.rows import Column
from dray.tasks.task import IGNORED, Batch, Task, TaskMetrics

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import nn

    from dray.tasks.rows import Encoded, Tools


class SequenceClassification(Task):
    """Prediction of a document's label."""

    name = "sequence_classification"
    fields: Mapping[str, Field] = {"text": Field("text"), "label": Field("label")}
    metrics: Mapping[str, Direction] = {
        "loss": "lower",
        "accuracy": "higher",
        "precision": "higher",
        "recall": "higher",
        "f1": "higher",
        "auc": "higher",
    }
    columns = (Column("label", names=True),)
    head = Head(
        "AutoModelForSequenceClassification",
        over="labels",
        each="row",
        problem_type="single_label_classification",
    )

    def encode(self, texts: pa.Array, targets: pa.Array | None, tools: Tools) -> Encoded:
        encoded = super().encode(texts, targets, tools)
        return replace(encoded, columns={"label": tools.number(targets)})

    def collate(self, table: pa.Table) -> Batch:
        """`input_ids` and `attention_mask` [rows, width], `labels` [rows], all int64; padding rows
        are IGNORED."""
        from dray.tasks.columns import integer_column, padded_tokens, real_rows

        batch = padded_tokens(table, self.pad_token_id)
        labels = integer_column(table, "label").masked_fill(~real_rows(table), IGNORED)
        return {**batch, "labels": labels}

    def objective(self, model: Any, label_smoothing: float = 0.0) -> nn.Module:
        from dray.tasks.objectives import LabelLoss

        return LabelLoss(model, label_smoothing)

    def new_metrics(self) -> TaskMetrics:
        from dray.tasks.metrics import ClassificationMetrics

        return ClassificationMetrics(self.num_labels)
