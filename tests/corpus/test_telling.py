"""Columns that a model tells: what they may be, and what that model is known by. That they are
right, told once and by which weights, is tried where a task has them (test_preference.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dray.corpus.encoded import check_columns, check_encoded
from dray.corpus.telling import Teller, find_teller
from dray.errors import CorpusError
from dray.models.source import Pretrained
from dray.spec import Spec, make_spec
from dray.spec.tasks import make_task
from dray.tasks.rows import Column, Encoded
from tiny import tiny_tree


def spec_of(**sections: Any) -> Spec:
    data = {"train": {"path": "none"}, "validation": None}
    own = {"task": "preference", "validation": {"metric": "margin"}, **sections}
    tree = tiny_tree(Path("none"), **own)
    return make_spec({**tree, "data": data})


@pytest.mark.parametrize(
    "column",
    [
        Column("value", "float32", each="token", told=True),
        Column("value", "float32", shape=(2,), told=True),
        Column("value", "int32", told=True),
        Column("value", "float32", varies=True, told=True),
    ],
)
def test_a_model_tells_one_number_a_row(column: Column) -> None:
    task = make_task("preference")
    check_columns(task)
    task.columns = (column,)
    with pytest.raises(CorpusError, match="is told by a model"):
        check_columns(task)


def test_what_is_told_later_is_0_until_then_and_nothing_of_encode() -> None:
    task = make_task("preference")
    columns = {
        "prompt_tokens": np.array([1, 1]),
        "other": pa.array([[3], [3, 4]], pa.large_list(pa.int64())),
    }
    encoded = Encoded(np.array([5, 6, 7]), np.array([2, 1]), columns)
    found = check_encoded(task, encoded, 2, vocab_size=10)
    assert found.columns["reference"].tolist() == [0.0, 0.0]
    early = Encoded(encoded.tokens, encoded.lengths, {**columns, "reference": np.zeros(2)})
    with pytest.raises(CorpusError, match="columns are"):
        check_encoded(task, early, 2, vocab_size=10)


def test_the_model_is_known_by_its_weights_wherever_they_lie() -> None:
    spec = spec_of()
    assert find_teller(spec_of(task={"name": "preference", "loss": "orpo"}), "none") is None
    drawn = find_teller(spec, "none")
    assert drawn is not None
    assert drawn.origin is None
    assert drawn.digest == Teller(spec.model_copy(update={"name": "other"}), None).digest
    assert drawn.digest != Teller(spec.model_copy(update={"seed": 1}), None).digest
    first, moved, other = (
        Teller(spec, Pretrained(path, path, digest)).digest
        for path, digest in (("a", "1"), ("b", "1"), ("a", "2"))
    )
    assert first == moved != other
    assert first != drawn.digest
