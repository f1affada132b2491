"""What the caller of a run is told and asked, and what becomes of what its functions raise."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dray.corpus.prepare import Corpus
from dray.doctor import diagnose
from dray.errors import Cause, RunFailed, SpecError, StorageFailed
from dray.processes.signals import Wishes
from dray.runs import Run, verify_checkpoint
from dray.spec import Spec, make_spec
from dray.train import train_locally
from dray.train.caller import Caller, Wish
from random_corpus import build_random_corpus
from tiny import tiny_tree


def test_rows_come_once_and_are_the_observers_own():
    seen: list[dict[str, Any]] = []
    stored = [{"step": 1}, {"step": 2}]
    Caller(seen.append).tell(stored)
    assert [row["step"] for row in seen] == [1, 2]
    seen[0]["step"] = 3
    assert stored[0] == {"step": 1}
    assert json.dumps(seen)


def test_the_first_reason_to_stop_stays_until_a_signal_comes():
    signals, answers = Wishes(), iter([False, None, "", "enough", False])
    caller = Caller(stop=lambda: next(answers))
    assert [caller.wish(signals) for _ in range(3)] == [None] * 3
    assert caller.wish(signals) == caller.wish(signals) == Wish("enough")
    signals.numbers.append(signal.SIGTERM)
    for _ in range(2):  # the program is to end, not the run alone
        assert caller.wish(signals) == Wish("stopped by SIGTERM", signal.SIGTERM)
    assert Caller().wish(signals) == Wish("stopped by SIGTERM", signal.SIGTERM)
    assert Caller(stop=lambda: True).wish() == Wish("the caller asked for it")


def test_what_an_observer_raises_is_a_wish_to_stop_and_nothing_is_called_any_more():
    calls: list[Any] = []

    def observer(row: Mapping[str, Any]) -> None:
        calls.append(row)
        raise ValueError("no\nroom")

    caller = Caller(observer, lambda: calls.append("stop"))
    caller.tell([{"step": 1}, {"step": 2}])
    assert caller.wish() == Wish("observer raised ValueError: no room")
    assert calls == [{"step": 1}]
    assert isinstance(caller.error, ValueError)


# ---- in this process ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_random_corpus(tmp_path_factory.mktemp("corpus"), [50], tokens=64)


def make(**sections: Any) -> Spec:
    return make_spec(
        tiny_tree(Path("texts"), **{"duration": {"steps": 6}, "validation": {}, **sections})
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Run:
    return train_locally(make(), storage=str(tmp_path_factory.mktemp("runs")), corpus=corpus).run


def test_a_run_that_is_stopped_at_a_step_goes_on_as_if_it_had_not_been(
    tmp_path: Path, corpus: Corpus, straight: Run
):
    seen: list[Mapping[str, Any]] = []
    ended = train_locally(
        make(),
        storage=str(tmp_path),
        corpus=corpus,
        observer=seen.append,
        stop=lambda: "seen enough" if len(seen) >= 2 else None,
    )
    assert (ended.status, ended.reason, ended.run.status) == ("stopped", "seen enough", "stopped")
    assert [row["step"] for row in seen] == [1, 2, 3]  # it was asked while the third was begun
    assert ended.run.latest_checkpoint().step == 3
    found = diagnose(ended.run)
    assert (found.fault, "seen enough" in found.cause) == (Cause.INTERRUPTED, True)

    ended = train_locally(make(), storage=str(tmp_path), corpus=corpus, observer=seen.append)
    assert ended.status == "completed"
    assert [dict(row) for row in seen] == ended.run.metrics()
    assert [row["loss"] for row in seen] == [row["loss"] for row in straight.metrics()]
    ours, theirs = (verify_checkpoint(r, r.checkpoints()[-1]) for r in (ended.run, straight))
    assert ours.weights_sha256 == theirs.weights_sha256


def test_an_observer_that_raises_leaves_a_run_that_can_go_on(
    tmp_path: Path, corpus: Corpus, straight: Run
):
    def observer(row: Mapping[str, Any]) -> None:
        if row["step"] == 2:
            raise ValueError("cannot be told")

    with pytest.raises(
        RunFailed, match=r"observer raised ValueError: cannot be told.*step 3"
    ) as failed:
        train_locally(make(), storage=str(tmp_path), corpus=corpus, observer=observer)
    assert isinstance(failed.value.__cause__, ValueError)
    run = train_locally(make(), storage=str(tmp_path), corpus=corpus).run
    assert [row["loss"] for row in run.metrics()] == [row["loss"] for row in straight.metrics()]


def test_a_corpus_of_other_rows_is_refused(tmp_path: Path, corpus: Corpus):
    spec = make(data={"sequence_tokens": 32})
    with pytest.raises(SpecError, match=r"data\.sequence_tokens = 32.*rows of 64 tokens"):
        train_locally(spec, storage=str(tmp_path), corpus=corpus)
    assert not list(tmp_path.iterdir())


def test_a_run_that_could_not_be_begun_is_let_go(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
):
    """The storage fails at one call (a stand-in), once the run was taken over: the program lives on
    and tries again."""
    real = Run.update

    def fail(self: Run, **fields: Any) -> None:
        if "compressors" in fields:
            raise StorageFailed("the storage", "is away")
        real(self, **fields)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "update", fail)
        with pytest.raises(RunFailed, match="is away"):
            train_locally(make(), storage=str(tmp_path), corpus=corpus)
    assert Run.open(str(tmp_path), "tiny").status == "failed"
    assert train_locally(make(), storage=str(tmp_path), corpus=corpus).status == "completed"
