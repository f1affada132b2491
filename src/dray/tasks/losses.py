"""The summed cross entropy that the tasks share, with its softmax in fp32 whatever the precision of
the logits.

Log-probabilities of a large vocabulary are never held as a whole: rows are taken a chunk at a time,
and the gradient of a chunk is made while its softmax is there, so that nothing of it is kept for
the backward pass and nothing is computed twice. What fits into one chunk takes torch's own way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dray.plan.memory import loss_chunk_bytes
from dray.tasks.task import IGNORED


@dataclass(frozen=True)
class LogitRule:
    """How an architecture makes logits out of its head's product: times a scale, then squashed
    below a cap."""

    scale: float = 1.0
    cap: float | None = None

    def logits(self, product: Tensor) -> Tensor:
        """The logits; a product that stays as it is is not copied."""
        if self.scale != 1.0:
            product = product * self.scale
        return product if self.cap is None else self.cap * torch.tanh(product / self.cap)

    def through(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The product's gradient (fp32, in place) from that of the logits."""
        if self.cap is not None:
            gradient.mul_(1.0 - (logits.float() / self.cap).square_())
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


def summed_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of `logits` [n, classes] against `labels` [n], summed over labels that are not
    IGNORED, in fp32.

    The probability mass `label_smoothing` is spread over all classes.
    """
    if logits.numel() * 4 <= loss_chunk_bytes(logits.device.type == "cuda"):
        return _whole(logits, labels, label_smoothing)
    return _applied(_FromLogits, logits, labels, label_smoothing)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    rule: LogitRule | None = None,
) -> Tensor:
    """`summed_cross_entropy` of the logits `rule(hidden · weightᵀ + bias)`, of which there is never
    more than a chunk.

    `hidden` [n, width], `weight` [classes, width], `labels` [n].
    """
    rule = rule or LogitRule()
    if hidden.shape[0] * weight.shape[0] * 4 <= loss_chunk_bytes(hidden.device.type == "cuda"):
        return _whole(rule.logits(F.linear(hidden, weight, bias)), labels, label_smoothing)
    fused = _liger(hidden, label_smoothing, rule)
    if fused is not None:
        # Liger knows no scale; of a product it is as well a scale of one factor.
        scaled = hidden if rule.scale == 1.0 else hidden * rule.scale
        loss: Tensor = fused(weight, scaled, labels, None if bias is None else bias * rule.scale)
        return loss
    return _applied(_FromHidden, hidden, weight, bias, labels, label_smoothing, rule)


@torch.no_grad()
def count_correct(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """How many labels have the largest logit; rules of architectures keep the order."""
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    for rows in _chunks(hidden.shape[0], weight.shape[0], hidden.device):
        correct += (F.linear(hidden[rows], weight, bias).argmax(dim=-1) == labels[rows]).sum()
    return correct


def _applied(function: Any, *arguments: Any) -> Tensor:
    loss: Tensor = function.apply(*arguments)
    return loss


def _whole(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Half-precision logits are widened inside the softmax: their copy in fp32 is not kept for the
    backward pass."""
    log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    loss = F.nll_loss(log_probabilities, labels, ignore_index=IGNORED, reduction="sum")
    if not label_smoothing:
        return loss
    even = -(log_probabilities.mean(dim=-1) * (labels != IGNORED)).sum()
    return (1.0 - label_smoothing) * loss + label_smoothing * even


def _chunks(num_rows: int, num_classes: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows whose fp32 logits stay within the bound."""
    rows = max(1, loss_chunk_bytes(device.type == "cuda") // (4 * num_classes))
    return (slice(start, start + rows) for start in range(0, num_rows, rows))


def _chunk_loss(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float,
    *,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """The summed loss of some rows (fp64), and its gradient in the logits (fp32), which takes their
    softmax's place."""
    log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    counts = labels != IGNORED
    targets = labels.masked_fill(~counts, 0)[:, None]
    hits = log_probabilities.gather(1, targets)[:, 0]
    losses = -hits
    if label_smoothing:
        losses = (1.0 - label_smoothing) * losses - label_smoothing * log_probabilities.mean(dim=-1)
    loss = (losses * counts).sum(dtype=torch.float64)
    if not wants_gradient:
        return loss, None
    gradient = log_probabilities.exp_()
    if label_smoothing:
        gradient.sub_(label_smoothing / logits.shape[-1])
    gradient.scatter_add_(1, targets, gradient.new_full(targets.shape, label_smoothing - 1.0))
    return loss, gradient.mul_(counts[:, None])


class _FromLogits(torch.autograd.Function):
    """The loss of logits that are there as a whole; what it keeps is their gradient, in their own
    precision."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        wants = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if wants else None
        loss = torch.zeros((), dtype=torch.float64, device=logits.device)
        for rows in _chunks(logits.shape[0], logits.shape[1], logits.device):
            part, part_gradient = _chunk_loss(
                logits[rows], labels[rows], label_smoothing, wants_gradient=wants
            )
            loss += part
            if gradient is not None and part_gradient is not None:
                gradient[rows] = part_gradient
        ctx.save_for_backward(gradient)
        return loss.float()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else gradient.mul_(upstream.to(gradient.dtype)), None, None


class _FromHidden(torch.autograd.Function):
    """The loss of a projection, chunk by chunk; what it keeps are the gradients of its inputs.

    The weight's gradient adds up in fp32: a sum of many chunks in half precision would lose the
    small ones.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - as autograd passes them
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        label_smoothing: float,
        rule: LogitRule,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        for_hidden = torch.empty_like(hidden) if wants_hidden else None
        for_weight = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            if wants_weight
            else None
        )
        for_bias = (
            torch.zeros(weight.shape[:1], dtype=torch.float32, device=weight.device)
            if wants_bias
            else None
        )
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for rows in _chunks(hidden.shape[0], weight.shape[0], hidden.device):
            logits = rule.logits(F.linear(hidden[rows], weight, bias))
            part, gradient = _chunk_loss(
                logits,
                labels[rows],
                label_smoothing,
                wants_gradient=wants_hidden or wants_weight or wants_bias,
            )
            loss += part
            if gradient is None:
                continue
            gradient = rule.through(gradient, logits).to(hidden.dtype)
            if for_hidden is not None:
                torch.mm(gradient, weight, out=for_hidden[rows])
            if for_weight is not None:
                _add_product(for_weight, gradient.t(), hidden[rows])
            if for_bias is not None:
                for_bias += gradient.sum(dim=0, dtype=torch.float32)
        ctx.save_for_backward(for_hidden, for_weight, for_bias)
        ctx.dtype = weight.dtype
        return loss.float()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second pass backward over the same loss is refused by autograd, as its tensors
        # have changed.
        scaled = [
            None if whole is None else whole.mul_(upstream.to(whole.dtype)).to(ctx.dtype)
            for whole in ctx.saved_tensors
        ]
        return (*scaled, None, None, None)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (fp32) += left · right."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _liger(hidden: Tensor, label_smoothing: float, rule: LogitRule) -> Any:
    """Liger's fused linear cross entropy, on CUDA where it is installed (it needs Triton) and a
    gradient is wanted."""
    if hidden.device.type != "cuda" or not torch.is_grad_enabled():
        return None
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
        reduction="sum",
        softcap=rule.cap,
        accum_dtype=torch.float32,
    )


def rows_at_once(num_tokens: int, num_classes: int, device: torch.device) -> int:
    """How many rows of `num_tokens` tokens may have their logits at the same time where nothing is
    learnt."""
    return max(
        1, math.floor(16 * loss_chunk_bytes(device.type == "cuda") / (4 * num_tokens * num_classes))
    )
