"""Classes of documents, or of pairs of texts: sentiment, topics, entailment. One of them each, or
any number.

Rows are documents, padded to the longest of their batch. The corpus keeps rows of like length
together, so little of a batch is padding. The model pools as its architecture does: encoders their
own way, decoders at the last token that is not padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from dray.spec import Direction, Field, Head
from dray.spec.sections import Section
from dray.tasks.rows import IGNORED, Column
from dray.tasks.task import Batch, Output, Task, TaskMetrics

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import nn

    from dray.tasks.rows import Encoded, Tools

AUTO_CLASS = "AutoModelForSequenceClassification"


class SequenceClassification(Task):
    """Prediction of a document's label, or of its labels."""

    class Settings(Section):
        """What has labels, and how many."""

        labels: Literal["one", "many"] = "one"
        """`many`: a document has any number of them; the column holds a list, or a text with
        commas between."""
        pairs: bool = False
        """Whether a document is two texts: `text`, and the column that `columns.text_pair` of a
        source names."""

    name = "sequence_classification"
    predicts = True
    metrics: Mapping[str, Direction] = {
        "loss": "lower",
        "accuracy": "higher",
        "precision": "higher",
        "recall": "higher",
        "f1": "higher",
        "auc": "higher",
    }

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        pairs, many = self.settings.pairs, self.settings.labels == "many"
        self.fields = {
            "text": Field("text"),
            **({"text_pair": Field("text")} if pairs else {}),
            "label": Field("labels" if many else "label"),
        }
        segments = (Column("segment", "uint8", "token", extends=True),) if pairs else ()
        label = Column("label", "uint8", hot=True) if many else Column("label", names=True)
        self.columns = (*segments, label)
        kind = "multi_label_classification" if many else "single_label_classification"
        self.head = Head(AUTO_CLASS, over="labels", each="row", problem_type=kind)

    @property
    def row_settings(self) -> dict[str, Any]:
        return {"packs_rows": self.packs, **self.settings.model_dump(exclude_defaults=True)}

    def encode(self, texts: pa.Array, targets: pa.Array | None, tools: Tools) -> Encoded:
        from dray.tasks.encoding import encode_texts_or_pairs, number_lists, with_columns

        encoded = encode_texts_or_pairs(texts, tools, pairs=self.settings.pairs)
        if targets is None:
            return encoded
        many = self.settings.labels == "many"
        numbers = number_lists(targets, tools) if many else tools.number(targets)
        return with_columns(encoded, label=numbers)

    def collate(self, table: pa.Table, draw: int = 0) -> Batch:
        """`input_ids` and `attention_mask` [rows, width], `labels` [rows] or, 1 or 0 for each,
        [rows, classes], all int64; padding rows are IGNORED."""
        from dray.tasks.columns import integer_column, matrix, padded_tokens, real_rows

        real = real_rows(table)
        if self.settings.labels == "many":
            labels = matrix(table, "label").masked_fill(~real[:, None], IGNORED)
        else:
            labels = integer_column(table, "label").masked_fill(~real, IGNORED)
        return {**padded_tokens(table, self.pad_token_id), "labels": labels}

    def num_targets(self, batch: Batch) -> int:
        labels = batch["labels"]
        return int((labels.reshape(len(labels), -1)[:, :1] != IGNORED).sum())

    def objective(self, model: Any, label_smoothing: float = 0.0) -> nn.Module:
        from dray.tasks.objectives import LabelLoss, ManyLabelsLoss

        if self.settings.labels == "many":
            return ManyLabelsLoss(model, label_smoothing)
        return LabelLoss(model, label_smoothing)

    def predictions(self, batch: Batch, output: Output) -> list[Any]:
        many, found = self.settings.labels == "many", []
        for row in output["scores"].tolist():
            scores = dict(zip(self.labels, row, strict=True))
            likely = [label for label, score in scores.items() if score > 0.5]
            best = max(scores, key=lambda label: scores[label])
            found.append({"prediction": likely if many else best, "scores": scores})
        return found

    def new_metrics(self) -> TaskMetrics:
        from dray.tasks.metrics import ClassificationMetrics, ManyLabelsMetrics

        if self.settings.labels == "many":
            return ManyLabelsMetrics()
        return ClassificationMetrics(self.num_labels)
