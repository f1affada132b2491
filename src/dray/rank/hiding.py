"""Differentially private training of a rank: each row's gradient is shortened by itself, and the
sum gets noise (DP-SGD: Abadi et al. 2016).

A row at a time goes through the model, so that its gradient is its own whatever the architecture
does with a batch. The noise follows from a secret of the run, the step, the parameter and the place
in it: the same on any number of ranks and after any restart. Refuses models whose rows know of each
other.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from dray.errors import SpecError
from dray.rank.chance import Chance, draw_normal
from dray.rank.hooks import Hook, Part
from dray.rank.passes import Micro, Passes
from dray.spec import Privacy
from dray.tasks import Batch

_TINY = 1e-12


class PrivateRows(Passes):
    """The sum of the rows' gradients, each shortened to at most `max_grad_norm`: that of a row's
    mean loss over its targets."""

    def __init__(self, settings: Privacy, chance: Chance) -> None:
        self._most, self._chance = settings.max_grad_norm, chance

    def around(self, objective: Any) -> nn.Module:
        """The objective, which is asked a row at a time."""
        for name, module in objective.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise SpecError(
                    "privacy",
                    f"{name} normalises rows by each other",
                    "a row's gradient is of that row alone",
                    "choose an architecture without batch normalisation",
                )
        self._objective = objective
        around: nn.Module = objective
        return around

    def learn(self, micro: Micro, batch: Batch) -> Tensor:
        """Make the gradients. Returns the sum of the rows' mean losses."""
        parameters = [one for one in self._objective.parameters() if one.requires_grad]
        sums = [torch.zeros_like(one, dtype=torch.float32) for one in parameters]
        num_rows = len(next(iter(batch.values())))
        total = torch.zeros((), device=sums[0].device)
        for place in range(num_rows):
            row = {name: value[place : place + 1] for name, value in batch.items()}
            with self._chance.only(place):
                self._learn_row(row, parameters, sums, total)
        # What the engine is given has these sums as its gradient.
        surrogate = sum(
            (one.float() * own).sum() for one, own in zip(parameters, sums, strict=True)
        )
        micro.backward(surrogate, last=True)
        return total

    def _learn_row(
        self, row: Batch, parameters: Sequence[Tensor], sums: Sequence[Tensor], total: Tensor
    ) -> None:
        """Add what a row says to the sums and to the total loss. Its gradient is gone afterwards:
        two of them at once would be memory that nobody planned."""
        terms, _ = self._objective(row)
        loss, count = terms["loss"]
        if not int(count):
            return
        mean = loss / count
        total += mean.detach()
        self._add(sums, torch.autograd.grad(mean, parameters, allow_unused=True))

    def _add(self, sums: Sequence[Tensor], found: Sequence[Tensor | None]) -> None:
        """Add a row's gradient, shortened. One that is not finite adds nothing, as if it were 0."""
        norm = float(get_total_norm([one.float() for one in found if one is not None]))
        if not math.isfinite(norm):
            return
        scale = min(1.0, self._most / max(norm, _TINY))
        for own, one in zip(sums, found, strict=True):
            if one is not None:
                own.add_(one, alpha=scale)


class PrivateNoise(Hook):
    """Normal noise on the mean gradient of a batch: of the deviation noise_multiplier ·
    max_grad_norm over the rows of a batch."""

    def __init__(self, settings: Privacy, kept: Any, global_rows: int) -> None:
        self._key = bytes.fromhex(kept["key"])
        self._deviation = float(kept["noise_multiplier"]) * settings.max_grad_norm / global_rows

    def before_update(self, parts: Sequence[Part], step: int) -> None:
        """Add it."""
        for part in parts:
            what = struct.pack("<Q", step) + part.name.encode()
            drawn = hashlib.blake2b(what, key=self._key, digest_size=16).digest()
            keys = struct.unpack("<4i", drawn)
            draw_normal(part.gradient, keys, first=part.start, scale=self._deviation)
