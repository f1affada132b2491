"""Bad numbers: losses that are not finite, and losses that leap; pure bookkeeping that every rank
does alike.

What is fed in is agreed by all ranks, so all of them decide the same. Nothing here touches a model.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from dray.errors import BadNumbers
from dray.spec import Numerics

WINDOW_STEPS = 64
FEWEST_RECENT_STEPS = 16
MAD_TO_SIGMA = 1.4826  # of a normal distribution (Rousseeuw and Croux, 1993)


class Watch:
    """Follows the steps of one attempt."""

    def __init__(self, settings: Numerics) -> None:
        self._settings = settings
        self._recent: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._skipped_in_a_row = 0

    def skipped(self, step: int, reason: str, last_sound_step: int) -> None:
        """Count a step without an update. Raises BadNumbers after too many in a row."""
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self._settings.max_skipped_steps:
            raise BadNumbers(
                f"{self._skipped_in_a_row} steps in a row up to step {step} made no update: "
                f"{reason}; the last checkpoint, all finite, is of step {last_sound_step}"
            )

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss lies far above the recent ones: `spike_sigmas` robust standard
        deviations.

        The deviation is 1.4826 × the median distance from the median, at least 2 % of it: a loss
        that hardly moves has no deviation to speak of.
        """
        self._skipped_in_a_row = 0
        recent = list(self._recent)
        if len(recent) >= FEWEST_RECENT_STEPS and self._settings.spike != "off":
            middle = median(recent)
            sigma = max(
                MAD_TO_SIGMA * median(abs(value - middle) for value in recent), 0.02 * abs(middle)
            )
            if loss > middle + self._settings.spike_sigmas * sigma:
                # It does not enter the window: a second one is measured like the first.
                return True
        if math.isfinite(loss):
            self._recent.append(loss)
        return False
