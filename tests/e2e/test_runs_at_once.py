"""Runs as parts of a larger program, on a real Ray: watched, stopped, in a place of their own, in
threads and actors, and more at once than there is room for."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from dray.cluster.placement import Placement, make_bundles, reserved
from dray.corpus.prepare import prepare
from dray.errors import PlanError, RunFailed
from dray.ledger import verify_ledger
from dray.processes.signals import STOPS
from dray.runs import Run, verify_checkpoint
from dray.spec import Resources, Spec, make_spec
from dray.train import train
from tiny import tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")
STEPS = 20
Row = Mapping[str, Any]


def make_tree(corpus: Path, **sections: Any) -> dict[str, Any]:
    """A few steps a second, so that a wish to stop can fall between two; it needs three CPUs, half
    of what there is."""
    tree = {
        "duration": {"steps": STEPS},
        "batch": {"global_rows": 48, "micro_rows": 6},
        "validation": {"every_steps": 8, "max_rows": 16},
        **sections,
    }
    return tiny_tree(corpus, **tree)


def make(corpus: Path, **sections: Any) -> Spec:
    return make_spec(make_tree(corpus, **sections))


def make_other(corpus: Path) -> Spec:
    return make(corpus, seed=7, resources={"workers": 1}, zero={"stage": 3})


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def rows_alone() -> list[Row]:
    return []


@pytest.fixture(scope="module")
def alone(storage: str, tiny_corpus: Path, rows_alone: list[Row], local_ray: None) -> Run:
    return train(
        make(tiny_corpus), storage=storage, run_name="alone", observer=rows_alone.append
    ).run


@pytest.fixture(scope="module")
def other_alone(storage: str, tiny_corpus: Path, local_ray: None) -> Run:
    return train(make_other(tiny_corpus), storage=storage, run_name="other-alone").run


RAYS_OWN = frozenset({"_AutoscalingCoordinatorActor", "_StatsActor", "TrainStateActor"})
"""One a Ray, for all who use Ray Data or Ray Train, and not of a run."""


def live_actors() -> set[str]:
    table = ray._private.state.actors()
    return {
        f"{actor['ActorClassName']} {key[:8]}"
        for key, actor in table.items()
        if actor["State"] != "DEAD" and actor["ActorClassName"] not in RAYS_OWN
    }


@pytest.fixture
def nothing_is_left(local_ray: None) -> Iterator[None]:
    """What lives in Ray before a test lives after it, and nothing else."""
    before, cwd = live_actors(), os.getcwd()
    environment = {name: os.environ[name] for name in os.environ if name != "PYTEST_CURRENT_TEST"}
    handlers = [signal.getsignal(number) for number in STOPS]
    yield
    deadline = time.monotonic() + 20
    while (left := live_actors() - before) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    assert not groups
    assert [signal.getsignal(number) for number in STOPS] == handlers
    assert os.getcwd() == cwd
    # What Ray is told once (`cluster.connection._QUIET`) stays, and is the same for every run.
    assert {name: os.environ.get(name) for name in environment} == environment


def assert_equal(run: Run, expected: Run) -> None:
    """Bit for bit."""
    rows, theirs = run.metrics(), expected.metrics()
    for key in ("step", "loss", "grad_norm", "rows_digest"):
        assert [row[key] for row in rows] == [row[key] for row in theirs], key
    ours, others = (verify_checkpoint(r, r.checkpoints()[-1]) for r in (run, expected))
    assert (ours.weights_sha256, ours.optimizer_sha256) == (
        others.weights_sha256,
        others.optimizer_sha256,
    )


def test_an_observer_sees_what_is_stored(alone: Run, rows_alone: list[Row]):
    steps = [dict(row) for row in rows_alone if row.get("kind") != "validation"]
    assert steps == alone.metrics()
    assert [dict(row) for row in rows_alone if row.get("kind") == "validation"] == (
        alone.validations()
    )
    assert len(steps) == STEPS
    assert len(rows_alone) == STEPS + 3


def test_more_runs_at_once_than_there_is_room_for(
    storage: str, tiny_corpus: Path, alone: Run, other_alone: Run, nothing_is_left: None
):
    """Four CPUs, and three runs that need three, three and two: two that held two CPUs each, with
    which their workers wait for one to read, would wait for ever. One is stopped and goes on."""
    first, other = make(tiny_corpus), make_other(tiny_corpus)
    corpus = prepare(first, storage)
    threads: set[int] = set()

    class Trial:
        def train(self, spec: Spec, storage: str) -> tuple[str, int]:
            seen: list[Row] = []
            ended = train(spec, storage=storage, run_name="in-an-actor", observer=seen.append)
            return ended.status, len(seen)

    def stop_and_go_on() -> tuple[Any, Run]:
        seen: list[Row] = []

        def observe(row: Row) -> None:
            threads.add(threading.get_ident())
            seen.append(row)

        def wish() -> str | None:
            threads.add(threading.get_ident())
            return "seen enough" if seen else None

        ended = train(
            first, storage=storage, run_name="stopped", corpus=corpus, observer=observe, stop=wish
        )
        threads.add(threading.get_ident())
        step = ended.run.metrics()[-1]["step"]
        assert ended.run.latest_checkpoint().step == step == seen[-1]["step"]
        again = train(first, storage=storage, run_name="stopped", observer=observe)
        assert again.status == "completed"
        return ended, again.run

    def in_a_place() -> Run:
        with reserved(other.resources) as placement:
            placement.wait()
            return train(
                other, storage=storage, run_name="placed", corpus=corpus, placement=placement
            ).run

    held = placement_group([{"CPU": 2}])
    assert held.wait(60)
    trial = ray.remote(num_cpus=0)(Trial).remote()
    with ThreadPoolExecutor(2) as pool:
        stopping, placing = pool.submit(stop_and_go_on), pool.submit(in_a_place)
        spec = make(tiny_corpus, duration={"steps": 2})
        status, num_rows = ray.get(trial.train.remote(spec, storage), timeout=300)
        (ended, went_on), placed = stopping.result(300), placing.result(300)
    ray.kill(trial)
    remove_placement_group(held)
    assert (status, num_rows) == ("completed", 3)  # and a validation at the end
    assert (ended.status, ended.reason) == ("stopped", "seen enough")
    assert 1 <= went_on.attempts()[1].start_step < STEPS
    assert len(threads) == 1
    assert_equal(went_on, alone)
    assert_equal(placed, other_alone)
    for run in (went_on, placed):
        assert verify_ledger(run).ok


def test_a_placement_that_there_is_no_room_for_can_be_given_up(
    tmp_path: Path, tiny_corpus: Path, nothing_is_left: None
):
    """Nothing is written for a run that never had a place."""
    asked: list[int] = []

    def stop() -> str:
        asked.append(1)
        return "the search is over" if len(asked) > 1 else ""

    spec = make(tiny_corpus)
    held = placement_group([{"CPU": 4}])
    assert held.wait(60)
    try:
        with (
            reserved(spec.resources) as placement,
            pytest.raises(RunFailed, match="waited for its placement: the search is over"),
        ):
            train(spec, storage=str(tmp_path / "runs"), placement=placement, stop=stop)
    finally:
        remove_placement_group(held)
    assert not Run.find(str(tmp_path / "runs"), "tiny")


def test_a_call_that_ends_at_once_leaves_nothing_behind(
    storage: str, tiny_corpus: Path, alone: Run, nothing_is_left: None
):
    """What is no error of the observer's, but the end of its thread, waits for nothing."""

    def leave(row: Row) -> None:
        raise SystemExit

    spec = make(tiny_corpus, resources={"workers": 1})
    with pytest.raises(SystemExit):
        train(spec, storage=storage, run_name="left", observer=leave)
    assert Run.open(storage, "left").status == "failed"


def test_all_that_a_run_does_is_done_in_its_place(
    tmp_path: Path, tiny_corpus: Path, nothing_is_left: None
):
    """Its rows are prepared, read and trained on in three CPUs, while the other three are held."""
    spec = make(tiny_corpus, duration={"steps": 3}, data={"sequence_tokens": 32}, validation={})
    held = placement_group([{"CPU": 3}])
    small = placement_group([{"CPU": 2}])
    # Ray may lose the CPUs of a group that is removed in the moment in which it is made.
    assert small.wait(60)
    try:
        with pytest.raises(PlanError, match=r"placement: .*room for 1 worker;"):
            train(spec, storage=str(tmp_path / "runs"), placement=Placement(small))
        assert not list(tmp_path.iterdir())
        remove_placement_group(small)
        group = placement_group([{"CPU": 2}, {"CPU": 1}])
        assert group.bundle_specs != make_bundles(spec.resources)
        ended = train(spec, storage=str(tmp_path / "runs"), placement=Placement(group))
        assert ended.status == "completed"
        assert placement_group_table(group)["state"] == "CREATED", "it is its maker's"
        remove_placement_group(group)
        with pytest.raises(PlanError, match="its group is not there any more"):
            train(spec, storage=str(tmp_path / "runs"), placement=Placement(group))
    finally:
        remove_placement_group(held)


def test_the_example_of_the_docs_runs(
    tmp_path: Path, storage: str, tiny_corpus: Path, alone: Run, nothing_is_left: None
):
    """With a rate that is far too high, whose trial is given up."""
    text = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    spec = tmp_path / "search.yaml"
    spec.write_text(yaml.safe_dump(make_tree(tiny_corpus, resources={"workers": 1})))
    found = names["search"](str(spec), storage, [0.003, 3.0])
    assert found[3.0] is None
    assert found[0.003] < 6.0
    assert Run.open(storage, "rate-3.0").status == "stopped"


def test_who_waits_says_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dray.cluster.placement.WAITING_SECONDS", 0.0)
    resources = Resources(workers=4)
    said: list[str] = []
    with reserved(resources) as first, reserved(resources) as second:
        first.wait()
        with pytest.raises(RunFailed, match="stopped while it waited"):
            second.wait(said.append, lambda: "enough" if said else "")
    assert said == ["waiting for its placement of 5 × (1 CPU): free now are 1 of 6 CPUs"]
