"""What a row costs where it is no text: an image, a sound. Measured on the architecture itself by
`dray.models.row_cost`; a plan needs nothing else of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowCost:
    """The work and the memory of one row of `tokens` tokens, whatever a token is to the task."""

    tokens: int
    flops: float
    """Forward and backward."""
    elements: int
    """Numbers that the forward pass keeps for the backward pass."""
    largest: int
    """Numbers in the largest tensor of these."""
    shares_statistics: bool
    """Whether rows that are computed at once look at each other: batch normalisation."""

    def positions(self, active_parameters: int) -> int:
        """How many tokens of a transformer a row weighs as much as: each multiplies every weight
        once, as a row does at each place of an image, say."""
        return max(1, round(self.flops / (6.0 * max(1, active_parameters))))
