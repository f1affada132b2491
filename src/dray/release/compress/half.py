"""Weights in half precision, stored and held: half of fp32's bytes. Layers compute in fp32 from
them, since CPUs without units for bf16 are many times slower in it.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from dray.models.packed import Packing, pack, pack_model
from dray.release.compress.method import Candidate, Method


class _Half(Method):
    packs = True
    name: ClassVar[Literal["bf16", "fp16"]]

    def apply(self, candidate: Candidate) -> None:
        packing = Packing(self.name)
        candidate.packed = pack_model(candidate.model, packing)
        for name, parameter in candidate.model.named_parameters():
            if parameter.dim() > 1 and name not in candidate.packed:
                candidate.packed[name] = pack(parameter, packing)


class Bf16(_Half):
    """Eight bits of precision, fp32's range."""

    name = "bf16"


class Fp16(_Half):
    """Eleven bits of precision, to 65,504: a weight beyond that is refused."""

    name = "fp16"

    def check(self, candidate: Candidate) -> None:
        most = torch.finfo(torch.float16).max
        for name, parameter in candidate.model.named_parameters():
            if parameter.detach().abs().amax() > most:
                raise self.refused(
                    candidate,
                    f"{name} has weights beyond {most:,.0f}",
                    "fp16 ends there",
                    "use bf16",
                )
