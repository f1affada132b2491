"""Weights and activations in 8-bit floating point: products that only some GPUs have. On a machine
without one it is refused, since nothing could be measured.
"""

from __future__ import annotations

from dray.release.compress.method import Candidate, Method


class Fp8(Method):
    """Refused where there is no such GPU, and for now on those, too: it was not tried on one."""

    name = "fp8"
    packs = True

    def check(self, candidate: Candidate) -> None:
        raise self.refused(
            candidate,
            "fp8 is computed by GPUs of compute capability 8.9 and above alone, and this dray has "
            "not been tried there",
            "what is kept is measured first",
            "use int8_dynamic on CPUs, bf16 on GPUs",
        )
