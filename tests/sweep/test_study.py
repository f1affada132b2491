"""The state of a sweep, by its events: what comes next, what stops, what was best, its cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dray.spec import make_spec
from dray.sweep.events import Begun, Ended, Event, Reported, from_json, to_json
from dray.sweep.policies import make_policy
from dray.sweep.space import make_space
from dray.sweep.study import Scale, Study
from tiny import tiny_tree

TREE = tiny_tree(Path("corpus"))
TOTAL = 27
Loss = Callable[[Begun, int], float | None]


def study_of(space: dict[str, Any], mode: str = "min", total: int = TOTAL) -> Study:
    made = make_space(
        {"parameters": {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}}, **space}
    )
    grace = made.scheduler.grace_steps or 3
    policy = make_policy(made.scheduler, mode, total, grace, made.search.seed)
    counts_steps = made.scheduler.name == "pbt"
    scale = Scale(mode, total, 8, seed=5, gpus=2, workers=2, counts_steps=counts_steps)
    return Study(made, TREE, make_spec(TREE), scale, policy)


def play(
    study: Study, loss: Loss, *, every: int = 3, events: list[Event] | None = None
) -> list[Event]:
    """Run trials one after the other, as a driver would, with losses by rule."""
    events = [] if events is None else events

    def record(event: Event) -> None:
        events.append(event)
        study.apply(event)

    while (event := study.next()) is not None:
        record(event)
        if not isinstance(event, Begun):
            continue
        trial = study.trials[event.trial]
        begin = max(trial.step, event.parent_step)
        goal, step = event.until_step or TOTAL, begin
        for step in range(begin + 1, goal + 1):
            if step % every == 0 or step == goal:
                value = loss(event, step)
                report = Reported(event.trial, step, float(step), value, step * 512, step * 0.5)
                if study.counts(report):
                    record(report)
            if study.verdict(event.trial):
                break
        verdict = study.verdict(event.trial)
        status = verdict or ("completed" if goal == TOTAL else "stopped")
        record(Ended(event.trial, status, step, step * 512, step * 0.5))
    return events


def by_rate(begun: Begun, step: int) -> float:
    """Best at 1e-3; falls with the steps."""
    return abs(math.log10(begun.parameters["optimizer.learning_rate"]) + 3) + 10 / (step + 1)


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median", "none"])
def test_a_sweep_replayed_from_any_event_goes_on_the_same(scheduler: str) -> None:
    """Killed after each event in turn: what was recorded decides alone."""
    space = {"budget": {"trials": 12}, "scheduler": {"name": scheduler, "grace_steps": 3}}
    whole = play(study_of(space), by_rate)
    assert sum(isinstance(event, Begun) for event in whole) == 12
    for cut in range(0, len(whole), 7):
        study = study_of(space)
        for event in whole[:cut]:
            study.apply(event)
        study.interrupt()
        rest = play(study, by_rate, events=list(whole[:cut]))
        reports = [event for event in rest if isinstance(event, Reported)]
        assert reports == [event for event in whole if isinstance(event, Reported)], cut
        assert len(study.trials) == 12


@pytest.mark.parametrize(
    ("scheduler", "most"), [("asha", 0.6), ("hyperband", 0.9), ("median", 0.9)]
)
def test_what_falls_behind_is_stopped(scheduler: str, most: float) -> None:
    study = study_of({"budget": {"trials": 16}, "scheduler": {"name": scheduler, "grace_steps": 3}})
    play(study, by_rate)
    statuses = [trial.status for trial in study.trials.values()]
    assert {"pruned", "completed"} == set(statuses)
    assert sum(trial.step for trial in study.trials.values()) < most * 16 * TOTAL
    best = study.best()
    assert best is not None
    assert best.is_complete
    assert best.value == min(
        report.value for trial in study.trials.values() for report in trial.reports
    )


def test_higher_is_better_where_the_metric_says_so() -> None:
    study = study_of({"budget": {"trials": 12}}, mode="max")
    play(study, lambda begun, step: -by_rate(begun, step))
    best = study.best()
    assert best is not None
    rates = [float(trial.parameters["optimizer.learning_rate"]) for trial in study.trials.values()]
    chosen = float(best.trial.parameters["optimizer.learning_rate"])
    assert abs(math.log10(chosen) + 3) == min(abs(math.log10(rate) + 3) for rate in rates)


def test_a_loss_that_is_not_finite_is_a_bad_result_and_no_failure() -> None:
    study = study_of({"budget": {"trials": 6}, "scheduler": "none"})
    play(study, lambda begun, step: None if begun.trial == 2 and step > 5 else by_rate(begun, step))
    assert study.trials[2].status == "diverged"
    assert [trial.status for trial in study.trials.values()].count("completed") == 5
    assert study.best() is not None
    assert study.best().trial.number != 2  # type: ignore[union-attr]


def test_a_failure_is_tried_again_and_then_recorded() -> None:
    study = study_of({"budget": {"trials": 2}, "retries": 1, "scheduler": "none"})
    first = study.next()
    assert isinstance(first, Begun)
    study.apply(first)
    study.apply(Ended(1, "failed", 4, cause="killed", reason="gone"))
    again = study.next()
    assert isinstance(again, Begun)
    assert (again.trial, again.start, again.parameters) == (1, 2, first.parameters)
    study.apply(again)
    study.apply(Ended(1, "failed", 4, cause="killed", reason="gone"))
    other = study.next()
    assert isinstance(other, Begun)
    assert other.trial == 2
    assert study.trials[1].status == "failed"


def test_what_comes_back_whoever_tries_is_not_tried_again() -> None:
    study = study_of({"budget": {"trials": 1}, "retries": 3, "scheduler": "none"})
    begun = study.next()
    assert isinstance(begun, Begun)
    study.apply(begun)
    study.apply(Ended(1, "failed", cause="configuration", reason="does not fit"))
    assert study.next() is None


def test_too_many_losses_by_one_cause_end_it() -> None:
    study = study_of(
        {"budget": {"trials": 9}, "retries": 0, "max_failures": 3, "scheduler": "none"}
    )
    while (event := study.next()) is not None:
        study.apply(event)
        study.apply(Ended(event.trial, "failed", cause="host_memory", reason="killed"))
    assert len(study.trials) == 3
    assert study.ruin() == "host_memory"


@pytest.mark.parametrize(
    ("budget", "trials"),
    [
        ({"trials": 3}, 3),
        ({"steps": 50}, 2),
        ({"tokens": 512 * 60}, 3),
        ({"gpu_hours": 27 * 0.5 / 3600 * 2 * 1.5}, 2),
        ({"money": 27 * 0.5 / 3600 * 2 * 7 * 2.5, "price_per_hour": 7}, 3),
        ({"trials": 9, "steps": 50}, 2),
    ],
)
def test_each_limit_of_the_budget_ends_it(budget: dict[str, float], trials: int) -> None:
    """A trial has 27 steps of 512 tokens and half a second, on 2 workers with a GPU each."""
    study = study_of({"budget": budget, "scheduler": "none"})
    play(study, by_rate)
    assert len(study.trials) == trials
    assert study.spent()


def test_repeats_have_seeds_of_their_own_and_their_means_are_compared() -> None:
    study = study_of({"budget": {"trials": 6}, "repeats": 3, "scheduler": "none"})
    lucky = {1: 0.0, 2: 5.0, 3: 5.0, 4: 2.0, 5: 2.0, 6: 2.0}
    play(study, lambda begun, step: lucky[begun.trial] + 1 / step)
    trials = list(study.trials.values())
    assert [trial.parameters["seed"] for trial in trials] == [5, 6, 7, 5, 6, 7]
    rates = [trial.parameters["optimizer.learning_rate"] for trial in trials]
    assert len(set(rates[:3])) == len(set(rates[3:])) == 1
    best = study.best()
    assert best is not None
    assert best.trial.drawing == 1
    assert best.value == pytest.approx(2 + 1 / TOTAL)
    assert best.deviation == pytest.approx(0)


def test_a_population_goes_on_from_its_best() -> None:
    space = {
        "scheduler": {"name": "pbt", "population": 4, "every_steps": 9, "quantile": 0.25},
        "search": "random",
    }
    study = study_of(space)
    events = play(study, by_rate)
    children = [trial for trial in study.trials.values() if trial.parent]
    assert len(children) == 2  # one at each of the two comparisons before the end
    for child in children:
        parent = study.trials[child.parent]
        assert parent.parent_step < child.parent_step
        replaced = [
            trial
            for trial in study.trials.values()
            if trial.drawing == child.drawing and trial.status == "pruned"
        ]
        assert replaced
        began = events.index(
            next(e for e in events if isinstance(e, Begun) and e.trial == child.number)
        )
        later = [
            event
            for event in events[:began]
            if isinstance(event, Reported)
            and event.trial == parent.number
            and event.step > child.parent_step
        ]
        assert not later, "the parent went on before its checkpoint was taken over"
    ends = [trial.status for trial in study.trials.values()]
    assert sorted(ends) == ["completed"] * 4 + ["pruned"] * 2
    for cut in range(0, len(events), 5):
        again = study_of(space)
        for event in events[:cut]:
            again.apply(event)
        again.interrupt()
        play(again, by_rate, events=list(events[:cut]))
        assert {n: (t.parent, t.parameters) for n, t in again.trials.items()} == {
            n: (t.parent, t.parameters) for n, t in study.trials.items()
        }, cut


def test_events_survive_the_log() -> None:
    events = [
        Begun(1, 0, 0, 1, {"a.b": 1}, {"a.b": 2}, until_step=4, parent=3, parent_step=2),
        Reported(1, 3, 3.0, None, 9, 0.5, {"loss": 1.0}),
        Ended(1, "failed", 3, 9, 0.5, "code", "why"),
    ]
    assert [from_json(to_json(event), "here") for event in events] == events
