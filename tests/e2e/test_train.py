"""Training on a real local Ray with real DeepSpeed: parity over places, resume, records, early
stopping."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from dray.errors import RunFailed, StoreError
from dray.ledger import verify_ledger
from dray.runs import Run, verify_checkpoint
from dray.spec import make_spec
from dray.train.driver import train, train_locally
from tiny import tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


def go(storage: str, corpus: Path, name: str, **sections: Any) -> Run:
    return train(make_spec(tiny_tree(corpus, **sections)), storage=storage, run_name=name).run


@pytest.fixture(scope="module")
def straight(storage: str, tiny_corpus: Path, local_ray: None) -> Run:
    """Twelve steps in one go, the run that others are compared with."""
    return go(
        storage,
        tiny_corpus,
        "straight",
        duration={"steps": 12},
        checkpoint={"every_steps": 4, "keep_last": 3},
    )


def compare(run: Run, straight: Run, within: float) -> None:
    rows, expected = run.metrics(), straight.metrics()[: len(run.metrics())]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["rows_digest"] for row in rows] == [row["rows_digest"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=within)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_the_record_of_a_run_is_whole(straight: Run):
    rows = straight.metrics()
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[0]["loss"] == pytest.approx(math.log(512), rel=0.03)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert len({row["rows_digest"] for row in rows}) == 12
    for key in (
        "attempt",
        "num_ranks",
        "learning_rate",
        "grad_norm",
        "tokens",
        "seconds",
        "tokens_per_second",
        "step_seconds_mean",
        "forward_seconds_skew",
        "data_wait_seconds_max",
        "memory_bytes_max",
    ):
        assert all(row[key] is not None for row in rows), key
    assert rows[0]["num_ranks"] == 2
    summary = straight.summary()
    assert summary["status"] == "completed"
    assert summary["step"] == summary["num_steps"] == 12
    assert summary["validation"]["bits_per_byte"] == pytest.approx(
        summary["validation"]["loss"] / math.log(2) * 0.35, rel=0.6
    )
    assert [item["step"] for item in summary["checkpoints"]] == [4, 8, 12]
    assert verify_checkpoint(straight, straight.checkpoints()[-1]).ok
    assert straight.metrics_table().num_rows == 12


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow), 3])
def test_zero_is_a_place_not_a_recipe(storage: str, tiny_corpus: Path, straight: Run, stage: int):
    compare(go(storage, tiny_corpus, f"zero-{stage}", zero={"stage": stage}), straight, 1e-4)


@pytest.mark.parametrize(("workers", "micro"), [pytest.param(1, 8, marks=pytest.mark.slow), (4, 1)])
def test_the_number_of_workers_is_a_place_too(
    storage: str, tiny_corpus: Path, straight: Run, workers: int, micro: int
):
    run = go(
        storage,
        tiny_corpus,
        f"workers-{workers}",
        resources={"workers": workers},
        batch={"micro_rows": micro},
    )
    compare(run, straight, 1e-4)


def test_resume_at_other_places_goes_on_with_the_same_run(
    storage: str, tiny_corpus: Path, straight: Run
):
    """2 workers under ZeRO 1, then 4 under ZeRO 3, then 1 under ZeRO 2."""
    go(storage, tiny_corpus, "moved", duration={"steps": 4})
    go(
        storage,
        tiny_corpus,
        "moved",
        duration={"steps": 8},
        resources={"workers": 4},
        zero={"stage": 3},
    )
    run = go(
        storage,
        tiny_corpus,
        "moved",
        duration={"steps": 12},
        resources={"workers": 1},
        zero={"stage": 2},
    )
    compare(run, straight, 1e-5)
    assert [attempt.start_step for attempt in run.attempts()] == [0, 4, 8]
    assert [attempt.num_ranks for attempt in run.attempts()] == [2, 4, 1]
    ledger = verify_ledger(run)
    assert ledger.ok, ledger.problems
    assert (ledger.steps, ledger.digest) == (12, verify_ledger(straight).digest)


def test_resume_in_its_own_place_is_equal_bit_for_bit(
    storage: str, tiny_corpus: Path, straight: Run
):
    go(storage, tiny_corpus, "stopped", duration={"steps": 8})
    run = go(storage, tiny_corpus, "stopped", duration={"steps": 12})
    ours, theirs = (verify_checkpoint(r, r.checkpoints()[-1]) for r in (run, straight))
    assert ours.weights_sha256 == theirs.weights_sha256
    assert ours.optimizer_sha256 == theirs.optimizer_sha256
    assert [row["loss"] for row in run.metrics()] == [row["loss"] for row in straight.metrics()]


def test_a_complete_run_is_left_alone(storage: str, tiny_corpus: Path, straight: Run):
    before = len(straight.attempts())
    go(storage, tiny_corpus, "straight", duration={"steps": 12})
    assert len(straight.attempts()) == before


def test_another_identity_is_refused_with_the_paths_named(
    storage: str, tiny_corpus: Path, straight: Run
):
    with pytest.raises(StoreError, match=r"optimizer\.learning_rate.*--fork"):
        go(storage, tiny_corpus, "straight", optimizer={"learning_rate": 1e-3})


def test_a_fork_starts_from_the_newest_checkpoint(storage: str, tiny_corpus: Path, straight: Run):
    spec = make_spec(
        tiny_tree(tiny_corpus, optimizer={"learning_rate": 1e-3}, duration={"steps": 14})
    )
    run = train(spec, storage=storage, run_name="straight", fork="forked").run
    assert run.name == "forked"
    assert [row["step"] for row in run.metrics()] == [13, 14]
    assert run.metrics()[0]["loss"] < straight.metrics()[0]["loss"] - 0.5


def alone(storage: str, corpus: Path, name: str, **sections: Any) -> Run:
    """The same loop in this process, for what does not depend on Ray or on several ranks."""
    return train_locally(
        make_spec(tiny_tree(corpus, **sections)), storage=storage, run_name=name
    ).run


def test_dropout_and_label_smoothing_resume_bit_for_bit_too(
    storage: str, tiny_corpus: Path, straight: Run
):
    settings: dict[str, Any] = {
        "regularization": {"dropout": 0.2, "label_smoothing": 0.1},
        "validation": {},
        "model": {"architecture": "gpt2"},
    }
    whole = alone(storage, tiny_corpus, "noisy", duration={"steps": 6}, **settings)
    alone(storage, tiny_corpus, "noisy-stopped", duration={"steps": 3}, **settings)
    again = alone(storage, tiny_corpus, "noisy-stopped", duration={"steps": 6}, **settings)
    hashes = [
        verify_checkpoint(run, run.checkpoints()[-1]).weights_sha256 for run in (whole, again)
    ]
    assert hashes[0] == hashes[1]


def test_early_stopping_ends_a_run_that_no_longer_gets_better(
    storage: str, tiny_corpus: Path, straight: Run
):
    run = alone(
        storage,
        tiny_corpus,
        "early",
        optimizer={"learning_rate": 1.0},
        duration={"steps": 40},
        validation={"every_steps": 1, "patience": 2, "max_rows": 8},
    )
    assert run.status == "completed"
    assert run.metrics()[-1]["step"] < 40
    assert run.latest_checkpoint().step == run.metrics()[-1]["step"]


def test_a_worker_that_raises_is_a_failed_run_with_its_diagnosis(
    tmp_path: Path, tiny_corpus: Path, local_ray: None
):
    """A token shard that is damaged while the run sleeps: reading it fails as often as it is
    tried."""
    sections: dict[str, Any] = {"resources": {"workers": 1, "max_failures": 1}}
    run = go(str(tmp_path), tiny_corpus, "broken", duration={"steps": 4}, **sections)
    shards = list((tmp_path / run.record()["corpus"]).rglob("*.arrow"))
    assert shards
    for shard in shards:
        shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(RunFailed) as failed:
        go(str(tmp_path), tiny_corpus, "broken", duration={"steps": 8}, **sections)
    assert run.status == "failed"
    causes = [event["cause"] for event in run.events() if event["kind"] == "attempt_failed"]
    assert causes == ["data", "data"]
    assert "arrow" in failed.value.diagnosis.lower()
