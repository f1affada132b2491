"""TensorBoard, MLflow and Weights & Biases beside the run's own rows, behind one small protocol.

A tracker that is switched on but not installed is refused before the run begins. One that fails or
hangs later is reported once as an event and never stops training: a thread feeds them, and what
they cannot take is dropped.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from pyarrow import fs as pafs

from dray.errors import StoreError, caught, one_line
from dray.redaction import redact, restored
from dray.runs.layout import TRACKERS, parse_trial_name
from dray.runs.run import Run
from dray.spec import Spec
from dray.storage.filesystem import (
    absolute,
    child,
    is_local,
    make_folder,
    open_filesystem,
    shown,
    write_bytes,
)

MAX_WAITING = 10_000
MAX_FAILURES = 3
FINISH_SECONDS = 30.0
UPLOAD_SECONDS = 60.0


class Tracker(Protocol):
    """What a tracker does; each method may raise."""

    def start(self, run_name: str, spec: Mapping[str, Any]) -> None:
        """Begin, or go on with, the tracker's record of the run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of a step."""

    def finish(self, status: str) -> None:
        """Write out what is left. `status` is the run's."""


class Trackers:
    """Several trackers as one, fed by a thread. No method raises, and only `finish` waits, for a
    bounded time."""

    def __init__(
        self, run: Run, members: Mapping[str, Tracker], finish_seconds: float = FINISH_SECONDS
    ) -> None:
        self._run, self._members, self._finish_seconds = run, dict(members), finish_seconds
        self._failures = dict.fromkeys(members, 0)
        self._reported: set[str] = set()
        self._queues: dict[str, queue.Queue[Callable[[Tracker], None] | None]] = {}
        self._threads: dict[str, threading.Thread] = {}

    def start(self, run_name: str, spec: Mapping[str, Any]) -> None:
        """Start every member. Members are fed independently: one that hangs does not hold up the
        others."""
        for name, member in self._members.items():
            self._queues[name] = queue.Queue(MAX_WAITING)
            thread = threading.Thread(
                target=self._feed, args=(name, member), name=f"tracker-{name}", daemon=True
            )
            self._threads[name] = thread
            thread.start()
        self._put(lambda member: member.start(run_name, spec))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Pass on the numbers among the metrics; text and nested values stay in the run's own
        rows."""
        numbers = {
            key: float(value)
            for key, value in metrics.items()
            if isinstance(value, (int, float))
            and not isinstance(value, bool)
            and key not in ("step", "time")
        }
        self._put(lambda member: member.log(step, numbers))

    def finish(self, status: str) -> None:
        """Finish every member, whatever the others do, and wait for them for a bounded time in
        all."""
        self._put(lambda member: member.finish(status))
        for waiting in self._queues.values():
            with suppress(queue.Full):  # a thread that does not make room is reported below
                waiting.put_nowait(None)
        deadline = time.monotonic() + self._finish_seconds
        for name, thread in self._threads.items():
            thread.join(max(0.01, deadline - time.monotonic()))
            if thread.is_alive():
                self._report(
                    name, TimeoutError(f"did not finish within {self._finish_seconds:g} s")
                )
        self._threads, self._queues = {}, {}

    def _put(self, call: Callable[[Tracker], None]) -> None:
        for name, waiting in self._queues.items():
            try:
                waiting.put_nowait(call)
            except queue.Full:
                self._report(name, RuntimeError("takes no more: its metrics are dropped"))

    def _feed(self, name: str, member: Tracker) -> None:
        waiting = self._queues[name]
        while (call := waiting.get()) is not None:
            if self._failures[name] >= MAX_FAILURES and waiting.qsize() > 1:
                continue  # given up; the last calls are `finish` and the end
            # Whatever a foreign library raises must not reach training.
            _, error = caught(partial(call, member))
            self._failures[name] = 0 if error is None else self._failures[name] + 1
            if error is not None:
                self._report(name, error)

    def _report(self, name: str, error: BaseException) -> None:
        if name not in self._reported:
            self._reported.add(name)
            self._run.log_event(
                "tracker_failed",
                tracker=name,
                error=redact(f"{type(error).__name__}: {error}")[:500],
            )


def build_trackers(run: Run, spec: Spec, finish_seconds: float = FINISH_SECONDS) -> Trackers:
    """The trackers that the spec switches on, started. Raises StoreError for one that is not
    installed or cannot write where the run lies."""
    check_trackers(spec, run.storage)
    tracking, members = spec.tracking, dict[str, Tracker]()
    if tracking.tensorboard:
        members["tensorboard"] = TensorBoardTracker(run)
    if tracking.mlflow:
        members["mlflow"] = MlflowTracker(run, None if tracking.mlflow is True else tracking.mlflow)
    if tracking.wandb:
        members["wandb"] = WandbTracker(run, "dray" if tracking.wandb is True else tracking.wandb)
    trackers = Trackers(run, members, finish_seconds)
    trackers.start(run.name, spec.model_dump(mode="json"))
    return trackers


def check_trackers(spec: Spec, storage: str | os.PathLike[str]) -> None:
    """Raise StoreError if a tracker is switched on whose library is missing, or that cannot write
    to the storage.

    Imports nothing, so that it can be asked before anything else is done.
    """
    tracking = spec.tracking
    wanted = {
        "tensorboard": [["tensorboard", "tensorboardX"]] if tracking.tensorboard else [],
        "mlflow": [["mlflow"], ["sqlalchemy"], ["alembic"]][: 3 if tracking.mlflow is True else 1]
        if tracking.mlflow
        else [],
        "wandb": [["wandb"]] if tracking.wandb else [],
    }
    for tracker, modules in wanted.items():
        for either in modules:
            if not any(importlib.util.find_spec(module) for module in either):
                raise StoreError(
                    f"tracking.{tracker}",
                    f"{either[0]} is not installed",
                    "a tracker's library is needed",
                    "pip install 'dray[track]', or switch the tracker off",
                )
    if tracking.mlflow is True and not is_local(open_filesystem(storage)[0]):
        raise StoreError(
            "tracking.mlflow",
            f"the storage is {shown(storage)}",
            "MLflow's own SQLite store needs a local disk",
            "give a tracking URI",
        )


class TensorBoardTracker:
    """Event files in trackers/tensorboard. On an object store they are written beside and copied
    there every minute."""

    def __init__(self, run: Run) -> None:
        own = importlib.util.find_spec("tensorboard")
        self._module: Any = importlib.import_module(
            "torch.utils.tensorboard" if own else "tensorboardX"
        )
        self._run, self._target = run, f"{run.path}/{TRACKERS}/tensorboard"
        self._folder = (
            self._target
            if is_local(run.filesystem)
            else tempfile.mkdtemp(prefix="dray-tensorboard-")
        )
        self._writer: Any = None
        self._uploaded = time.monotonic()

    def start(self, run_name: str, spec: Mapping[str, Any]) -> None:
        self._writer = self._module.SummaryWriter(self._folder)
        self._writer.add_text("spec", f"```\n{_as_text(spec)}\n```")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        if time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self._upload()

    def finish(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()
        self._upload()
        if self._folder != self._target:
            shutil.rmtree(self._folder)

    def _upload(self) -> None:
        self._uploaded = time.monotonic()
        if self._folder == self._target or self._writer is None:
            return
        self._writer.flush()
        for entry in os.scandir(self._folder):
            with open(entry.path, "rb") as stream:
                write_bytes(self._run.filesystem, f"{self._target}/{entry.name}", stream.read())


class _Mlflow:
    """A client and the experiment `dray`, in an SQLite store in `folder` unless a tracking URI is
    given."""

    def __init__(self, filesystem: pafs.FileSystem, folder: str, uri: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        module: Any = importlib.import_module("mlflow.tracking")
        if uri is None:
            make_folder(filesystem, folder)
        self.client: Any = module.MlflowClient(
            restored(uri or "") or f"sqlite:///{folder}/mlflow.db"
        )
        known = self.client.get_experiment_by_name("dray")
        place = None if uri else f"{folder}/artifacts"
        self.experiment = (
            known.experiment_id if known else self.client.create_experiment("dray", place)
        )

    def find(self, tag: str) -> str:
        """The id of the run that was tagged so; empty if there is none."""
        found = self.client.search_runs(
            [self.experiment], f"tags.dray_run = '{tag}'", max_results=1
        )
        return str(found[0].info.run_id) if found else ""

    def begin(self, tag: str, name: str, tags: Mapping[str, str], params: Mapping[str, Any]) -> str:
        """Begin the run of that tag, or go on with it; its id."""
        found = self.find(tag)
        if found:
            self.client.update_run(found, status="RUNNING")
            return found
        made = self.client.create_run(
            self.experiment, tags={"dray_run": tag, **tags}, run_name=name
        )
        for key, value in _flat(params).items():
            self.client.log_param(made.info.run_id, key, str(value)[:500])
        return str(made.info.run_id)

    def end(self, run_id: str, status: str) -> None:
        known = {"completed": "FINISHED", "early_stopped": "FINISHED"}
        known |= {"stopped": "KILLED", "interrupted": "KILLED"}
        self.client.set_terminated(run_id, known.get(status, "FAILED"))


class MlflowTracker:
    """One MLflow run per dray run; a trial's is a child of its sweep's, in the store of the
    sweep."""

    def __init__(self, run: Run, uri: str | None) -> None:
        trial = parse_trial_name(run.name)
        place = run.path if trial is None else f"{run.storage_path}/{trial[0]}"
        self._run, self._uri, self._id = run, uri, ""
        self._sweep = trial[0] if trial else ""
        self._folder = f"{place}/{TRACKERS}/mlflow"
        self._mlflow: _Mlflow | None = None

    def start(self, run_name: str, spec: Mapping[str, Any]) -> None:
        self._mlflow = _Mlflow(self._run.filesystem, self._folder, self._uri)
        parent = self._mlflow.find(_sweep_tag(self._sweep)) if self._sweep else ""
        tags = {"mlflow.parentRunId": parent} if parent else {}
        tag = f"{self._run.fingerprint[:16]}-{run_name}"
        self._id = self._mlflow.begin(tag, run_name, tags, spec)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        assert self._mlflow is not None, "it logs once it has started"
        time_ms = int(time.time() * 1000)
        self._mlflow.client.log_batch(
            self._id, [Metric(name, value, time_ms, step) for name, value in metrics.items()]
        )

    def finish(self, status: str) -> None:
        if self._mlflow is not None and self._id:
            self._mlflow.end(self._id, status)


def _sweep_tag(name: str) -> str:
    return f"sweep-{name}"


class MlflowParent:
    """The MLflow run of a sweep, whose children its trials' are; nothing where the spec tracks by
    no MLflow. What fails in it is said once, and never stops a sweep."""

    def __init__(self, spec: Spec, storage: str, sweep: str, say: Callable[[str], object]) -> None:
        self._spec, self._sweep, self._say = spec, sweep, say
        self._filesystem, path = open_filesystem(child(absolute(storage), sweep))
        self._folder = f"{path}/{TRACKERS}/mlflow"
        self._mlflow: _Mlflow | None = None
        self._id = ""

    def start(self, params: Mapping[str, Any]) -> None:
        """Begin it, or go on with it."""
        if self._spec.tracking.mlflow:
            self._try(lambda: self._start(params))

    def finish(self, ending: Ending) -> None:
        """Let it end with what the sweep has found."""
        if self._id:
            self._try(lambda: self._finish(ending))

    def _start(self, params: Mapping[str, Any]) -> None:
        given = self._spec.tracking.mlflow
        self._mlflow = _Mlflow(
            self._filesystem, self._folder, None if given is True else str(given)
        )
        self._id = self._mlflow.begin(_sweep_tag(self._sweep), self._sweep, {}, params)

    def _finish(self, ending: Ending) -> None:
        assert self._mlflow is not None, "its id is that of a run"
        for name, value in ending.metrics.items():
            self._mlflow.client.log_metric(self._id, f"best_{name}", value)
        for name, value in ending.parameters.items():
            self._mlflow.client.set_tag(self._id, f"best.{name}", str(value))
        self._mlflow.end(self._id, ending.status)

    def _try(self, call: Callable[[], object]) -> None:
        _, error = caught(call)
        if error is not None:
            self._say(f"MLflow: {type(error).__name__}: {redact(one_line(error))[:300]}")


@dataclass(frozen=True)
class Ending:
    """How a sweep ended."""

    status: str
    metrics: Mapping[str, float]
    """Of its best trial."""
    parameters: Mapping[str, Any]


class WandbTracker:
    """Weights & Biases; online only if its key is in the environment, else files for `wandb sync`
    in trackers/."""

    def __init__(self, run: Run, project: str) -> None:
        self._module = importlib.import_module("wandb")
        self._run, self._project = run, project
        self._live: Any = None
        local = is_local(run.filesystem)
        self._folder = f"{run.path}/{TRACKERS}" if local else tempfile.mkdtemp(prefix="dray-wandb-")

    def start(self, run_name: str, spec: Mapping[str, Any]) -> None:
        os.makedirs(self._folder, exist_ok=True)
        mode = os.environ.get("WANDB_MODE") or (
            "online" if os.environ.get("WANDB_API_KEY") else "offline"
        )
        settings = self._module.Settings(console="off", silent=True)
        self._live = self._module.init(
            project=self._project,
            name=run_name,
            group=run_name.rpartition("/")[0] or None,
            config=dict(spec),
            dir=self._folder,
            mode=mode,
            settings=settings,
            id=f"{self._run.fingerprint[:8]}-{run_name.replace('/', '-')}"[:64],
            resume="allow",
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._live.log(dict(metrics), step=step)

    def finish(self, status: str) -> None:
        if self._live is not None:
            self._live.finish(
                exit_code=0 if status in ("completed", "early_stopped", "stopped") else 1
            )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree as dotted path → value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _as_text(spec: Mapping[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in _flat(spec).items())
