"""Weights as int4 codes, two a byte, with a scale for each group of a row. It saves bytes, not
time: a layer unpacks its weight for each pass. torch's own int4 kernel for CPUs is private, and
bitsandbytes' layout is another one, so neither is used. Tables keep int8: a row that is looked up
is read alone, and its error is not averaged.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field as Limits
from torch import nn

from dray.models.packed import Packing, matrices, pack_model
from dray.release.compress.method import Candidate, Method
from dray.spec.sections import Int, Section


class Int4(Method):
    """Weight-only, symmetric, by groups."""

    name = "int4"
    packs = True

    class Settings(Section):
        """How fine."""

        group: Annotated[Int, Limits(ge=8, le=1024)] = 32
        """Weights of a row that share a scale."""

    def apply(self, candidate: Candidate) -> None:
        model = candidate.model
        tables = {n for n, m in matrices(model).items() if isinstance(m, nn.Embedding)}
        head = model.get_output_embeddings()
        tables |= {
            name for name, p in model.named_parameters() if head is not None and p is head.weight
        }
        products = set(matrices(model)) - tables
        candidate.packed = pack_model(model, Packing("int4", group=self.settings.group), products)
        candidate.packed |= pack_model(model, Packing("int8"), tables)
