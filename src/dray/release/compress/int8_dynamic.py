"""Weights as int8 codes, and what goes into a product as 8-bit codes by its own range at each pass:
products of integers, about twice as fast on CPUs (docs/compress.md says which kernel and why).
Tables and a head over a vocabulary are packed alike, and computed in fp32.
"""

from __future__ import annotations

from dray.models.packed import Packing, pack_model
from dray.release.compress.method import Candidate, Method


class Int8Dynamic(Method):
    """Needs no rows: each pass measures its own inputs."""

    name = "int8_dynamic"
    packs = True

    def apply(self, candidate: Candidate) -> None:
        candidate.packed = pack_model(candidate.model, Packing("int8", activations="dynamic"))
