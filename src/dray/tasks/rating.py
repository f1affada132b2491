"""How somebody rates something, of whom and of which nothing is known but ratings: two towers over
the ids of both, whose vectors and biases make the number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field as Limits
from pydantic import model_validator

from dray.spec import Direction, Field, Head
from dray.spec.sections import Float, Int, Section
from dray.tasks.rows import Column
from dray.tasks.task import Batch, Output, Task, TaskMetrics

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from torch import Tensor, nn

    from dray.tasks.parts.graphs import Graph
    from dray.tasks.rows import Encoded, Tools


class Rating(Task):
    """Prediction of ratings."""

    class Settings(Section):
        """What ratings are, and how large the towers' vectors."""

        low: Float = 1.0
        """No rating is lower."""
        high: Float = 5.0
        """No rating is higher."""
        vector_size: Annotated[Int, Limits(ge=1, le=4096)] = 32
        """Numbers in the vector of a user or an item."""
        unknown_share: Annotated[Float, Limits(ge=0, lt=1)] = 0.02
        """Share of the ids that training takes as unknown, so that those which are so later have a
        vector that says something."""

        @model_validator(mode="after")
        def _ordered(self) -> Self:
            if self.low >= self.high:
                raise ValueError(f"low = {self.low:g} is not below high = {self.high:g}")
            return self

    name = "rating"
    smooths = False
    fields: Mapping[str, Field] = {
        "user": Field("name", column="user"),
        "item": Field("name", column="item"),
        "label": Field("number"),
    }
    columns = (Column("label", "float32"),)
    metrics: Mapping[str, Direction] = {
        "loss": "lower",
        "rmse": "lower",
        "mse": "lower",
        "mae": "lower",
        "r2": "higher",
        "pearson": "higher",
        "spearman": "higher",
    }
    whole_words = predicts = True

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self.num_outputs = self.settings.vector_size + 1
        self.head = Head("AutoModelForSequenceClassification", "labels", "row")

    @property
    def row_settings(self) -> dict[str, Any]:
        kept = self.settings.model_dump(include={"low", "high"})
        return {"packs_rows": self.packs, "task": self.name, **kept}

    def words(self, texts: pa.Array) -> pa.Array:
        """A user and an item of one name are two tokens."""
        from dray.tasks.parts.encoding import name_sides

        return name_sides(texts, ("user", "item"))

    def encode(self, texts: pa.Array, targets: pa.Array | None, tools: Tools) -> Encoded:
        from dray.tasks.parts.encoding import encode_texts, encode_without, with_columns

        def encode(names: pa.Array) -> Encoded:
            return encode_texts(self.words(names), tools, surrounded=False)

        if targets is None:
            return encode(texts)
        low, high = self.settings.low, self.settings.high
        ratings = targets.cast("float64")
        (outside,) = (~((ratings.to_numpy() >= low) & (ratings.to_numpy() <= high))).nonzero()
        return encode_without(
            dict.fromkeys(outside.tolist(), f"rating outside of {low:g} to {high:g}"),
            texts,
            ratings,
            lambda names, own: with_columns(encode(names), label=own.to_numpy()),
        )

    def collate(self, table: pa.Table, draw: int = 0) -> Batch:
        """`input_ids` [rows, 2], int64; `labels` [rows], fp32, NaN for padding rows; `hidden`
        [rows, 2], bool."""
        import torch

        from dray.tasks.parts.columns import drawn_by_row, number_column, real_rows, token_matrix

        labels = number_column(table, "label").masked_fill(~real_rows(table), float("nan"))
        drawn = torch.from_numpy(drawn_by_row(table, draw, 2))
        return {
            "input_ids": token_matrix(table)[:, :2].contiguous(),
            "labels": labels,
            "hidden": drawn < self.settings.unknown_share,
        }

    def num_targets(self, batch: Batch) -> int:
        return int(batch["labels"].isfinite().sum())

    def objective(self, model: Any, label_smoothing: float = 0.0) -> nn.Module:
        from dray.tasks.parts.towers import TowersLoss

        return TowersLoss(model, self.settings.low, self.settings.high)

    def graph(self, model: Any) -> Graph:
        """The rating of a user and an item, by their ids."""
        from dray.tasks.parts.graphs import draw_ids, make_graph

        towers = self.objective(model)

        def draw(rows: int, tokens: int, generator: torch.Generator) -> Batch:
            return {"input_ids": draw_ids((rows, 2), self.vocab_size, 0, generator)}

        def rate(input_ids: Tensor) -> Tensor:
            found: Tensor = towers.rate(input_ids)  # type: ignore[operator]
            return found

        return make_graph(towers, rate, "ratings", draw)

    def predictions(self, batch: Batch, output: Output) -> list[Any]:
        return [{"prediction": number} for number in output["numbers"].tolist()]

    def new_metrics(self) -> TaskMetrics:
        from dray.tasks.parts.towers import RatingMetrics

        return RatingMetrics()
