"""A number for each document, or for each pair of texts: ratings, scores, similarity.

Rows are documents, padded to the longest of their batch, as for `sequence_classification`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field as Limits
from pydantic import model_validator

from dray.spec import Direction, Field, Head
from dray.spec.sections import Float, Section
from dray.tasks.rows import Column
from dray.tasks.task import Batch, Output, Task, TaskMetrics

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor, nn

    from dray.tasks.rows import Encoded, Tools


class Regression(Task):
    """Prediction of a number."""

    class Settings(Section):
        """What a number is of."""

        pairs: bool = False
        """Whether it is of two texts: of `text` and of the column that `columns.text_pair` of a
        source names."""
        loss: Literal["squared", "absolute", "huber"] = "squared"
        """What an error costs: its square; its size, so that a few numbers that are far off weigh
        less; or Huber's loss: half the square up to `huber_delta`, and straight on beyond it."""
        huber_delta: Annotated[Float, Limits(gt=0)] = 1.0
        """Up to which error, in the numbers' own unit, `huber` is a square."""

        @model_validator(mode="after")
        def _fits(self) -> Self:
            if self.loss != "huber" and self.huber_delta != 1.0:
                raise ValueError(
                    f"huber_delta = {self.huber_delta:g} is of loss = huber, and loss = {self.loss}"
                )
            return self

    name = "regression"
    smooths = False
    predicts = True
    num_outputs = 1
    metrics: Mapping[str, Direction] = {
        "loss": "lower",
        "mse": "lower",
        "mae": "lower",
        "r2": "higher",
        "pearson": "higher",
        "spearman": "higher",
    }
    head = Head("AutoModelForSequenceClassification", "labels", "row", problem_type="regression")

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        pairs = self.settings.pairs
        self.fields = {
            "text": Field("text"),
            **({"text_pair": Field("text")} if pairs else {}),
            "label": Field("number"),
        }
        segments = (Column("segment", "uint8", "token", extends=True),) if pairs else ()
        self.columns = (*segments, Column("label", "float32"))

    @property
    def row_settings(self) -> dict[str, Any]:
        return {"packs_rows": self.packs, "task": self.name, "pairs": self.settings.pairs}

    def encode(self, texts: pa.Array, targets: pa.Array | None, tools: Tools) -> Encoded:
        from dray.tasks.parts.encoding import encode_texts_or_pairs, with_columns

        encoded = encode_texts_or_pairs(texts, tools, pairs=self.settings.pairs)
        if targets is None:
            return encoded
        return with_columns(encoded, label=targets.cast("float64").to_numpy())

    def collate(self, table: pa.Table, draw: int = 0) -> Batch:
        """`input_ids`, `attention_mask` [rows, width], int64, and `labels` [rows], fp32; NaN for
        padding rows."""
        from dray.tasks.parts.columns import number_column, padded_tokens, real_rows

        labels = number_column(table, "label").masked_fill(~real_rows(table), float("nan"))
        return {**padded_tokens(table, self.pad_token_id), "labels": labels}

    def num_targets(self, batch: Batch) -> int:
        return int(batch["labels"].isfinite().sum())

    def objective(self, model: Any, label_smoothing: float = 0.0) -> nn.Module:
        from dray.tasks.parts.objectives import NumberLoss

        return NumberLoss(model, self._cost)

    def _cost(self, found: Tensor, wanted: Tensor) -> Tensor:
        from torch.nn import functional

        if self.settings.loss == "absolute":
            return functional.l1_loss(found, wanted, reduction="none")
        if self.settings.loss == "huber":
            delta = self.settings.huber_delta
            return functional.huber_loss(found, wanted, reduction="none", delta=delta)
        return functional.mse_loss(found, wanted, reduction="none")

    def predictions(self, batch: Batch, output: Output) -> list[Any]:
        return [{"prediction": number} for number in output["numbers"].tolist()]

    def new_metrics(self) -> TaskMetrics:
        from dray.tasks.parts.metrics import NumberMetrics

        return NumberMetrics()
