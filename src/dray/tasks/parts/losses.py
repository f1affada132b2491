"""The summed cross entropy that the tasks share, with its softmax in fp32 whatever the precision of
the logits.

Log-probabilities of a large vocabulary are never held as a whole: rows are taken a chunk at a time,
and the gradient of a chunk is made while its softmax is there, so that nothing of it is kept for
the backward pass and nothing is computed twice. What fits into one chunk takes torch's own way.

On a GPU a chunk's softmax and gradient are compiled into kernels that read and write its logits in
their own precision, and a vocabulary is widened to a multiple that the matrix units take:
docs/benchmarks.md compares that with Liger's fused loss.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._triton import has_triton

from dray.plan.machine import has_compiler
from dray.plan.memory import loss_chunk_bytes
from dray.tasks.rows import IGNORED

_CLASSES_MULTIPLE = 64


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


_AS_IT_IS = LogitRule()


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
    """Slices of rows whose fp32 logits stay within the bound; even ones, since each size is
    compiled by itself."""
    most = max(1, loss_chunk_bytes(device.type == "cuda") // (4 * num_classes))
    rows = max(1, -(-num_rows // -(-num_rows // most)))
    return (slice(start, start + rows) for start in range(0, num_rows, rows))


def _chunk_loss(  # noqa: PLR0917 - as a compiled function takes them
    product: Tensor,
    labels: Tensor,
    label_smoothing: float,
    rule: LogitRule,
    num_classes: int,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """The summed loss of some rows (fp64), and its gradient in the product (in its precision; zero
    in columns beyond the classes)."""
    logits = rule.logits(product[:, :num_classes])
    log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    counts = labels != IGNORED
    targets = labels.masked_fill(~counts, 0)[:, None]
    losses = -log_probabilities.gather(1, targets)[:, 0]
    if label_smoothing:
        losses = (1.0 - label_smoothing) * losses - label_smoothing * log_probabilities.mean(dim=-1)
    loss = (losses * counts).sum(dtype=torch.float64)
    if not wants_gradient:
        return loss, None
    gradient = log_probabilities.exp_()
    if label_smoothing:
        gradient.sub_(label_smoothing / num_classes)
    if product.is_cuda:  # compiled: one pass, where a scatter would write the whole once more
        hit = torch.arange(num_classes, device=product.device) == targets
        gradient = torch.where(hit, gradient + (label_smoothing - 1.0), gradient)
    else:
        gradient.scatter_add_(1, targets, gradient.new_full(targets.shape, label_smoothing - 1.0))
    gradient = rule.through(gradient.mul_(counts[:, None]), logits).to(product.dtype)
    missing = product.shape[1] - num_classes
    return loss, F.pad(gradient, (0, missing)) if missing else gradient


def _chunk_loss_on(device: torch.device) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`_chunk_loss`, compiled for a GPU; within a model that is compiled it is part of that."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return _chunk_loss
    return _compiled_chunk_loss()


@functools.cache
def _compiled_chunk_loss() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Left as it is where there is nothing that compiles: slower, and no less right."""
    if not (has_compiler() and has_triton()):
        return _chunk_loss
    compiled: Callable[..., tuple[Tensor, Tensor | None]] = torch.compile(_chunk_loss)
    return compiled


def _widened(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The projection with zeros for classes that there are not, so that matrix units can take it:
    on an H200 the loss of GPT-2's 50,257 tokens takes three times as long without."""
    missing = -weight.shape[0] % _CLASSES_MULTIPLE
    if not (missing and weight.is_cuda):
        return weight, bias
    return F.pad(weight, (0, 0, 0, missing)), None if bias is None else F.pad(bias, (0, missing))


class _FromLogits(torch.autograd.Function):
    """The loss of logits that are there as a whole; what it keeps is their gradient, in their own
    precision."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        wants = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if wants else None
        loss = torch.zeros((), dtype=torch.float64, device=logits.device)
        for rows in _chunks(logits.shape[0], logits.shape[1], logits.device):
            part, part_gradient = _chunk_loss_on(logits.device)(
                logits[rows], labels[rows], label_smoothing, _AS_IT_IS, logits.shape[1], wants
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
        wants_hidden, wants_weight, wants_bias = wants = ctx.needs_input_grad[:3]
        num_classes = weight.shape[0]
        wide, wide_bias = _widened(weight, bias)
        for_hidden = torch.empty_like(hidden) if wants_hidden else None
        for_weight = torch.zeros_like(wide, dtype=torch.float32) if wants_weight else None
        for_bias = (
            torch.zeros_like(wide_bias, dtype=torch.float32)
            if wants_bias and wide_bias is not None
            else None
        )
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for rows in _chunks(hidden.shape[0], num_classes, hidden.device):
            product = F.linear(hidden[rows], wide, wide_bias)
            part, gradient = _chunk_loss_on(hidden.device)(
                product, labels[rows], label_smoothing, rule, num_classes, any(wants)
            )
            loss += part
            if gradient is None:
                continue
            if for_hidden is not None:
                torch.mm(gradient, wide, out=for_hidden[rows])
            if for_weight is not None:
                _add_product(for_weight, gradient.t(), hidden[rows])
            if for_bias is not None:
                for_bias += gradient.sum(dim=0, dtype=torch.float32)
            del product, gradient  # or they would be there beside the next chunk's
        for_weight, for_bias = (
            None if whole is None else whole[:num_classes] for whole in (for_weight, for_bias)
        )
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
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left @ right)


def rows_at_once(num_tokens: int, num_classes: int, device: torch.device) -> int:
    """How many rows of `num_tokens` tokens may have their logits at the same time where nothing is
    learnt."""
    return max(
        1, math.floor(16 * loss_chunk_bytes(device.type == "cuda") / (4 * num_tokens * num_classes))
    )
