"""When a checkpoint is due, on a clock of the test's own."""

from __future__ import annotations

from dray.plan import FailureRate, SaveInterval, choose_interval
from dray.rank.cadence import TOLD_AGAIN, Cadence
from dray.runs.uptime import Uptime
from dray.spec import make_spec
from dray.spec.sections import Checkpoint

AUTO = Checkpoint.model_validate("auto")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def planned(num_ranks: int, held_seconds: float) -> SaveInterval:
    return choose_interval(
        held_seconds=held_seconds,
        commit_seconds=1.0,
        restart_seconds=20.0,
        failure_seconds=FailureRate().mean_seconds(num_ranks),
    )


def test_minutes_of_the_spec_are_kept_to() -> None:
    clock = Clock()
    cadence = Cadence(Checkpoint(every_minutes=2), None, Uptime(), 8, clock=clock)
    clock.now += 120
    assert not cadence.is_due(1000.0)
    clock.now += 1
    assert cadence.is_due(1000.0)
    assert cadence.news() is None
    cadence.learn(100.0, 100.0)
    assert (cadence.seconds, cadence.news()) == (120, None)


def test_before_a_save_was_measured_the_interval_is_short() -> None:
    cadence = Cadence(AUTO, planned(8, 3.0), Uptime(), 8, clock=Clock())
    assert cadence.seconds == 600
    told = cadence.news()
    assert told is not None
    assert not told["measured"]
    assert cadence.news() is None  # once
    assert Cadence(AUTO, None, Uptime(), 8, clock=Clock()).seconds == 60


def test_it_goes_by_the_median_of_what_saves_took() -> None:
    cadence = Cadence(AUTO, planned(10_000, 1.0), Uptime(), 10_000, clock=Clock())
    assert cadence.news() is not None
    for held in (4.0, 4.0, 400.0):  # the storage stalled once
        cadence.learn(held, 20.0)
    wanted = choose_interval(
        held_seconds=4.0,
        commit_seconds=20.0,
        restart_seconds=20.0,
        failure_seconds=FailureRate().mean_seconds(10_000),
    )
    assert cadence.seconds == wanted.seconds
    told = cadence.news()
    assert told is not None
    assert (told["seconds"], told["measured"], told["num_ranks"]) == (wanted.seconds, True, 10_000)


def test_a_small_change_is_not_told() -> None:
    cadence = Cadence(AUTO, None, Uptime(), 10_000, clock=Clock())
    cadence.learn(4.0, 1.0)
    first = cadence.news()
    assert first is not None
    cadence.learn(4.4, 1.0)
    assert 1 < cadence.seconds / first["seconds"] < TOLD_AGAIN
    assert cadence.news() is None


def test_failures_shorten_it_and_quiet_hours_lengthen_it() -> None:
    seen = {"held": (4.0,), "committed": (1.0,)}
    quiet = Cadence(AUTO, None, Uptime(**seen), 1000, clock=Clock())
    failing = Cadence(AUTO, None, Uptime(FailureRate(20, 9000.0), **seen), 1000, clock=Clock())
    assert failing.seconds < quiet.seconds / 3
    clock = Clock()
    cadence = Cadence(AUTO, None, Uptime(**seen), 1000, clock=clock)
    assert cadence.seconds == quiet.seconds
    clock.now += 100 * 3600
    cadence.learn(4.0, 1.0)
    assert cadence.seconds > 1.5 * quiet.seconds


def test_a_run_that_goes_on_keeps_what_it_measured_and_what_it_told() -> None:
    past = Uptime(FailureRate(1, 100.0), held=(4.0,), committed=(1.0,), restarts=(300.0,))
    first = Cadence(AUTO, None, past, 1000, clock=Clock())
    told = first.news()
    assert told is not None
    assert told["measured"]
    assert (told["failures"], told["restart_seconds"]) == (1, 300.0)
    again = Uptime(past.rate, past.held, past.committed, past.restarts, told=told["seconds"])
    assert Cadence(AUTO, None, again, 1000, clock=Clock()).news() is None


def test_the_short_form_and_the_long_one_are_one_spec() -> None:
    tree = {
        "name": "x",
        "data": {"train": "x.jsonl"},
        "model": {"architecture": "llama", "hidden_size": 8, "num_layers": 1, "num_heads": 1},
        "duration": {"steps": 1},
    }
    short = make_spec({**tree, "checkpoint": "auto"})
    assert short == make_spec({**tree, "checkpoint": {"every_minutes": "auto"}})
    assert make_spec(short.model_dump(mode="json")) == short
    assert short.model_dump()["checkpoint"]["every_minutes"] == "auto"
    assert make_spec(tree).model_dump()["checkpoint"]["every_minutes"] is None
