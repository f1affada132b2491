"""Bad numbers: what counts as a spike, and when skipping ends."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest

from dray.errors import BadNumbers, LossSpike
from dray.rank.numerics import Watch
from dray.spec import Numerics


def curve(steps: int, seed: int = 0) -> list[float]:
    """A loss that falls with noise, as losses do."""
    noise = np.random.default_rng(seed).normal(0, 0.05, steps)
    return [float(9 * (1 + step) ** -0.25 + wobble) for step, wobble in enumerate(noise)]


@pytest.mark.parametrize("seed", range(5))
def test_an_ordinary_curve_has_no_spike(seed: int):
    watch = Watch(Numerics())
    assert not any(watch.is_spike(loss) for loss in curve(2000, seed))


def test_a_leap_is_a_spike_and_so_is_the_next_one():
    watch = Watch(Numerics())
    for loss in curve(200):
        assert not watch.is_spike(loss)
    assert watch.is_spike(7.5)
    assert watch.is_spike(7.5)  # the first did not become usual
    assert not watch.is_spike(2.4)


def test_the_first_steps_are_not_judged_and_off_is_off():
    watch = Watch(Numerics())
    assert not any(watch.is_spike(loss) for loss in [9.0, 30.0, 9.0, 50.0])
    watch = Watch(Numerics(spike="off"))
    assert not any(watch.is_spike(loss) for loss in [*curve(100), 1e9])


def test_too_many_steps_without_an_update_in_a_row_end_the_run():
    watch = Watch(Numerics(max_skipped_steps=3))
    watch.skipped(1, "the loss is not finite", 0)
    watch.skipped(2, "the loss is not finite", 0)
    assert not watch.is_spike(5.0)  # an update in between begins the count anew
    watch.skipped(4, "the loss is not finite", 2)
    watch.skipped(5, "the loss is not finite", 2)
    with pytest.raises(
        BadNumbers, match=r"3 steps in a row up to step 6.*checkpoint, all finite, is of step 2"
    ):
        watch.skipped(6, "the loss is not finite", 2)


def test_a_spike_crosses_process_borders():
    error = pickle.loads(pickle.dumps(LossSpike(7, "the loss leapt")))
    assert (error.step, str(error)) == (7, "the loss leapt")
    assert math.isfinite(error.step)
