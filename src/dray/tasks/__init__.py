"""Tasks: what is learnt. One file a task; `task.py` says what each must offer, `build_task` finds
it by name.

A new task is one new file here, a branch in `build_task` and a name in the spec.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dray.tasks.task import IGNORED, Batch, Output, Task, TaskMetrics, Terms, TokenIds

if TYPE_CHECKING:
    from dray.spec import Spec

__all__ = ["IGNORED", "Batch", "Output", "Task", "TaskMetrics", "Terms", "TokenIds", "build_task"]


def build_task(spec: Spec, corpus: TokenIds) -> Task:
    """The spec's task on a corpus, of which its manifest is enough."""
    if spec.task == "causal_lm":
        from dray.tasks.causal_lm import CausalLM

        return CausalLM()
    from dray.tasks.sequence_classification import SequenceClassification

    return SequenceClassification(
        spec.model.num_labels or len(corpus.labels) or 2, corpus.pad_token_id
    )
