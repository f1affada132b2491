"""Trackers write what they are told, and nothing they do can stop or hold up a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dray.errors import StoreError
from dray.runs import Run, Trackers, build_trackers, check_trackers, create_run
from dray.storage.filesystem import list_files
from sharded_model import PLAN, make_test_spec


class Recording:
    """A tracker that keeps what it is told, and fails where it is asked to."""

    def __init__(self, fails_in: str = "") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails_in = fails_in

    def _take(self, name: str, *values: Any) -> None:
        self.calls.append((name, *values))
        if name == self.fails_in:
            raise RuntimeError(f"{name} is broken")

    def start(self, run_name: str, spec: Mapping[str, Any]) -> None:
        self._take("start", run_name)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._take("log", step, dict(metrics))

    def finish(self, status: str) -> None:
        self._take("finish", status)


def failures(run: Run) -> list[tuple[str, str]]:
    return [
        (event["tracker"], event["error"])
        for event in run.events()
        if event["kind"] == "tracker_failed"
    ]


def follow(trackers: Trackers, num_steps: int = 5) -> None:
    trackers.start("speeches", {})
    for step in range(1, num_steps + 1):
        trackers.log(
            step, {"step": step, "loss": 1.0 / step, "rows_digest": "ab", "ok": True, "tokens": 7}
        )
    trackers.finish("completed")


def test_numbers_reach_every_member(local_run: Run) -> None:
    members = {"a": Recording(), "b": Recording()}
    follow(Trackers(local_run, members), num_steps=1)
    for member in members.values():
        logged = ("log", 1, {"loss": 1.0, "tokens": 7.0})
        assert member.calls == [("start", "speeches"), logged, ("finish", "completed")]
    assert failures(local_run) == []


@pytest.mark.parametrize("fails_in", ["start", "log", "finish"])
def test_a_failure_is_reported_once_and_harms_nobody(local_run: Run, fails_in: str) -> None:
    members = {"bad": Recording(fails_in), "good": Recording()}
    follow(Trackers(local_run, members), num_steps=20)
    assert failures(local_run) == [("bad", f"RuntimeError: {fails_in} is broken")]
    assert len(members["good"].calls) == 22
    assert members["bad"].calls[-1] == ("finish", "completed"), "every member is finished"


def test_a_hanging_tracker_holds_nothing_up(local_run: Run) -> None:
    release = threading.Event()

    class Hanging(Recording):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            release.wait(60)

    good = Recording()
    begun = time.monotonic()
    follow(
        Trackers(local_run, {"hanging": Hanging(), "good": good}, finish_seconds=0.5), num_steps=20
    )
    assert time.monotonic() - begun < 5
    assert good.calls[-1] == ("finish", "completed")
    assert failures(local_run) == [("hanging", "TimeoutError: did not finish within 0.5 s")]
    release.set()


def test_none_switched_on(local_run: Run) -> None:
    trackers = build_trackers(local_run, local_run.spec())
    trackers.log(1, {"loss": 1.0})
    trackers.finish("completed")
    assert not Path(local_run.path, "trackers").exists()


def test_tensorboard(storage: str) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spec = make_test_spec(tracking={"tensorboard": True})
    run = create_run(storage, "speeches", spec, PLAN)
    trackers = build_trackers(run, spec)
    for step in (1, 2, 3):
        trackers.log(step, {"loss": 1.0 / step})
    trackers.finish("completed")
    assert failures(run) == []
    names = list_files(run.filesystem, f"{run.path}/trackers/tensorboard")
    assert any("tfevents" in name for name in names)
    if not run.storage.startswith("s3"):
        events = EventAccumulator(f"{run.path}/trackers/tensorboard")
        events.Reload()
        assert [(event.step, event.value) for event in events.Scalars("loss")] == [
            (1, 1.0),
            (2, 0.5),
            (3, pytest.approx(1 / 3)),
        ]


def test_mlflow(tmp_path: Path) -> None:
    """The default SQLite store, read back with MLflow itself; a run that goes on stays one MLflow
    run."""
    for module in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(module)
    from mlflow.tracking import MlflowClient

    spec = make_test_spec(tracking={"mlflow": True})
    run = create_run(tmp_path, "speeches", spec, PLAN)
    for steps, status in (((1, 2), "failed"), ((3,), "completed")):
        trackers = build_trackers(run, spec, finish_seconds=120)
        for step in steps:
            trackers.log(step, {"loss": 1.0 / step, "grad_norm": float("nan")})
        trackers.finish(status)
    assert failures(run) == []
    client = MlflowClient(f"sqlite:///{run.path}/trackers/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("dray")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "speeches"
    assert found.info.status == "FINISHED"
    assert found.data.params["model.hidden_size"] == "64"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
    ]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    spec = make_test_spec(tracking={"wandb": "speech-models"})
    run = create_run(tmp_path, "speeches", spec, PLAN)
    trackers = build_trackers(run, spec, finish_seconds=60)
    trackers.log(1, {"loss": 1.0})
    trackers.finish("completed")
    assert failures(run) == []
    assert list(Path(run.path, "trackers", "wandb").glob("offline-run-*/*.wandb"))


def test_mlflow_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    spec = make_test_spec(tracking={"mlflow": "http://127.0.0.1:9"})
    run = create_run(tmp_path, "speeches", spec, PLAN)
    trackers = build_trackers(run, spec)
    trackers.log(1, {"loss": 1.0})
    trackers.finish("completed")
    assert len(failures(run)) == 1


def test_what_cannot_be_is_refused_beforehand(
    s3_storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="needs a local disk; give a tracking URI"):
        check_trackers(make_test_spec(tracking={"mlflow": True}), s3_storage)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for tracker in ("tensorboard", "mlflow", "wandb"):
        with pytest.raises(StoreError, match=r"is not installed.*pip install 'dray\[track\]'"):
            check_trackers(make_test_spec(tracking={tracker: True}), tmp_path)
    check_trackers(make_test_spec(), tmp_path)
