"""Vectors of texts, such that two texts which belong together are near each other: questions and
answers, titles and bodies, paraphrases.

Rows are pairs. Each text is to find its other one among those of all pairs of the global batch, in
both directions (InfoNCE), whatever ranks and micro batches that is cut into: so a larger global
batch is a harder question, and the same one on any number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field as Limits

from dray.spec import Direction, Field, Head
from dray.spec.sections import Float, Section
from dray.tasks.rows import Column
from dray.tasks.task import Batch, Output, Task, TaskMetrics

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor, nn

    from dray.tasks.parts.graphs import Graph
    from dray.tasks.rows import Encoded, Tools


class Embedding(Task):
    """Vectors of texts."""

    class Settings(Section):
        """How vectors are made and compared."""

        temperature: Annotated[Float, Limits(gt=0)] = 0.05
        """What cosines are divided by in the loss: the lower, the more the nearest of the wrong
        ones count."""
        pooling: Literal["mean", "first"] = "mean"
        """What of a text's hidden states is its vector: their mean, or the first one."""

    name = "embedding"
    fields: Mapping[str, Field] = {
        "text": Field("text"),
        "text_pair": Field("text", asked=False),
    }
    columns = (Column("pair", "uint32", varies=True),)
    metrics: Mapping[str, Direction] = {
        "loss": "lower",
        "recall_1": "higher",
        "recall_10": "higher",
        "mrr": "higher",
    }
    pools = predicts = True
    serves = ("embeddings",)
    head = Head("AutoModel", over="hidden", each="row")

    @property
    def row_settings(self) -> dict[str, Any]:
        return {"packs_rows": self.packs, "task": self.name}

    def encode(self, texts: pa.Array, targets: pa.Array | None, tools: Tools) -> Encoded:
        from dray.tasks.parts.encoding import encode_apart

        return encode_apart(texts, tools, second="pair")

    def collate(self, table: pa.Table, draw: int = 0) -> Batch:
        """`input_ids` and `attention_mask` [texts, width], int64: the first texts of all rows, then
        the second ones, if there are any; `real` [rows], bool: those that are none of padding."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        from dray.tasks.parts.columns import list_column, padded_tokens, real_rows

        first = padded_tokens(table, self.pad_token_id)
        ids, mask, real = first["input_ids"], first["attention_mask"], real_rows(table)
        pairs = list_column(table, "pair")
        if not any(map(len, pairs)):
            return {"input_ids": ids, "attention_mask": mask, "real": real}
        filler = int(self.pad_token_id or 0)
        second = pad_sequence(pairs, batch_first=True, padding_value=filler).long()
        # A row without any token to attend to would give NaN.
        lengths = torch.tensor([max(1, len(pair)) for pair in pairs])
        inside = (torch.arange(second.shape[1]) < lengths[:, None]).long()
        width = max(ids.shape[1], second.shape[1])
        sides = [(ids, filler), (second, filler)], [(mask, 0), (inside, 0)]
        return {
            name: torch.cat(
                [
                    torch.nn.functional.pad(part, (0, width - part.shape[1]), value=value)
                    for part, value in side
                ]
            )
            for name, side in zip(("input_ids", "attention_mask"), sides, strict=True)
        } | {"real": real}

    def num_targets(self, batch: Batch) -> int:
        return int(batch["real"].sum())

    def objective(self, model: Any, label_smoothing: float = 0.0) -> nn.Module:
        from dray.tasks.parts.similarity import PairVectors

        settings = self.settings
        return PairVectors(model, temperature=settings.temperature, pooling=settings.pooling)

    def graph(self, model: Any) -> Graph:
        """The vector of a text."""
        from dray.tasks.parts.graphs import logits_graph, make_graph

        vectors = self.objective(model)
        tokens = logits_graph(self, model)
        return make_graph(vectors, vectors.vectors, "embeddings", tokens.draw)  # type: ignore[arg-type]

    def pooled_losses(self, pooled: Tensor, label_smoothing: float = 0.0) -> Tensor:
        from dray.tasks.parts.similarity import contrastive_losses

        return contrastive_losses(pooled, self.settings.temperature, label_smoothing)

    def predictions(self, batch: Batch, output: Output) -> list[Any]:
        return [{"prediction": vector} for vector in output["pooled"][:, 0].tolist()]

    def new_metrics(self) -> TaskMetrics:
        from dray.tasks.parts.similarity import RetrievalMetrics

        return RetrievalMetrics(self.settings.temperature)
