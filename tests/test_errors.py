"""Errors cross process borders with their parts, carry a cause, and foreign ones become ours."""

from __future__ import annotations

import pickle

import pytest

from dray import errors
from dray.errors import (
    Cause,
    CorpusError,
    DrayError,
    Interrupted,
    LossSpike,
    RankError,
    RunFailed,
    SpecError,
    StorageFailed,
    first_line,
    one_line,
    translated,
)

EXAMPLES: list[DrayError] = [
    SpecError("batch.global_rows = 100", "not a multiple of 8", "all ranks take as many", "128"),
    StorageFailed("runs/a", "is full", "metrics are kept", "free space", 28),
    RunFailed("the workers failed", "rank 1 ran out of memory"),
    LossSpike(7, "the loss leapt"),
    Interrupted(12, 15),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_is_the_same_in_another_process(error: DrayError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.exit_code) == (str(error), error.exit_code)
    assert vars(again) == vars(error)


def test_each_error_that_ends_an_attempt_says_its_cause() -> None:
    kinds = RankError.__subclasses__()
    assert {kind.__name__ for kind in kinds} >= {"CheckpointDamaged", "LossSpike", "SaveFailed"}
    assert all(isinstance(kind.cause, Cause) for kind in kinds)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    names = [
        name
        for name, found in vars(errors).items()
        if isinstance(found, type) and issubclass(found, DrayError) and name != "DrayError"
    ]
    drawn = [line for line in (errors.__doc__ or "").splitlines() if "── " in line]
    assert [line.split("── ")[1].split()[0] for line in drawn] == names


def test_a_foreign_error_becomes_ours_and_ours_pass() -> None:
    def make(error: Exception) -> CorpusError:
        return CorpusError("tokenizer.path", f"cannot be loaded ({first_line(error)})")

    told = r"cannot be loaded \(no such thing\)"
    with pytest.raises(CorpusError, match=told) as caught, translated(make):
        raise RuntimeError("no such thing\nat all")
    assert "\n" not in str(caught.value)
    with pytest.raises(SpecError, match="ours"), translated(make):
        raise SpecError("a", "ours")
    with pytest.raises(KeyboardInterrupt), translated(make):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("error", "first", "whole"),
    [
        (ValueError("a\nb"), "a", "a b"),
        (ValueError("\n  a\n b"), "a", "a b"),
        (ValueError(), "ValueError", "ValueError"),
        (OSError("x" * 500), "x" * 200, "x" * 400),
    ],
)
def test_an_error_fit_for_a_line(error: Exception, first: str, whole: str) -> None:
    assert (first_line(error), one_line(error)) == (first, whole)
