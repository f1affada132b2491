"""Nodes go, with and without a notice, and come back or do not.

A local Ray of several nodes: the head holds the driver and the readers, each of the other nodes one
rank. Training is a `dray train` process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import EVERY, SAVE_STEPS, Nodes, Training, causes, events, make_case, nodes_lost
from ray._private.ray_constants import PROCESS_TYPE_RAYLET

from dray.doctor import diagnose
from dray.errors import Cause
from dray.runs import Run
from waiting import kill_all, processes_named, wait_for

ENVIRONMENT = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2"}


@pytest.fixture
def head() -> Iterator[Nodes]:
    """A head alone; nodes that a test adds take over its environment."""
    found = Nodes()
    try:
        found.start()
        yield found
    finally:
        found.shut_down()


@pytest.fixture
def nodes(head: Nodes) -> Nodes:
    """A head and two nodes for one rank each."""
    head.add(2)
    return head


def start(
    nodes: Nodes,
    storage: str,
    name: str,
    corpus: Path,
    folder: Path,
    *,
    workers: Any = 2,
    environment: dict[str, str] | None = None,
    **sections: Any,
) -> Training:
    # Whatever happens to nodes does not count as a failure, of which none is allowed here.
    resources = {"workers": workers, "cpus_per_worker": nodes.RANK_CPUS, "max_failures": 0}
    case = make_case(corpus, resources=resources, **sections)
    return Training(
        case,
        storage,
        name,
        folder,
        address=nodes.address,
        environment=ENVIRONMENT | (environment or {}),
    )


def assert_ends_for_lost_nodes(
    training: Training, lose: Callable[[], object], said: str, *, way_out: str
) -> None:
    """Without those nodes the run ends within two minutes, and says why and what to do."""
    begun = time.monotonic()
    lose()
    assert training.finish() == 3, training.output
    assert time.monotonic() - begun < 120
    assert said in training.output
    found = diagnose(training.run)
    assert found.fault is Cause.NODE_LOSS
    assert way_out in found.way_out


@pytest.mark.slow
def test_a_removed_node_is_replaced(
    storage: str, tiny_corpus: Path, undisturbed: Run, measured, nodes: Nodes, tmp_path: Path
):
    """a node removed without notice (SIGKILL to all its processes), another one joins"""
    training = start(nodes, storage, "replaced", tiny_corpus, tmp_path)
    training.wait_for_step(8)
    lost = nodes.remove()
    nodes.add()
    assert training.finish() == 0, training.output
    measured(training.run, undisturbed)
    assert causes(training.run) == ["node_loss"]
    assert nodes_lost(training.run) == [lost]
    assert events(training.run, "hang") == []


@pytest.mark.slow
def test_a_node_with_a_notice_is_left_before_it_goes(
    storage: str, tiny_corpus: Path, undisturbed: Run, measured, nodes: Nodes, tmp_path: Path
):
    """notice of preemption (a minute), the node goes, another one joins"""
    training = start(nodes, storage, "noticed", tiny_corpus, tmp_path)
    training.wait_for_step(8)
    nodes.drain(60)
    wait_for(lambda: causes(training.run) != [], "the end of the group on the node that will go")
    nodes.remove()
    nodes.add()
    assert training.finish() == 0, training.output
    found = measured(training.run, undisturbed)
    assert found.steps_redone <= 1
    assert causes(training.run) == ["preemption"]
    (saved,) = events(training.run, "saved_on_notice")
    assert training.run.attempts()[1].start_step == saved["step"]


@pytest.mark.slow
def test_a_node_that_joins_is_made_ready_for_ranks(
    storage: str, tiny_corpus: Path, head: Nodes, tmp_path: Path
):
    head.add(2)
    training = start(head, storage, "joined", tiny_corpus, tmp_path, duration={"steps": 120})
    training.wait_for_step(3)
    head.add()
    raylet = head.nodes[-1].all_processes[PROCESS_TYPE_RAYLET][0].process.pid
    # The one that knows Ray, and its fork that knows what a rank needs; all ranks are on other
    # nodes.
    server = "dray.processes.forkserver"
    wait_for(
        lambda: len(processes_named(server, psutil.Process(raylet))) == 2, "the node's servers", 30
    )
    assert training.finish() == 0, training.output
    assert len(training.run.attempts()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("stays", [False, True])
def test_a_notice_that_is_too_short_costs_an_interval(
    storage: str,
    tiny_corpus: Path,
    undisturbed: Run,
    measured,
    head: Nodes,
    tmp_path: Path,
    name_fault: Callable[..., Path],
    stays: bool,
):
    """notice of preemption a second ahead, which is too short to save: the node is killed at once,
    or a while later"""
    name_fault("dray.rank.saving:Saver._commit:slow")  # three seconds
    head.add(2)
    training = start(head, storage, f"hasty-{stays}", tiny_corpus, tmp_path)
    training.wait_for_step(8)
    head.drain(1)
    if stays:
        wait_for(
            lambda: causes(training.run) != [], "the end of the group on the node whose time is up"
        )
    head.remove()
    head.add()
    assert training.finish() == 0, training.output
    found = measured(training.run, undisturbed)
    assert 0 < found.steps_redone <= EVERY + 1 + SAVE_STEPS
    assert causes(training.run) in (["preemption"], ["node_loss"])
    assert events(training.run, "saved_on_notice") == []


@pytest.mark.slow
def test_ranks_agree_on_a_notice_that_they_see_at_different_steps(
    storage: str,
    tiny_corpus: Path,
    undisturbed: Run,
    measured,
    head: Nodes,
    tmp_path: Path,
    name_fault: Callable[..., Path],
):
    """notice of preemption that one rank sees three seconds after the other"""
    happened = name_fault("dray.train.posting:Posting.notice_given:late")
    head.add(2)
    training = start(head, storage, "late", tiny_corpus, tmp_path)
    training.wait_for_step(8)
    head.drain(60)
    wait_for(lambda: causes(training.run) != [], "the end of the group on the node that will go")
    assert happened.exists(), "the fault never happened"
    head.remove()
    head.add()
    assert training.finish() == 0, training.output
    found = measured(training.run, undisturbed)
    assert found.steps_redone <= 1
    assert causes(training.run) == ["preemption"]
    assert len(events(training.run, "saved_on_notice")) == 1
    assert events(training.run, "hang") == []


@pytest.mark.slow
def test_an_elastic_group_goes_on_with_fewer_ranks(
    storage: str, tiny_corpus: Path, undisturbed: Run, measured, nodes: Nodes, tmp_path: Path
):
    """elastic group: a node removed that never comes back"""
    training = start(nodes, storage, "shrunk", tiny_corpus, tmp_path, workers=[1, 2])
    training.wait_for_step(8)
    nodes.remove()
    assert training.finish() == 0, training.output
    measured(training.run, undisturbed, exact=False)
    assert [attempt.num_ranks for attempt in training.run.attempts()] == [2, 1]
    assert causes(training.run) == ["node_loss"]


@pytest.mark.slow
def test_an_elastic_group_grows(
    storage: str,
    tiny_corpus: Path,
    undisturbed: Run,
    measured,
    head: Nodes,
    tmp_path: Path,
    name_fault: Callable[..., Path],
):
    """elastic group: a node joins"""
    name_fault(
        "dray.rank.loop:_Loop._train_step:slow"
    )  # so that the cluster is looked at before the last step
    head.add()
    training = start(head, storage, "grown", tiny_corpus, tmp_path, workers=[1, 2])
    training.wait_for_step(1)
    head.add()
    assert training.finish() == 0, training.output
    found = measured(training.run, undisturbed, exact=False)
    assert [attempt.num_ranks for attempt in training.run.attempts()] == [1, 2]
    (resized,) = events(training.run, "resized")
    assert resized["saved_step"] == resized["step"]
    assert found.steps_redone == 0
    assert causes(training.run) == []


@pytest.mark.slow
def test_a_node_that_never_returns_ends_the_run_in_time(
    storage: str, tiny_corpus: Path, undisturbed: Run, measured, nodes: Nodes, tmp_path: Path
):
    """a node removed that never comes back: the run ends, and is started again once there is
    another node"""
    patience = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "2"}
    training = start(nodes, storage, "waiting", tiny_corpus, tmp_path, environment=patience)
    training.wait_for_step(8)
    assert_ends_for_lost_nodes(
        training, nodes.remove, "no group of 2 workers", way_out="another joins"
    )
    nodes.add()
    again = start(nodes, storage, "waiting", tiny_corpus, tmp_path)
    assert again.finish() == 0, again.output
    measured(again.run, undisturbed)


@pytest.mark.slow
def test_a_dead_head_ends_the_driver_and_another_one_goes_on(
    storage: str, tiny_corpus: Path, undisturbed: Run, measured, nodes: Nodes, tmp_path: Path
):
    """the head killed with all its processes (SIGKILL), `dray train` typed again on a new
    cluster"""
    training = start(nodes, storage, "headless", tiny_corpus, tmp_path)
    training.wait_for_step(8)
    assert_ends_for_lost_nodes(
        training,
        nodes.remove_head,
        "the head of the Ray cluster is gone",
        way_out="ray start --head",
    )
    nodes.shut_down()
    nodes.start()
    nodes.add(2)
    again = start(nodes, storage, "headless", tiny_corpus, tmp_path)
    assert again.finish() == 0, again.output
    measured(again.run, undisturbed)


@pytest.mark.slow
def test_an_elastic_group_that_takes_every_cpu_is_read_for(
    storage: str, tiny_corpus: Path, undisturbed: Run, measured, head: Nodes, tmp_path: Path
):
    """an elastic group takes every CPU of the cluster, and leaves none to the readers"""
    head.cluster.add_node(num_cpus=1)  # like the head: a rank on each
    case = make_case(tiny_corpus, resources={"workers": [1, 2], "cpus_per_worker": 1})
    training = Training(case, storage, "crowded", tmp_path, address=head.address)
    assert training.finish() == 0, training.output
    assert [attempt.num_ranks for attempt in training.run.attempts()] == [2]
    measured(training.run, undisturbed)


@pytest.fixture
def blind_node(head: Nodes, tmp_path: Path) -> Iterator[str]:
    """A node in a mount namespace of its own, where another file system lies over the storage; the
    storage's place."""
    storage = tmp_path / "storage"
    storage.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("only root may make mount namespaces")
    script = (
        f"mount -t tmpfs none {storage} && exec {sys.executable} -m ray.scripts.scripts start "
        f"--block --address={head.address} --num-cpus=2 --disable-usage-stats"
    )
    process = subprocess.Popen(
        ["unshare", "-m", "bash", "-c", script],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: head.count() == 2, "the node", 120)
        yield str(storage)
    finally:
        kill_all(psutil.Process(process.pid))
        process.wait()


@pytest.mark.slow
def test_a_storage_that_a_node_does_not_see_is_refused(
    head: Nodes, blind_node: str, tiny_corpus: Path, tmp_path: Path
):
    """a disk of its own over the storage of one node"""
    training = start(head, blind_node, "blind", tiny_corpus, tmp_path, workers=1)
    assert training.finish(240) == 2
    assert "is not the same folder on" in training.output
    assert not list(Path(blind_node).rglob("*"))
