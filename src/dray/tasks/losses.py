"""The summed cross entropy that the tasks share, with its softmax in fp32 whatever the precision of the logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dray.tasks.task import IGNORED


def summed_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of `logits` [n, classes] against `labels` [n], summed over labels that are not IGNORED, in fp32.

    The probability mass `label_smoothing` is spread over all classes. Half-precision logits are widened inside the
    softmax, so that their copy in fp32 is never kept for the backward pass.
    """
    log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    loss = F.nll_loss(log_probabilities, labels, ignore_index=IGNORED, reduction="sum")
    if not label_smoothing:
        return loss
    even = -(log_probabilities.mean(dim=-1) * (labels != IGNORED)).sum()
    return (1.0 - label_smoothing) * loss + label_smoothing * even
