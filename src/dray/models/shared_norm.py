"""Batch normalisation over the rows of all ranks, so that a model does not depend on how many there
are.

torch normalises a rank's micro batch by itself: the same step on two workers would be another one
than on four. Here means and variances are of everything that is computed at once on all ranks. A
step is then the same on any number of workers where each of them computes its share at once, which
the plan sees to. torch's own SyncBatchNorm does not run on CPUs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SharedBatchNorm(_BatchNorm):
    """A layer of batch normalisation of any number of dimensions: [rows, channels, …].

    In training it waits for the other ranks twice, and twice in the backward pass: a sum for the
    means, another one for the variances around them, both in fp32.
    """

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return super().forward(values)
        shape = (1, -1, *[1] * (values.dim() - 2))
        others = [place for place in range(values.dim()) if place != 1]
        wide = values.float()
        count = torch.full((), values.numel() / values.shape[1], device=values.device)
        total = _sum_over_ranks(torch.cat([wide.sum(others), count[None]]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = wide - mean.view(shape)
        variance = _sum_over_ranks(centred.square().sum(others)) / count
        self._remember(mean.detach(), variance.detach(), count)
        found = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            found = found * self.weight.float().view(shape) + self.bias.float().view(shape)
        return found.to(values.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions will do."""

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running means and (unbiased) variances, by which rows are normalised when
        nothing is trained, towards those of this step."""
        if self.running_mean is None or self.running_var is None:
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:
            share = 1.0 / float(self.num_batches_tracked or 1)
        unbiased = variance * count / (count - 1).clamp(min=1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)


def share_batch_norms(model: nn.Module) -> int:
    """Have a model's layers of batch normalisation go over all ranks; parameters, buffers and names
    stay, and each is still one of its kind, by which architectures draw its weights. Returns how
    many there are."""
    found = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for module in found:
        if not isinstance(module, SharedBatchNorm):
            module.__class__ = _shared(type(module))  # type: ignore[arg-type]
    return len(found)


@cache
def _shared(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    return type(f"Shared{kind.__name__}", (SharedBatchNorm, kind), {})


def _sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over all ranks, through which gradients go back to each of them."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return values
    total: Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
    return total


class _Sum(torch.autograd.Function):
    """What every rank adds to goes into every rank's loss: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        total = upstream.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total
