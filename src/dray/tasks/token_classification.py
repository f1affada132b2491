"""A tag for each word: names in sentences, parts of speech. Rows are sentences, padded to the
longest of their batch.

A word's first token has its tag, and the others none. A sentence that a row has no room for goes on
in further rows, cut before a word at which no entity goes on; metrics put it together again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from dray.errors import SpecError
from dray.spec import Direction, Field, Head
from dray.spec.sections import Section
from dray.tasks.rows import IGNORED, Column
from dray.tasks.task import Batch, Corpus, Output, Task, TaskMetrics

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import nn

    from dray.tasks.rows import Encoded, Tools


class TokenClassification(Task):
    """Prediction of the tags of words."""

    class Settings(Section):
        """What tags are."""

        scheme: Literal["BIO", "BIOES", "none"] = "BIO"
        """How tags say where an entity begins and ends; `none`: they are of words alone, such as
        parts of speech."""

    name = "token_classification"
    predicts = True
    serves = ("extract",)
    fields: Mapping[str, Field] = {
        "tokens": Field("words", column="tokens", place=0),
        "tags": Field("tags", column="tags", place=-1),
    }
    columns = (
        Column("tag", each="token", names=True, pad=IGNORED),
        Column("document", "int64"),
        Column("window"),
    )
    head = Head("AutoModelForTokenClassification", over="labels", each="token")

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        words: dict[str, Direction] = {"loss": "lower", "accuracy": "higher"}
        entities: dict[str, Direction] = {
            "precision": "higher",
            "recall": "higher",
            "f1": "higher",
            "f1_macro": "higher",
        }
        self.metrics = words if self.settings.scheme == "none" else words | entities

    def check(self, corpus: Corpus) -> None:
        """Raises SpecError for tags of another form than the scheme's."""
        letters = {"BIO": "BI", "BIOES": "BIESLU"}.get(self.settings.scheme)
        if letters is None:
            return
        if odd := [tag for tag in corpus.labels if not re.fullmatch(rf"O|[{letters}]-.+", tag)]:
            raise SpecError(
                f"task.scheme = {self.settings.scheme}",
                f"the training documents have the tags {', '.join(odd[:8])}",
                f"tags are O, or one of {', '.join(letters)} with a hyphen and a type",
                "give scheme: BIOES, or none for tags of words alone",
            )

    @property
    def row_settings(self) -> dict[str, Any]:
        return {"packs_rows": self.packs, "task": self.name}

    def encode(self, texts: pa.Array, targets: pa.Array | None, tools: Tools) -> Encoded:
        from dray.tasks.parts.encoding import encode_tagged_words

        return encode_tagged_words(texts, targets, tools)

    def collate(self, table: pa.Table, draw: int = 0) -> Batch:
        """`input_ids`, `attention_mask` and `labels` [rows, width], and `document` and `window`
        [rows], all int64; what has no tag is IGNORED."""
        from dray.tasks.parts.columns import integer_column, matrix, padded_tokens, real_rows

        batch = padded_tokens(table, self.pad_token_id)
        labels = matrix(table, "tag")[:, : batch["input_ids"].shape[1]].contiguous()
        return {
            **batch,
            "labels": labels.masked_fill(~real_rows(table)[:, None], IGNORED),
            "document": integer_column(table, "document"),
            "window": integer_column(table, "window"),
        }

    def objective(self, model: Any, label_smoothing: float = 0.0) -> nn.Module:
        from dray.tasks.parts.objectives import LabelLoss

        return LabelLoss(model, label_smoothing)

    def predictions(self, batch: Batch, output: Output) -> list[Any]:
        guesses = output["scores"].argmax(dim=-1).cpu()
        return [
            [self.labels[tag] for tag in guess[labels != IGNORED].tolist()]
            for guess, labels in zip(guesses, batch["labels"], strict=True)
        ]

    def join_predictions(
        self, pieces: Sequence[Any], given: Mapping[str, Any], untold: Sequence[int] = ()
    ) -> dict[str, Any]:
        """A tag for each word, in its place; None for one that is nothing to the tokeniser."""
        tags: list[str | None] = [tag for piece in pieces for tag in piece]
        for place in sorted(untold):
            tags.insert(place, None)
        return {"prediction": tags, **({"num_untold": len(untold)} if untold else {})}

    def new_metrics(self) -> TaskMetrics:
        from dray.tasks.parts.metrics import EntityMetrics

        return EntityMetrics(self.labels, entities=self.settings.scheme != "none")
