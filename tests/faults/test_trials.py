"""What befalls one trial of a sweep stays with it, and a sweep whose driver dies loses nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from harness import Nodes, make_case, steps_of

from dray.ledger import verify_ledger
from dray.runs import Run
from dray.show.sweeps import SweepDisplay
from dray.sweep.driver import tune
from dray.sweep.events import Begun, Ended
from dray.sweep.record import Sweep
from dray.sweep.space import make_space
from dray.sweep.summary import summarize
from waiting import wait_for

STEP = "dray.rank.loop:_Loop._forward_backward:before"
ALONE = {"resources": {"workers": 1, "max_failures": 0}, "zero": {"stage": 0}}


def make_tree(corpus: Path, **sections: Any) -> dict[str, Any]:
    case = {"duration": {"steps": 6}, "batch": {"global_rows": 8, "micro_rows": 2}}
    return make_case(corpus, **{**case, **ALONE, **sections})


def make_grid(rates: list[float], **keys: Any) -> Any:
    return make_space(
        {
            "parameters": {"optimizer.learning_rate": {"grid": rates}},
            "search": "grid",
            "scheduler": "none",
            "concurrency": 1,
            "retries": 0,
            **keys,
        }
    )


class Befalling(SweepDisplay):
    """Names the fault of the trial that comes next."""

    def __init__(self, faults: Mapping[int, Callable[[], object]]) -> None:
        super().__init__()
        self._faults = faults

    def ended(self, trial: Mapping[str, Any]) -> None:
        super().ended(trial)
        self._faults.get(int(trial["name"].rpartition("/")[2]) + 1, lambda: None)()


@pytest.mark.slow
def test_what_befalls_a_trial_leaves_the_others_alone(
    storage: str, tiny_corpus: Path, local_ray: None, name_fault: Callable[..., Path]
):
    """one trial raises, one is killed, one hangs, one diverges"""
    rates = [0.01, 0.02, 0.03, 0.04, 10.0, 0.05]
    happened: list[Path] = []

    def befall(place: str, action: str) -> Callable[[], None]:
        def name() -> None:
            if happened:
                happened[-1].unlink(missing_ok=True)
            happened.append(name_fault(place, action))

        return name

    faults = {
        2: befall(STEP, "fail"),
        3: befall(STEP, "kill"),
        4: befall("dray.rank.loop:_Loop._checkpoint_due:before", "deadlock"),
        5: befall("dray.rank.loop:nothing:before", "fail"),
    }
    tree = make_tree(
        tiny_corpus,
        optimizer={"name": "sgd", "momentum": 0.9},
        regularization={"clip_grad_norm": None},
        numerics={"max_skipped_steps": 2},
        duration={"steps": 18},
        validation={"every_steps": 6, "max_rows": 16},
        watchdog={"silent_seconds": 8, "long_silence_seconds": 12},
    )
    sweep = tune(
        tree,
        make_grid(rates),
        storage=storage,
        name="befallen",
        display=Befalling(faults),
    )
    trials = summarize(sweep)["trials"]
    assert [(trial["status"], trial["cause"]) for trial in trials] == [
        ("completed", ""),
        ("failed", "code"),
        ("failed", "killed"),
        ("failed", "hang"),
        ("diverged", "numerics"),
        ("completed", ""),
    ]
    assert all(trial["reason"] for trial in trials if trial["status"] == "failed")
    alone = tune(tree, make_grid([0.01, 0.05]), storage=storage, name="calm")
    for befallen, calm_one in zip((trials[0], trials[5]), summarize(alone)["trials"], strict=True):
        assert befallen["metrics"] == calm_one["metrics"]
        both = [Run.open(storage, item["name"]).metrics() for item in (befallen, calm_one)]
        assert [row["loss"] for row in both[0]] == [row["loss"] for row in both[1]]
        assert [row["rows_digest"] for row in both[0]] == [row["rows_digest"] for row in both[1]]


@pytest.mark.slow
def test_a_trial_that_runs_out_of_memory(
    storage: str, tiny_corpus: Path, local_ray: None, name_fault: Callable[..., Path]
):
    """one trial runs out of memory: it goes on with half its micro batch, as a run does"""
    tree = make_tree(
        tiny_corpus,
        duration={"steps": 3},
        batch={"global_rows": 64, "micro_rows": 32},
        data={"sequence_tokens": 256},
        tokenizer={"vocab_size": 4096},
        model={"hidden_size": 224, "num_layers": 2, "num_heads": 4},
    )
    name_fault(STEP, "starve")
    sweep = tune(tree, make_grid([1e-3, 2e-3]), storage=storage, name="starved-sweep")
    trials = summarize(sweep)["trials"]
    assert [trial["status"] for trial in trials] == ["completed", "completed"]
    first, second = (Run.open(storage, trial["name"]) for trial in trials)
    failed = [event["cause"] for event in first.events() if event["kind"] == "attempt_failed"]
    assert failed == ["host_memory"]
    assert first.record()["micro_rows"] == 16
    assert "micro_rows" not in second.record()


def test_a_trial_is_taken_up_again_after_a_failure(
    storage: str, tiny_corpus: Path, local_ray: None, name_fault: Callable[..., Path]
):
    """a rank killed before the last validation: the trial goes on from a checkpoint"""
    name_fault("dray.rank.loop:_Loop._validate:before")
    tree = make_tree(tiny_corpus, checkpoint={"every_steps": 2, "keep_last": 2})
    sweep = tune(tree, make_grid([1e-3], retries=1), storage=storage, name="again")
    (trial,) = summarize(sweep)["trials"]
    assert (trial["status"], trial["starts"]) == ("completed", 2)
    assert [e.cause for _, e in sweep.events() if isinstance(e, Ended)] == ["killed", ""]
    run = Run.open(storage, trial["name"])
    assert run.attempts()[-1].start_step > 0


class Sweeping:
    """A `dray tune` of its own; `jobs`: a job of the server there."""

    def __init__(
        self, spec: Path, space: Path, storage: str, name: str, *, jobs: str | None = None
    ) -> None:
        self.storage, self.name, self.out = storage, name, spec.parent / f"{name}.out"
        words = ["tune", str(spec), "--space", str(space), "--storage", storage, "--run", name]
        command = [sys.executable, "-m", "dray.cli", *words]
        if jobs is not None:
            ray = str(Path(sys.executable).with_name("ray"))
            command = [ray, "job", "submit", "--address", jobs, "--", *command]
        with self.out.open("ab") as out:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )

    def wait_for_trial(self, number: int, seconds: float = 300) -> None:
        """Until this trial has begun."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.out.read_text()
            sweep = Sweep.find(self.storage, self.name)
            events = sweep.events() if sweep else []
            if any(isinstance(e, Begun) and e.trial == number for _, e in events):
                return
            time.sleep(0.2)
        raise TimeoutError(f"trial {number} did not begin: {self.out.read_text()}")


@pytest.mark.slow
def test_a_sweep_whose_driver_is_killed_twice_ends_as_if_it_had_been_left_alone(
    tiny_corpus: Path, tmp_path: Path
):
    """a sweep's driver killed (SIGKILL) twice, `dray tune` typed again each time"""
    spec, space, storage = tmp_path / "spec.yaml", tmp_path / "space.yaml", str(tmp_path / "runs")
    spec.write_text(
        json.dumps(make_tree(tiny_corpus, duration={"steps": None, "tokens": 64 * 8 * 24}))
    )
    space.write_text(
        json.dumps(
            {
                "parameters": {
                    "optimizer.learning_rate": {"loguniform": [1e-4, 1e-1]},
                    "batch.global_rows": {"choice": [4, 8, 16]},
                    "optimizer.weight_decay": {"uniform": [0.0, 0.3]},
                },
                "scheduler": {"name": "asha", "grace_steps": 3},
                "search": {"name": "tpe", "startup_trials": 5},
                "budget": {"trials": 16},
                "concurrency": 1,
            }
        )
    )
    alone = Sweeping(spec, space, storage, "alone")
    assert alone.process.wait(400) == 0, alone.out.read_text()
    for number in (4, 11):
        driver = Sweeping(spec, space, storage, "killed")
        driver.wait_for_trial(number)
        time.sleep(1.5)  # in the middle of it
        driver.process.kill()
        driver.process.wait()
    last = Sweeping(spec, space, storage, "killed")
    assert last.process.wait(400) == 0, last.out.read_text()
    found = [summarize(Sweep.open(storage, name)) for name in ("alone", "killed")]
    assert [len(summary["trials"]) for summary in found] == [16, 16]
    for one, other in zip(found[0]["trials"], found[1]["trials"], strict=True):
        for key in ("status", "parameters", "metrics", "best_step"):
            assert one[key] == other[key], (one["name"], key)
    best = [summary["best"]["name"].rpartition("/")[2] for summary in found]
    assert best[0] == best[1]
    ends = [e.trial for _, e in Sweep.open(storage, "killed").events() if isinstance(e, Ended)]
    assert sorted(ends) == list(range(1, 17))
    starts = [trial["starts"] for trial in found[1]["trials"]]
    assert max(starts) == 2


@pytest.mark.slow
def test_a_sweep_survives_the_loss_of_a_node(tiny_corpus: Path, tmp_path: Path):
    """one of two nodes is lost during a sweep that `ray job submit` began"""
    rates = [1e-3, 2e-3, 3e-3, 4e-3, 5e-3]
    resources = {"workers": 1, "cpus_per_worker": Nodes.RANK_CPUS, "max_failures": 3}
    tree = make_tree(tiny_corpus, duration={"steps": 24}, resources=resources)
    spec, space, storage = tmp_path / "spec.yaml", tmp_path / "space.yaml", str(tmp_path / "runs")
    spec.write_text(json.dumps(tree))
    space.write_text(
        json.dumps(
            {
                "parameters": {"optimizer.learning_rate": {"grid": rates}},
                "search": "grid",
                "scheduler": "none",
            }
        )
    )
    nodes = Nodes()
    nodes.start(with_jobs=True)
    try:
        nodes.add(2)
        driver = Sweeping(spec, space, storage, "nodes", jobs=nodes.jobs)
        driver.wait_for_trial(2)
        wait_for(lambda: steps_of(storage, "nodes/0002") >= 2, "two steps of the second trial")
        nodes.remove()
        assert driver.process.wait(500) == 0, driver.out.read_text()
    finally:
        nodes.shut_down()
    alone = Sweeping(spec, space, storage, "alone")
    assert alone.process.wait(400) == 0, alone.out.read_text()
    found = [summarize(Sweep.open(storage, name))["trials"] for name in ("nodes", "alone")]
    assert [trial["status"] for trial in found[0]] == ["completed"] * 5
    assert [trial["metrics"] for trial in found[0]] == [trial["metrics"] for trial in found[1]]
    runs = [Run.open(storage, trial["name"]) for trial in found[0]]
    assert any(len(run.attempts()) > 1 for run in runs)
    assert all(verify_ledger(run).ok for run in runs)
