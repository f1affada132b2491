"""A hang is told from slowness by the heartbeats alone."""

from __future__ import annotations

from dray.doctor.hangs import Hang, agreement_seconds, find_hang
from dray.rank.pulse import Pulse
from dray.runs.records import Beat
from dray.spec import Watchdog

SETTINGS = Watchdog(
    silent_seconds=30,
    long_silence_seconds=90,
    stuck_seconds=60,
    stuck_steps=20,
    patient_seconds=600,
)


def beats(
    *ranks: tuple[str, int, float, float], is_long: bool = False
) -> dict[int, tuple[Beat, float]]:
    """(phase, step, seconds in it, seconds since the beat) of each rank."""
    return {
        rank: (Beat(rank, 1, step, phase, is_long, seconds, pid=1, host=""), age)
        for rank, (phase, step, seconds, age) in enumerate(ranks)
    }


def test_a_run_that_moves_is_left_alone():
    assert find_hang({}, 1.0, SETTINGS) is None
    assert find_hang(beats(("forward", 7, 0.4, 0.1), ("agree", 7, 0.2, 0.6)), 1.0, SETTINGS) is None
    # One rank waits for another that still computes: slow, not hung.
    assert find_hang(beats(("agree", 7, 100, 0.1), ("forward", 7, 20, 0.1)), 1.0, SETTINGS) is None


def test_a_rank_without_a_sign_of_life_is_named():
    hang = find_hang(
        beats(("backward", 7, 40, 0.2), ("forward", 7, 1.0, 31), ("backward", 7, 40, 0.3)),
        1.0,
        SETTINGS,
    )
    assert hang is not None
    assert hang.ranks == (1,)
    assert "rank 1" in hang.reason
    assert "forward of step 7" in hang.reason


def test_ranks_that_wait_for_each_other_name_the_one_behind():
    hang = find_hang(
        beats(("agree", 8, 61, 0), ("forward", 7, 90, 0), ("agree", 8, 65, 0)), 1.0, SETTINGS
    )
    assert isinstance(hang, Hang)
    assert hang.ranks == (1,)
    hang = find_hang(
        beats(("backward", 7, 61, 0), ("step", 7, 90, 0), ("backward", 7, 65, 0)), 1.0, SETTINGS
    )
    assert isinstance(hang, Hang)
    assert hang.ranks == (1,)


def test_patience_follows_the_measured_step_and_the_phase():
    standing = beats(("agree", 7, 100, 0), ("agree", 7, 100, 0))
    assert find_hang(standing, 1.0, SETTINGS) is not None
    assert find_hang(standing, 10.0, SETTINGS) is None  # 20 steps of 10 seconds have not passed
    assert find_hang(standing, None, SETTINGS) is None  # a first step may compile
    saving = beats(("save", 7, 100, 0), ("agree", 8, 100, 0))
    assert find_hang(saving, 1.0, SETTINGS) is None
    assert find_hang(beats(("data", 7, 601, 0), ("data", 7, 601, 0)), 1.0, SETTINGS) is not None


def test_what_is_known_to_be_long_may_be_silent_and_stand_for_long():
    pinning = beats(("save", 7, 1.0, 60), ("forward", 7, 1.0, 1.0), is_long=True)
    assert find_hang(pinning, 1.0, SETTINGS) is None
    stopped = find_hang(
        beats(("save", 7, 1.0, 91), ("forward", 7, 1.0, 1.0), is_long=True), 1.0, SETTINGS
    )
    assert stopped is not None
    assert stopped.ranks == (0,)
    compiling = beats(
        ("forward", 1, 200, 0), ("forward", 1, 200, 0), is_long=True
    )  # a usual step is known from before
    assert find_hang(compiling, 1.0, SETTINGS) is None


def test_a_long_phase_is_announced_before_it_holds_the_interpreter():
    pulse, announced = Pulse(0), list[Beat]()
    pulse.announce = lambda: announced.append(pulse.beat())
    pulse.enter("build", 0)
    pulse.enter("agree", 1)
    assert pulse.beat().long  # the first step compiles
    pulse.is_warm = True
    assert not pulse.beat().long
    pulse.enter("save")
    assert [(beat.phase, beat.long) for beat in announced] == [("build", True), ("save", True)]


def test_agreements_outlast_the_watchdogs_patience():
    assert agreement_seconds(SETTINGS) > SETTINGS.patient_seconds
