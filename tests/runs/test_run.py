"""A run's life in storage: begun, gone on with, refused, forked, listed, summed up."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dray.errors import StoreError
from dray.runs import Run, check_storage, create_run, fork_run, list_runs, open_or_create
from dray.spec import Spec
from races import race
from sharded_model import PLAN, make_test_spec, save
from tiny import SUMMARY_KEYS


def test_new_run(storage: str, spec: Spec) -> None:
    run = open_or_create(storage, "speeches", spec, PLAN, corpus="/corpora/a", corpus_key="abc")
    assert run.status == "created"
    assert run.fingerprint == spec.fingerprint()
    assert run.spec() == spec
    assert run.plan() == PLAN
    assert run.latest_checkpoint() is None
    assert (
        run.metrics()
        == run.validations()
        == run.events()
        == run.attempts()
        == run.checkpoints()
        == []
    )
    assert [found.name for found in list_runs(storage)] == ["speeches"]
    copy = pickle.loads(pickle.dumps(run))
    assert copy.record() == run.record()
    assert run.record()["corpus_key"] == "abc"


def test_same_identity_goes_on(storage: str, run: Run, spec: Spec) -> None:
    run.update(note="kept")
    place = spec.model_copy(update={"resources": spec.resources.model_copy(update={"workers": 4})})
    again = open_or_create(storage, "speeches", place, PLAN | {"num_ranks": 4}, corpus="/new")
    assert again.record()["note"] == "kept"
    assert again.spec().resources.workers == 4
    assert again.plan()["num_ranks"] == 4
    assert again.record()["corpus"] == "/new"
    with pytest.raises(StoreError, match="exists already"):
        create_run(storage, "speeches", spec, PLAN)


def test_other_identity_is_refused(storage: str, run: Run) -> None:
    other = make_test_spec(optimizer={"learning_rate": 2e-3}, seed=7, duration={"steps": 60})
    with pytest.raises(
        StoreError,
        match=r"duration\.steps, optimizer\.learning_rate, "
        r"seed.*--fork NEW_NAME",
    ) as caught:
        open_or_create(storage, "speeches", other, PLAN)
    assert "\n" not in str(caught.value)
    assert run.spec().seed == 0


def test_duration_may_grow(local_run: Run, tmp_path: Path) -> None:
    constant = make_test_spec(schedule={"name": "constant"})
    run = open_or_create(tmp_path, "constant", constant, PLAN)
    save(run, 50)
    longer = make_test_spec(schedule={"name": "constant"}, duration={"steps": 90})
    again = open_or_create(tmp_path, "constant", longer, PLAN | {"num_steps": 90})
    assert again.spec().duration.steps == 90


@pytest.mark.parametrize(
    ("committed", "new_steps", "refused"),
    [
        (44, 90, False),
        (45, 90, False),
        (46, 90, True),
        (50, 90, True),
        (46, 50, False),
        (40, 42, True),
        (None, 20, False),
    ],
)
def test_wsd_keeps_its_decay(
    tmp_path: Path, committed: int | None, new_steps: int, refused: bool
) -> None:
    """Of 50 steps the last 5 decay: once a checkpoint lies past step 45, the duration is spent."""

    def begin(steps: int) -> Run:
        spec = make_test_spec(schedule={"name": "wsd"}, duration={"steps": steps})
        return open_or_create(tmp_path, "stable", spec, {"num_steps": steps})

    run = begin(50)
    if committed is not None:
        save(run, committed)
    if refused:
        with pytest.raises(StoreError, match=r"decays from step \d+ on.*--fork"):
            begin(new_steps)
    else:
        assert begin(new_steps).plan()["num_steps"] == new_steps


def test_fork(storage: str, run: Run, spec: Spec) -> None:
    other = make_test_spec(optimizer={"learning_rate": 2e-3})
    with pytest.raises(StoreError, match="no sound checkpoint to fork from"):
        open_or_create(storage, "speeches", other, PLAN, fork="faster")
    assert [found.name for found in list_runs(storage)] == ["speeches"]
    info = save(run, 20)
    fork = open_or_create(storage, "speeches", other, PLAN, fork="faster")
    origin = fork.origin()
    assert origin is not None
    assert (origin["run"], origin["step"], origin["differing"]) == (
        "speeches",
        20,
        ["optimizer.learning_rate"],
    )
    assert fork.latest_checkpoint() == info
    assert fork.checkpoints() == []
    again = open_or_create(storage, "speeches", other, PLAN, fork="faster")
    assert again.latest_checkpoint() == info
    own = save(fork, 25)
    assert fork.latest_checkpoint() == own
    with pytest.raises(StoreError, match="no fork of 'faster'"):
        open_or_create(storage, "faster", other, PLAN, fork="speeches")
    with pytest.raises(StoreError, match=r"differs in optimizer\.learning_rate"):
        open_or_create(storage, "speeches", spec, PLAN, fork="faster")


def test_fork_of_a_fork(tmp_path: Path, spec: Spec) -> None:
    run = create_run(tmp_path, "first", spec, PLAN)
    info = save(run, 20)
    fork_run(tmp_path, "first", "second", make_test_spec(seed=1), PLAN)
    third = fork_run(tmp_path, "second", "third", make_test_spec(seed=2), PLAN)
    assert third.latest_checkpoint() == info
    run.filesystem.delete_file(f"{info.path}/COMMITTED")
    with pytest.raises(StoreError, match="forked from is unsound: no marker"):
        third.latest_checkpoint()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "a\n", "-a", "a b", "corpora", "x" * 101, "a\0b", "~"]
)
def test_names_that_are_no_folders(tmp_path: Path, spec: Spec, name: str) -> None:
    with pytest.raises(StoreError, match=r"^run "):
        create_run(tmp_path / "runs", name, spec, PLAN)
    assert list(tmp_path.iterdir()) == []


def test_storage_that_is_none(tmp_path: Path, spec: Spec) -> None:
    (tmp_path / "file").write_text("")
    places = [tmp_path / "file", tmp_path / "file" / "runs", "/proc/runs", "nope://bucket/runs"]
    for place in places:
        for begin in (lambda at: create_run(at, "speeches", spec, PLAN), check_storage):
            with pytest.raises(StoreError) as caught:
                begin(place)
            assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match="not found in"):
        Run.open(tmp_path / "runs", "speeches")
    with pytest.raises(StoreError, match="is a file"):
        list_runs(tmp_path / "file")
    check_storage(tmp_path / "not" / "yet")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert list_runs(tmp_path / "runs") == []


def test_storage_that_cannot_be_written(tmp_path: Path, spec: Spec) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="cannot be written"):
        create_run(tmp_path / "runs", "speeches", spec, PLAN)


def test_bucket_that_is_none(s3_endpoint: str, spec: Spec) -> None:
    with pytest.raises(StoreError, match="cannot be") as caught:
        create_run(f"s3://no-such-bucket/runs?{s3_endpoint}", "speeches", spec, PLAN)
    assert "\n" not in str(caught.value)


def test_broken_record(local_run: Run) -> None:
    Path(local_run.path, "run.json").write_text("{")
    with pytest.raises(StoreError, match="not JSON"):
        local_run.record()
    Path(local_run.path, "spec.yaml").write_text("name: [")
    with pytest.raises(StoreError, match="cannot be read"):
        local_run.spec()


SET_RUNNING = """
import sys
from dray.runs import Run
Run.open(sys.argv[1], "speeches").set_status("running")
print("running", flush=True)
sys.stdin.read()
"""


def test_status(local_run: Run) -> None:
    for status in ("running", "completed", "failed", "interrupted"):
        local_run.set_status(status, "because")
        assert local_run.status == status
        assert local_run.record()["reason"] == "because"
    with pytest.raises(ValueError, match="'dead' is not one of"):
        local_run.set_status("dead")
    driver = subprocess.Popen(
        [sys.executable, "-c", SET_RUNNING, local_run.storage],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "running\n"
    assert local_run.status == "running"
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    assert local_run.status == "interrupted"
    local_run.update(driver=local_run.record()["driver"] | {"host": "elsewhere"})
    assert local_run.status == "running"


BEGIN_ATTEMPTS = """
import sys
from dray.runs import Run
run = Run.open(sys.argv[1], "speeches")
print("ready", flush=True)
sys.stdin.readline()
print(*[run.begin_attempt(1, 0) for _ in range(25)])
"""


def test_attempts_of_several_processes_at_once(local_run: Run) -> None:
    told = race(BEGIN_ATTEMPTS, *[(local_run.storage,)] * 4)
    numbers = [int(number) for said in told for number in said.split()]
    assert sorted(numbers) == list(range(1, 101))
    assert [attempt.number for attempt in local_run.attempts()] == list(range(1, 101))
    assert not [
        name for name in os.listdir(f"{local_run.path}/attempts") if name.startswith(".tmp-")
    ]


def test_attempts(run: Run) -> None:
    assert run.begin_attempt(2, 0, micro_rows=4) == 1
    run.end_attempt(1, "failed", 12, "worker killed")
    assert run.begin_attempt(4, 10) == 2
    first, second = run.attempts()
    assert (first.num_ranks, first.micro_rows, first.status, first.end_step) == (2, 4, "failed", 12)
    assert (second.num_ranks, second.start_step, second.status) == (4, 10, "")
    assert not {"status", "reason", "micro_rows"} & second.to_json().keys()


def test_an_attempt_whose_record_is_none_is_named(local_run: Run) -> None:
    """Not guessed: what it started from decides which steps count."""
    local_run.begin_attempt(2, 0)
    path = Path(local_run.path, "attempts", "0001.json")
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "later": "versions may add fields"}))
    assert local_run.attempts()[0].num_ranks == 2
    del document["start_step"]
    path.write_text(json.dumps(document))
    with pytest.raises(StoreError, match=r"0001\.json.*no record of an attempt.*start_step"):
        local_run.attempts()


def test_summary(storage: str, run: Run) -> None:
    assert run.summary()["step"] == 0
    assert run.summary()["train_loss"] is None
    run.set_status("running")
    attempt = run.begin_attempt(2, 0)
    run.log_metrics(
        [
            {
                "step": step,
                "attempt": attempt,
                "loss": 5.0 - step / 10,
                "tokens_per_second": 100.0 * step,
            }
            for step in range(1, 6)
        ]
    )
    run.log_metrics(
        [{"kind": "validation", "step": 5, "attempt": attempt, "loss": 4.0, "accuracy": 0.5}]
    )
    info = save(run, 5)
    Run.open(storage, "speeches").set_status("completed")
    summary = json.loads(json.dumps(run.summary()))
    assert summary.keys() >= SUMMARY_KEYS
    assert (summary["name"], summary["status"]) == ("speeches", "completed")
    assert (summary["step"], summary["num_steps"]) == (5, 50)
    assert (summary["train_loss"], summary["tokens_per_second"]) == (4.5, 300.0)
    assert summary["validation"] == {"step": 5, "loss": 4.0, "accuracy": 0.5}
    assert [attempt["num_ranks"] for attempt in summary["attempts"]] == [2]
    assert summary["checkpoints"] == [
        {
            "step": 5,
            "attempt": 1,
            "path": info.path,
            "verified": True,
            "bytes": info.num_bytes,
            "problem": "",
        }
    ]


def test_runs_are_listed_by_age(storage: str, spec: Spec) -> None:
    for name in ("b", "a", "c"):
        create_run(storage, name, spec, PLAN)
    assert [run.name for run in list_runs(storage)] == ["b", "a", "c"]


def test_a_changed_corpus_is_refused_and_a_moved_one_is_not(storage: str, spec: Spec) -> None:
    run = open_or_create(storage, "speeches", spec, PLAN, corpus="/corpora/a", corpus_key="abc")
    open_or_create(storage, "speeches", spec, PLAN, corpus="/moved/a", corpus_key="abc")
    assert run.record()["corpus"] == "/moved/a"
    with pytest.raises(StoreError, match="its corpus was abc and is def now"):
        open_or_create(storage, "speeches", spec, PLAN, corpus="/corpora/b", corpus_key="def")
    assert run.record()["corpus"] == "/moved/a"
