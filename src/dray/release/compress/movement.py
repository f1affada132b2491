"""Movement pruning: the model is trained on, and weights of the blocks' matrices that moved most
towards zero become zeros (Sanh, Wolf and Rush, 2020).

Their score of a weight is the sum of -gradient · weight over the steps; with what the optimiser
makes of a gradient in its place that is the sum of weight · change, which is half of what the
weight's square grew by. So two checkpoints tell it, and training is the ordinary one.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field as Limits
from torch import Tensor

from dray.models.groups import hidden_matrices
from dray.release.compress.method import Candidate, Method, Recovering
from dray.spec.sections import Float, Int


class Movement(Method):
    """Zeros for the weights that moved towards it."""

    name = "movement"

    class Settings(Recovering):
        """How many, after how much training."""

        share: Annotated[Float, Limits(gt=0, lt=1)] = 0.5
        """Of the weights of the blocks' matrices."""
        steps: Annotated[Int, Limits(ge=1)]
        """Of training, over which movement is summed."""

    def check(self, candidate: Candidate) -> None:
        hidden_matrices(candidate.model)

    def apply(self, candidate: Candidate) -> None:
        before = _hidden(candidate.model)
        before = {name: tensor.clone() for name, tensor in before.items()}
        trained = candidate.train(candidate, self.settings.steps, self.settings.rate)
        after = _hidden(trained)
        scores = {name: after[name].square() - before[name].square() for name in before}
        every = torch.cat([score.flatten() for score in scores.values()])
        num = int(len(every) * self.settings.share)
        gone = torch.zeros(len(every), dtype=torch.bool)
        gone[every.topk(num, largest=False).indices] = True
        parts = torch.split(gone, [score.numel() for score in scores.values()])
        with torch.no_grad():
            for tensor, part in zip(after.values(), parts, strict=True):
                tensor[part.view(tensor.shape)] = 0.0
        candidate.model, candidate.keeps_zeros = trained, True
        self.recover(candidate)


def _hidden(model: torch.nn.Module) -> dict[str, Tensor]:
    hidden = hidden_matrices(model)
    return {name: p.detach() for name, p in model.named_parameters() if id(p) in hidden}
