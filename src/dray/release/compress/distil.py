"""Distillation: what is left of a model learns from what the run that it was made from makes of the
same rows, beside the labels. The teacher computes its outputs as they are needed, on each rank.

Which student: whatever the methods before it have left, such as `layers:keep=3`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field as Limits

from dray.errors import SpecError
from dray.release.compress.method import Candidate, Method
from dray.spec.sections import Float, Int, Section


class Distil(Method):
    """Training with a teacher."""

    name = "distil"

    class Settings(Section):
        """How long, and what is learnt of the teacher."""

        steps: Annotated[Int, Limits(ge=1)]
        """Of training."""
        rate: Annotated[Float, Limits(gt=0)] | None = None
        """Greatest learning rate; none: half of the run's own."""
        share: Annotated[Float, Limits(ge=0, le=1)] = 0.5
        """Of the loss that the teacher's logits are; the rest is the task's own."""
        temperature: Annotated[Float, Limits(gt=0)] = 2.0
        """Both sides' logits are divided by it."""
        hidden: Annotated[Float, Limits(ge=0)] = 0.0
        """Weight of the squared error of the blocks' outputs, beside the logits."""
        attention: Annotated[Float, Limits(ge=0)] = 0.0
        """Weight of the squared error of the attentions' probabilities."""

    def check(self, candidate: Candidate) -> None:
        kind = candidate.trained.task.objective(candidate.model)
        if not hasattr(kind, "taught"):
            raise SpecError(
                f"--with {self.name}",
                f"{candidate.trained.task.name} has no logits over classes or tokens to learn from",
                "a student learns a teacher's distribution",
                "use recover=STEPS",
            )

    def apply(self, candidate: Candidate) -> None:
        settings = self.settings
        taught = settings.model_dump(include={"share", "temperature", "hidden", "attention"})
        candidate.model = candidate.train(candidate, settings.steps, settings.rate, distil=taught)
