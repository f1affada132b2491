"""Weights as int8 codes with a scale for each row of a matrix or table; a layer unpacks them for
each pass and computes in fp32. A quarter of the bytes, and no faster: `int8_dynamic` is.
"""

from __future__ import annotations

from dray.models.packed import Packing, pack_model
from dray.release.compress.method import Candidate, Method


class Int8(Method):
    """Weight-only, symmetric, per output."""

    name = "int8"
    packs = True

    def apply(self, candidate: Candidate) -> None:
        candidate.packed = pack_model(candidate.model, Packing("int8"))
