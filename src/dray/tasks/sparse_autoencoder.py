"""A dictionary of features that explain what a block of a trained model computes (Bricken et al.,
2023; Gao et al., 2024): few of many directions make up the hidden state behind it, at each token.

The model is that of `model.run` or `model.path` and stays as it is; what lies behind the block is
left away. What is trained is the dictionary, and only that stands in checkpoints. Documents are
texts, one a row. Learnt from are the hidden states at their tokens: neither at padding, nor at
special tokens, whose states are like no others'.
"""

from __future__ import annotations

import copy
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
    from torch import Tensor, nn

    from dray.tasks.parts.graphs import Graph
    from dray.tasks.rows import Encoded, Tools

SPECIAL = 2
"""Of `Tools.word_starts`: no text's token."""
PLACES_MULTIPLE = 64
TOLD_FEATURES = 10
"""The strongest of a document are told by a prediction."""


class SparseAutoencoder(Task):
    """Features of what a block computes."""

    class Settings(Section):
        """Which block, and how its hidden states are taken apart."""

        block: Annotated[Int, Limits(ge=0)]
        """The hidden states behind it are learnt from; blocks are counted from 0."""
        features: Annotated[Int, Limits(ge=1, le=16_777_216)]
        """Number of features; usually several times the width of the model."""
        top_k: Annotated[Int, Limits(ge=1)] | None = None
        """The strongest so many features of a token are its own, all others are 0."""
        l1: Annotated[Float, Limits(gt=0)] | None = None
        """In place of `top_k`: weight in the loss of the sum of a token's features."""
        auxiliary: Annotated[Float, Limits(ge=0)] = 0.03125
        """With `top_k`: weight of how well features that fire on no token of the global batch
        explain what the others have left over, so that they come to life; 0: none."""
        auxiliary_top_k: Annotated[Int, Limits(ge=1)] = 512
        """The strongest so many of those do it."""

        @model_validator(mode="after")
        def _one_way(self) -> Self:
            if (self.top_k is None) == (self.l1 is None):
                both = "both are given" if self.l1 is not None else "neither is given"
                raise ValueError(f"top_k and l1: {both}; features are made few by one of them")
            if self.top_k is not None and self.top_k > self.features:
                raise ValueError(f"top_k = {self.top_k}: there are {self.features} features")
            if self.l1 is not None and "auxiliary" in self.model_fields_set and self.auxiliary:
                raise ValueError("auxiliary: it goes with top_k; leave it out")
            return self

    name = "sparse_autoencoder"
    fields: Mapping[str, Field] = {"text": Field("text")}
    columns = (Column("inner", "uint8", each="token"),)
    metrics: Mapping[str, Direction] = {
        "loss": "lower",
        "explained": "higher",
        "l0": "lower",
        "dead_share": "lower",
    }
    smooths = False
    adds = predicts = tells_tokens = finds_features = True
    head = Head("AutoModel", over="hidden", each="token")

    dense = False
    """Whether all features of every token are wanted, not their sums alone."""

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self.explores = self.settings.top_k is not None and self.settings.auxiliary > 0

    @property
    def row_settings(self) -> dict[str, Any]:
        return {"packs_rows": self.packs, "task": self.name, "version": self.version}

    def encode(self, texts: pa.Array, targets: pa.Array | None, tools: Tools) -> Encoded:
        from dray.tasks.parts.encoding import encode_texts, with_columns

        encoded = encode_texts(texts, tools, surrounded=False)
        inner = (tools.word_starts[encoded.tokens] != SPECIAL).astype("uint8")
        return with_columns(encoded, inner=inner)

    def collate(self, table: pa.Table, draw: int = 0) -> Batch:
        """`input_ids` and `attention_mask` [rows, width], int64; `places` of the tokens that are
        learnt from, counted through the rows, int64: -1 fills them up to one of few sizes."""
        from dray.tasks.parts.columns import matrix, padded_tokens, real_rows

        batch = padded_tokens(table, self.pad_token_id)
        width = batch["input_ids"].shape[1]
        inner = (matrix(table, "inner")[:, :width] == 1) & real_rows(table)[:, None]
        places = (inner & (batch["attention_mask"] == 1)).flatten().nonzero()[:, 0]
        size = max(1, -(-len(places) // PLACES_MULTIPLE)) * PLACES_MULTIPLE
        filled = places.new_full((size,), -1)
        filled[: len(places)] = places
        return {**batch, "places": filled}

    def num_targets(self, batch: Batch) -> int:
        return int((batch["places"] >= 0).sum())

    def model_inputs(self, num_rows: int, num_tokens: int) -> Batch:
        import torch

        return {
            "input_ids": torch.zeros(num_rows, num_tokens, dtype=torch.int64),
            "places": torch.arange(num_rows * num_tokens),
        }

    def add_part(self, model: Any) -> None:
        from dray.tasks.parts.dictionary import add_dictionary

        add_dictionary(model, self.settings)

    def objective(self, model: Any, label_smoothing: float = 0.0) -> nn.Module:
        from dray.tasks.parts.dictionary import DictionaryLoss

        return DictionaryLoss(model, self.settings, counts=self.explores, dense=self.dense)

    def explored(self, batch: Batch, output: Output, means: Mapping[str, Tensor]) -> Batch:
        """`states` [places, width of the model] stand for the tokens then: the model need not
        compute them twice. `silent` [features], bool: those that fire on no token of the step."""
        return {
            "states": output["states"],
            "places": batch["places"],
            "silent": means["fired"] == 0,
        }

    def graph(self, model: Any) -> Graph:
        """How strongly each feature fires on each token of a text."""
        from dray.tasks.parts.graphs import logits_graph, make_graph

        loss = self.objective(model)
        tokens = logits_graph(self, model)
        return make_graph(loss, loss.features, "features", tokens.draw)  # type: ignore[arg-type]

    def new_metrics(self) -> TaskMetrics:
        from dray.tasks.parts.dictionary_metrics import DictionaryMetrics

        return DictionaryMetrics(self.settings.features)

    def predicting(self) -> Self:
        told = copy.copy(self)
        told.dense = True
        return told

    def activations(self, batch: Batch, output: Output) -> tuple[Tensor, Tensor]:
        real = batch["places"] >= 0
        return batch["places"][real], output["activations"][real]

    def predictions(self, batch: Batch, output: Output) -> list[Any]:
        """The strongest features of each text, with the token on which each fires most."""
        places, activations = self.activations(batch, output)
        width = batch["input_ids"].shape[1]
        found = []
        for row, ids in enumerate(batch["input_ids"].tolist()):
            own = places // width == row
            told = []
            if bool(own.any()):
                strongest, at = activations[own].max(dim=0)
                columns = places[own] % width
                values, features = strongest.topk(min(TOLD_FEATURES, len(strongest)))
                for value, feature in zip(values.tolist(), features.tolist(), strict=True):
                    if value > 0:
                        place = int(columns[at[feature]])
                        told.append(
                            {
                                "feature": feature,
                                "activation": value,
                                "token": self.token_names[ids[place]],
                                "place": place,
                            }
                        )
            found.append({"prediction": told})
        return found

    @property
    def remarks(self) -> list[str]:
        return [
            "transformers' AutoModel reads the model up to the block; the dictionary's tensors are "
            "those called dictionary.* in model.safetensors, and dray reads both"
        ]
