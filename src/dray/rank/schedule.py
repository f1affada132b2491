"""The learning rate at a step: linear warm-up, then constant, cosine, linear or
warm-up–stable–decay.

Pure: a resumed run asks for any step and gets the same number. Steps count from 1; step 0 is the
untouched weights.
"""

from __future__ import annotations

import math

from dray.spec import Schedule


def learning_rate(schedule: Schedule, step: int, num_steps: int, peak: float) -> float:
    """The rate of the update that makes `step` (1 … num_steps), in the peak's unit.

    Warm-up rises linearly from 0 to the peak at `warmup_steps`. cosine and linear fall from there
    to `floor_share · peak` at `decay_steps` (none: num_steps) and stay; wsd holds the peak and
    falls linearly over the last `decay_steps` (none: a tenth). Past num_steps the last rate holds.
    With `cycle_steps` cosine falls anew after each so many steps (SGDR: Loshchilov and Hutter,
    2017).
    Raises ValueError below step 1.
    """
    if step < 1:
        raise ValueError(f"step {step}: steps count from 1")
    floor = schedule.floor_share * peak
    if schedule.name == "wsd":
        decay_steps = min(schedule.decay_steps or max(1, num_steps // 10), num_steps)
        begin, end = num_steps - decay_steps, num_steps
    else:
        begin, end = schedule.warmup_steps, schedule.decay_steps or num_steps
    rate = peak
    if schedule.cycle_steps is not None and step > begin:
        step_of_cycle = (step - begin - 1) % schedule.cycle_steps + 1
        share = (1 + math.cos(math.pi * step_of_cycle / schedule.cycle_steps)) / 2
        return floor + (peak - floor) * share
    if schedule.name != "constant" and step > begin:
        progress = min(1.0, (step - begin) / max(1, end - begin))
        share = (
            (1 + math.cos(math.pi * progress)) / 2 if schedule.name == "cosine" else 1 - progress
        )
        rate = floor + (peak - floor) * share
    # A decay that begins within the warm-up (a short wsd run) never lifts the rate above the
    # warm-up's line.
    return min(rate, peak * step / schedule.warmup_steps) if step < schedule.warmup_steps else rate
