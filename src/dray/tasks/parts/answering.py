"""What tasks share whose models write a text for each document: `seq2seq` and `instruction`.

An answer is written where it is predicted, or evaluated to the letter; a validation measures its
loss alone, by teacher forcing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from dray.spec import Direction
from dray.tasks.task import Batch, Output, Task, TaskMetrics

if TYPE_CHECKING:
    from torch import nn


class AnsweringTask(Task):
    """A task with the settings `answer_tokens`, `beams` and `words`."""

    metrics: Mapping[str, Direction] = {
        "loss": "lower",
        "perplexity": "lower",
        "accuracy": "higher",
    }
    generates = predicts = True
    continues = False

    writes = False
    """Whether it writes answers besides measuring their loss."""

    def thorough(self) -> Self:
        return self.predicting()

    def predicting(self) -> Self:
        writing = copy.copy(self)
        writing.writes = True
        return writing

    def written_by(self, loss: nn.Module) -> nn.Module:
        """An objective, and what its model writes besides, where this writes."""
        from dray.tasks.parts.writing import WritingLoss

        if not self.writes:
            return loss
        return WritingLoss(
            loss,
            most_tokens=self.settings.answer_tokens,
            beams=self.settings.beams,
            pad_token_id=self.pad_token_id,
        )

    def new_metrics(self) -> TaskMetrics:
        from dray.tasks.parts.metrics import TokenMetrics
        from dray.tasks.parts.text_metrics import WrittenMetrics

        if self.writes and self.decode is not None:
            return WrittenMetrics(self.decode, self.settings.words)
        return TokenMetrics()

    def predictions(self, batch: Batch, output: Output) -> list[Any]:
        decode = self.decode or str
        return [{"prediction": decode(ids)} for ids in output["written"].tolist()]
