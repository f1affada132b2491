"""What is promoted, and what may answer: the history of a name in a storage."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dray.errors import SpecError, StoreError
from dray.serve.pinning import check_pinned, pin
from dray.serve.served import Served
from dray.serve.versions import Record, State


def of(step: int) -> Served:
    return Served(storage="/runs", run="words", step=step, digest=f"{step:064x}")


def test_a_name_goes_from_version_to_version_and_back(tmp_path: Path):
    record = Record(str(tmp_path), "chat")
    assert record.begin(of(1)).may_answer() == (1,)
    canary = record.promote(of(2), share=0.25)
    assert (canary.stable, canary.canary, canary.share) == (1, 2, 0.25)
    assert record.promote(of(2)).may_answer() == (2,)
    shadowed = record.promote(of(3), shadow=True)
    assert (shadowed.may_answer(), shadowed.shadow) == ((2,), 3)
    assert shadowed.kept() == {1, 2, 3}
    assert record.rollback().shadow is None
    assert record.rollback().stable == 1
    with pytest.raises(SpecError, match="no version before"):
        record.rollback()
    again = Record(str(tmp_path), "chat")
    assert again.read() == record.read()
    assert [change.deed for change in again.history()] == [
        "promote", "canary", "promote", "shadow", "rollback", "rollback",
    ]  # fmt: skip


def test_what_is_begun_anew_is_what_was_promoted(tmp_path: Path):
    record = Record(str(tmp_path), "chat")
    record.begin(of(1))
    record.promote(of(2))
    assert record.begin(of(1)).stable == 2
    with pytest.raises(SpecError, match="what answers is what was promoted"):
        record.begin(of(3))


def test_of_many_who_promote_at_once_each_has_a_number_of_its_own(tmp_path: Path):
    Record(str(tmp_path), "chat").begin(of(1))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda step: Record(str(tmp_path), "chat").promote(of(step)), range(2, 10)))
    state = Record(str(tmp_path), "chat").read()
    assert sorted(served.step for served in state.versions.values()) == list(range(1, 10))  # type: ignore[type-var]
    assert len(state.before) == 8


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, 2.0])
def test_a_share_is_a_part(tmp_path: Path, share: float):
    record = Record(str(tmp_path), "chat")
    record.begin(of(1))
    with pytest.raises(SpecError):
        record.promote(of(2), share=share)
    assert record.read().may_answer() == (1,)


def test_nothing_stands_beside_itself_or_nothing(tmp_path: Path):
    record = Record(str(tmp_path), "chat")
    with pytest.raises(SpecError, match="stands beside"):
        record.promote(of(1), shadow=True)
    assert record.read() == State()
    record.begin(of(1))
    with pytest.raises(SpecError, match="stands beside"):
        record.promote(of(1), share=0.5)


@pytest.mark.parametrize("name", ["", "../up", "a/b", "chat@2"])
def test_a_name_that_is_none_is_no_path(tmp_path: Path, name: str):
    with pytest.raises(SpecError):
        Record(str(tmp_path), name)


def test_a_damaged_history_is_named(tmp_path: Path):
    Record(str(tmp_path), "chat").begin(of(1))
    (tmp_path / "serving" / "models" / "chat" / "000003.json").write_text("{}")
    with pytest.raises(StoreError, match="a change is missing"):
        Record(str(tmp_path), "chat").read()


def test_other_weights_than_those_that_were_promoted_are_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    pinned = pin(Served(folder=str(tmp_path)))
    check_pinned(pinned)
    (tmp_path / "model.safetensors").write_bytes(b"others!")
    with pytest.raises(StoreError, match="other weights"):
        check_pinned(pinned)


def test_versions_are_found_where_the_storage_was_moved_to(tmp_path: Path):
    record = Record(str(tmp_path / "before"), "chat")
    record.begin(of(1))
    record.promote(of(2))
    (tmp_path / "before").rename(tmp_path / "after")
    moved = Record(str(tmp_path / "after"), "chat")
    storages = {served.storage for served in moved.read().versions.values()}
    assert storages == {str(tmp_path / "after")}
    assert len(moved.promote(of(1)).versions) == 2
