"""A reward model: a score of an answer to a prompt, learnt from pairs of which people preferred one
(Bradley and Terry's model: how likely that is depends on the difference of two scores).

Only differences mean anything: scores of two models, or of answers to two prompts, do not compare.
A prediction is the score of the answer that a record has as `chosen`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dray.spec import Direction, Field, Head
from dray.tasks.parts.answers import OTHER, PROMPT_TOKENS
from dray.tasks.rows import Column
from dray.tasks.task import Batch, Output, Task, TaskMetrics

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import nn

    from dray.tasks.rows import Encoded, Tools


class Reward(Task):
    """Scores of answers, the greater for the one that is preferred."""

    name = "reward"
    smooths = False
    predicts = True
    fields: Mapping[str, Field] = {
        name: Field("record", column=name) for name in ("prompt", "chosen", "rejected")
    }
    metrics: Mapping[str, Direction] = {"loss": "lower", "accuracy": "higher", "margin": "higher"}
    columns = (Column(PROMPT_TOKENS), Column(OTHER, varies=True))
    head = Head(
        "AutoModelForSequenceClassification",
        over="labels",
        each="row",
        problem_type="regression",
        sequences=2,
    )
    num_outputs = 1

    @property
    def row_settings(self) -> dict[str, Any]:
        return {"packs_rows": self.packs, "task": self.name, "version": self.version}

    @property
    def asked(self) -> Mapping[str, Field]:
        """A prompt and one answer."""
        return {name: self.fields[name] for name in ("prompt", "chosen")}

    def encode(self, texts: pa.Array, targets: pa.Array | None, tools: Tools) -> Encoded:
        from dray.tasks.parts.answers import count_answers, encode_answers

        found = encode_answers(texts, tools, count_answers(texts))
        return found.encoded(tools, [answers[-1] for answers in found.answers])

    def collate(self, table: pa.Table, draw: int = 0) -> Batch:
        """As `answers.answer_batch` makes them: each row's two answers behind its prompt."""
        from dray.tasks.parts.answers import answer_batch

        return answer_batch(table, self.pad_token_id)

    def num_targets(self, batch: Batch) -> int:
        return int(batch["real"].sum())

    def objective(self, model: Any, label_smoothing: float = 0.0) -> nn.Module:
        from dray.tasks.parts.answer_objectives import ScoreLoss

        return ScoreLoss(model)

    def new_metrics(self) -> TaskMetrics:
        from dray.tasks.parts.answer_metrics import PairMetrics

        return PairMetrics(tuple(self.metrics), "scores")

    def predictions(self, batch: Batch, output: Output) -> list[Any]:
        return [{"prediction": score} for score in output["scores"][:, 0].tolist()]
