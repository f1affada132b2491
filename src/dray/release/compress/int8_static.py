"""As `int8_dynamic`, but the range of what goes into each product is measured once, on rows of the
corpus, and not at each pass. What lies beyond it is cut off.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field as Limits
from torch import Tensor, nn

from dray.models.packed import Packed, Packing, matrices, pack_model
from dray.release.compress.calibrating import calibration_batches
from dray.release.compress.method import Candidate, Method
from dray.spec.sections import Float, Int, Section


class Int8Static(Method):
    """Weights by rows, inputs by one range a product."""

    name = "int8_static"
    packs = True

    class Settings(Section):
        """What the ranges are measured on."""

        rows: Annotated[Int, Limits(ge=1)] = 128
        """Rows of the corpus."""
        spread: Annotated[Float, Limits(gt=0, le=1)] = 1.0
        """Share of the measured range that the codes cover."""

    def apply(self, candidate: Candidate) -> None:
        model = candidate.model
        packed = pack_model(model, Packing("int8", activations="static"))
        places = {
            name: module
            for name, module in matrices(model).items()
            if packed[name].packing.activations == "static"
        }
        ranges = self._ranges(candidate, places)
        for name, (low, high) in ranges.items():
            one = packed[name]
            own = replace(
                one.packing, low=low * self.settings.spread, high=high * self.settings.spread
            )
            packed[name] = Packed(own, one.shape, one.states)
        for name in places.keys() - ranges.keys():  # no row goes through it
            one = packed[name]
            own = replace(one.packing, activations="dynamic")
            packed[name] = Packed(own, one.shape, one.states)
        candidate.packed = packed

    def _ranges(
        self, candidate: Candidate, places: dict[str, nn.Module]
    ) -> dict[str, tuple[float, float]]:
        """The least and the greatest that goes into each product."""
        found: dict[str, tuple[float, float]] = {}

        def look(name: str, value: Tensor) -> None:
            low, high = found.get(name, (0.0, 0.0))
            found[name] = min(low, float(value.min())), max(high, float(value.max()))

        handles = [
            module.register_forward_pre_hook(lambda _, given, name=name: look(name, given[0]))
            for name, module in places.items()
        ]
        objective = candidate.trained.task.objective(candidate.model).eval()
        try:
            with torch.no_grad():
                for batch in calibration_batches(candidate, self.settings.rows):
                    objective(batch)
        finally:
            for handle in handles:
                handle.remove()
        return found
