"""The index of drift by hand and against scipy, and what stands behind its gauges."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import entropy

from dray.serve.drift import (
    LEAST,
    MOST_VERSIONS,
    NUM_BINS,
    REFERENCE,
    WINDOW,
    Drift,
    Look,
    Sketch,
    Value,
    look_at_prediction,
    look_at_prompt,
    population_stability,
    smoothed,
)


def filled(reference: Sequence[Value], newest: Sequence[Value]) -> Sketch:
    sketch = Sketch(reference)
    for value in newest:
        sketch.add(value)
    return sketch


def test_the_index_is_what_it_is_by_hand():
    """−0.1 ln 0.8 + 0 + 0.1 ln 1.5."""
    found = population_stability([0.5, 0.3, 0.2], [0.4, 0.3, 0.3])
    assert found == pytest.approx(0.06286086594223741, abs=1e-15)
    assert population_stability([0.25, 0.75], [0.25, 0.75]) == 0


def test_the_index_is_the_divergence_in_both_directions():
    draws = np.random.default_rng(1)
    for _ in range(20):
        one, other = draws.dirichlet(np.ones(7), 2)
        expected = entropy(one, other) + entropy(other, one)
        assert population_stability(one.tolist(), other.tolist()) == pytest.approx(expected)


def test_an_empty_bin_makes_no_index_infinite():
    assert smoothed([0, 3, 1]) == pytest.approx([0.5 / 5.5, 3.5 / 5.5, 1.5 / 5.5])
    assert population_stability(smoothed([300, 0]), smoothed([0, 300])) < 20


def test_a_sketch_counts_tenths_of_its_reference():
    reference = [float(number) for number in range(1, REFERENCE + 1)]
    sketch = filled(reference, reference)
    assert sketch.expected == [REFERENCE // NUM_BINS] * NUM_BINS == sketch.actual
    assert sketch.drift() == 0
    moved = filled(reference, [number + REFERENCE for number in reference])
    assert moved.actual == [0] * (NUM_BINS - 1) + [WINDOW]
    # By hand: nine bins go from 50.5/505 to 0.5/505, the tenth from 50.5/505 to 500.5/505.
    by_hand = 9 * (0.1 - 0.5 / 505) * np.log(101) + (500.5 / 505 - 0.1) * np.log(500.5 / 50.5)
    assert moved.drift() == pytest.approx(by_hand)


def test_the_window_slides():
    sketch = filled([float(number) for number in range(REFERENCE)], [1e9] * WINDOW)
    far = sketch.drift()
    for number in range(WINDOW):
        sketch.add(float(number))
    assert sum(sketch.actual) == WINDOW
    assert far is not None
    assert far > 1
    assert sketch.drift() == 0


def test_names_are_the_most_frequent_ones_and_all_others():
    rare = [f"rare {number}" for number in range(40)]
    reference = [f"class {number % 12}" for number in range(480)] + rare
    sketch = filled(reference, reference[-LEAST:])
    assert len(sketch.expected) == NUM_BINS
    assert sum(sketch.expected) == len(reference)
    assert sketch.expected[-1] == 40 * 3 + len(rare)
    unseen = filled(["good"] * 250 + ["bad"] * 250, ["neither"] * LEAST)
    assert unseen.actual == [0, 0, LEAST]


def test_numbers_that_are_all_the_same_still_have_a_beyond():
    """The share of unknown tokens, mostly."""
    same = filled([0.0] * REFERENCE, [0.0] * LEAST)
    other = filled([0.0] * REFERENCE, [0.5] * LEAST)
    assert (same.expected, same.actual, other.actual) == ([REFERENCE, 0], [LEAST, 0], [0, LEAST])
    found = same.drift(), other.drift()
    assert found[0] == pytest.approx(0, abs=0.01)
    assert found[1] is not None
    assert found[1] > 5


def test_by_chance_the_index_is_as_small_as_its_distribution_says():
    """(B − 1)(1/N + 1/M) on average, and never what an alert is raised for."""
    draws = np.random.default_rng(2)
    found = []
    for _ in range(200):
        reference, newest = draws.normal(size=REFERENCE), draws.normal(size=LEAST)
        drift = filled(reference.tolist(), newest.tolist()).drift()
        assert drift is not None
        found.append(drift)
    expected = (NUM_BINS - 1) * (1 / REFERENCE + 1 / LEAST)
    assert np.mean(found) == pytest.approx(expected, rel=0.1)
    assert max(found) < 0.25


def test_what_is_looked_at_of_an_answer_says_nothing_of_a_text():
    size = [12, 3]
    prompt = {"input_length": 12.0, "unknown_tokens": 0.25}
    assert look_at_prompt(size) == prompt
    cases: list[tuple[dict[str, object], Look]] = [
        (
            {"prediction": "good", "scores": {"good": 0.9, "bad": 0.1}},
            {"class": "good", "top_score": 0.9},
        ),
        ({"prediction": [], "scores": {"a": 0.2}}, {"class": ["none"], "top_score": 0.2}),
        ({"prediction": ["O", None, "B-PER"]}, {"class": ["O", "none", "B-PER"]}),
        ({"prediction": ["film 1", "film 2"], "scores": [0.5, 0.2]}, {"top_score": 0.5}),
        ({"prediction": 3.5}, {"value": 3.5}),
        ({"prediction": [0.1, 0.2]}, {}),
        ({"prediction": "an answer"}, {"written_length": 9.0}),
    ]
    for prediction, expected in cases:
        assert look_at_prediction(prediction, size) == prompt | expected
    assert look_at_prediction({"error": "no 'text'"}, size) == {}


def look(length: float, name: str = "good") -> Look:
    return {"input_length": length, "class": name}


def test_held_out_rows_are_the_reference_where_they_are_and_requests_where_not():
    async def work() -> None:
        held = [look(float(number), "good" if number % 2 else "bad") for number in range(300)]
        fetched: list[tuple[str, int]] = []

        async def fetch(model: str, version: int) -> Sequence[Look] | None:
            fetched.append((model, version))
            if model == "broken":
                raise OSError("gone")
            return held if version == 1 else held[: LEAST - 1]

        drift = Drift(fetch)
        for version in (1, 2):
            for number in range(REFERENCE + LEAST):
                drift.note("chat", version, [look(float(number % 300))])
                await asyncio.sleep(0)
        drift.note("broken", 1, [look(1.0)])
        await asyncio.sleep(0)
        assert fetched == [("chat", 1), ("chat", 2), ("broken", 1)]
        found = {(one.version, one.of): one for one in drift.read()}
        assert {pair: one.source for pair, one in found.items()} == {
            (1, "input_length"): "held_out",
            (1, "class"): "held_out",
            (2, "input_length"): "first_requests",
            (2, "class"): "first_requests",
        }
        assert found[1, "input_length"].value < 0.1
        assert found[1, "class"].value > 1  # never `bad`
        assert found[2, "class"].value < 0.1

    asyncio.run(work())


def test_what_is_asked_before_the_reference_comes_is_not_lost():
    async def work() -> float:
        come = asyncio.Event()

        async def fetch(_: str, __: int) -> Sequence[Look]:
            await come.wait()
            return [look(float(number)) for number in range(300)]

        drift = Drift(fetch)
        for _ in range(LEAST):
            drift.note("chat", 1, [{"input_length": 1e6}])
        assert list(drift.read()) == []
        come.set()
        await asyncio.sleep(0.01)
        (found,) = drift.read()
        return found.value

    assert asyncio.run(work()) > 1


def test_of_many_versions_those_that_were_asked_last_are_kept():
    drift = Drift()
    for version in range(MOST_VERSIONS + 5):
        for _ in range(REFERENCE + LEAST):
            drift.note("chat", version, [{"input_length": 1.0}])
    assert {one.version for one in drift.read()} == set(range(5, MOST_VERSIONS + 5))
