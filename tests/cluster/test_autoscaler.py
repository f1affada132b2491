"""A cluster that grows, on one machine: Ray's autoscaler with nodes that are processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray._raylet import GcsClient
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from dray.cluster.autoscaler import Limits, NodeType, read_limits
from dray.cluster.connection import connect
from dray.cluster.needs import Node
from dray.cluster.nodes import answers
from dray.cluster.survey import NodeRoom, Survey
from dray.corpus.prepare import prepare
from dray.runs import Run
from dray.spec import make_spec
from ports import free_ports
from tiny import tiny_tree
from waiting import kill_all, processes_named, wait_for

CONFIG: dict[str, Any] = {
    "cluster_name": "fake_multinode",
    "max_workers": 2,
    "provider": {
        "type": "fake_multinode",
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "available_node_types": {
        "two": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 2},
    },
    "head_node_type": "ray.head.default",
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 1,
    **{name: {} for name in ("auth", "docker", "file_mounts")},
    **{
        name: []
        for name in (
            "initialization_commands",
            "setup_commands",
            "head_setup_commands",
            "worker_setup_commands",
            "head_start_ray_commands",
            "worker_start_ray_commands",
            "cluster_synced_files",
            "rsync_exclude",
            "rsync_filter",
        )
    },
    "file_mounts_sync_continuously": False,
}


@dataclass(frozen=True)
class Growing:
    """A head whose autoscaler may add two nodes of two CPUs."""

    address: str
    process: psutil.Popen

    def nodes(self) -> list[psutil.Process]:
        """The nodes that were added, by their raylets, which no other process of the head has among
        its children."""
        monitors = processes_named("monitor.py", self.process)
        return processes_named("/raylet/raylet", monitors[0]) if monitors else []


@contextmanager
def growing_head(
    *,
    num_cpus: int = 1,
    idle_minutes: float = 1.0,
    environment: Mapping[str, str] | None = None,
    **sections: Any,
) -> Iterator[Growing]:
    with tempfile.TemporaryDirectory(prefix="grow", dir="/tmp") as folder:
        config, (port, *others) = Path(folder, "config.yaml"), free_ports(4)
        provider = {**CONFIG["provider"], **sections.pop("provider", {})}
        head = {"resources": {"CPU": num_cpus}, "node_config": {}, "max_workers": 0}
        types = sections.pop("available_node_types", CONFIG["available_node_types"])
        changes = {
            "available_node_types": {CONFIG["head_node_type"]: head, **types},
            "provider": {**provider, "gcs_address": f"127.0.0.1:{port}"},
            "idle_timeout_minutes": idle_minutes,
            **sections,
        }
        config.write_text(yaml.safe_dump({**CONFIG, **changes}))
        options = {
            "port": port,
            "dashboard-port": others[0],
            "dashboard-agent-listen-port": others[1],
            "ray-client-server-port": others[2],
            "temp-dir": f"{folder}/r",
            "autoscaling-config": config,
            "num-cpus": num_cpus,
            "node-ip-address": "127.0.0.1",
            "include-dashboard": "false",
        }
        words = ["start", "--head", "--block", "--disable-usage-stats"]
        words += [f"--{name}={value}" for name, value in options.items()]
        process = psutil.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={
                **os.environ,
                "RAY_FAKE_CLUSTER": "1",
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_AUTH_MODE": "disabled",
                **(environment or {}),
            },
        )
        try:
            deadline = time.monotonic() + 90
            address = f"127.0.0.1:{port}"
            while not answers("127.0.0.1", port) or read_limits(address) is None:
                assert process.poll() is None, "the head has ended"
                assert time.monotonic() < deadline, "no autoscaler"
                time.sleep(0.5)
            yield Growing(address, process)
        finally:
            kill_all(process)
            process.wait()


TWO_ZONES = {
    "available_node_types": {
        name: {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 2, "labels": labels}
        for name, labels in (("plain", {}), ("labelled", {"zone": "b"}))
    }
}
"""Of nodes with the same resources; which come first is the autoscaler's choice."""
VERSION_2: dict[str, Any] = {
    "provider": {
        # It reads defaults of `fake_multinode` that Ray's package lacks.
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
    },
    "environment": {
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    },
}


@pytest.fixture(scope="module")
def growing() -> Iterator[str]:
    """The address of one with one CPU."""
    with growing_head() as head:
        yield head.address


@pytest.fixture
def from_none() -> Iterator[Growing]:
    """One whose head holds no rank, as a cloud's; nodes that do nothing go after half a minute.
    After less, a node on a busy machine goes before anything is put there."""
    with growing_head(num_cpus=0, idle_minutes=0.5) as head:
        yield head


def test_the_shape_counts_what_may_still_be_added(growing: str):
    assert read_limits(growing) == Limits((NodeType("two", Node({"CPU": 2.0}, None), 2),), 2)
    assert read_limits("127.0.0.1:1") is None
    code = (
        "import sys\n"
        "from dray.cluster.connection import connect\n"
        "from dray.cluster.needs import Needs\n"
        "for num_workers in (1, 2):\n"
        "    cpus = 3 - num_workers\n"
        "    with connect(sys.argv[1], num_cpus=1, worker=Needs({'CPU': cpus}),\n"
        "                 num_workers=num_workers) as connection:\n"
        "        shape = connection.shape\n"
        "        print(shape.num_nodes, shape.num_addable, shape.cpus_per_node,\n"
        "              shape.spare_cpus, shape.memory_bytes_per_node > 1e8)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, growing],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
    # A worker of two CPUs fits on none that is there; two of one on the head and one to come, and
    # those who read may want another one.
    assert done.stdout.splitlines() == ["2 2 2.0 1.0 True", "3 2 1.0 0.0 True"], done.stderr


def test_a_plan_beside_a_cluster_that_may_grow(growing: str, tmp_path: Path):
    """Two workers of two CPUs: none fits on the head, both on nodes to come."""
    spec = tmp_path / "growing.yaml"
    resources = {"workers": 2, "cpus_per_worker": 2}
    spec.write_text(yaml.safe_dump(tiny_tree(tmp_path, resources=resources)))
    words = ["plan", str(spec), "--address", growing, "--price", "0.5", "--storage", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "dray.cli", *words, "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["shape"]["num_addable"] == 2
    survey = Survey.model_validate(found["cluster"])
    assert (survey.workers, survey.wanted_workers) == (0, 2)
    assert (survey.addable_nodes, survey.addable_workers) == (2, 2)
    (head,) = survey.nodes
    disk = shutil.disk_usage("/tmp")
    assert head.scratch_bytes == disk.total
    assert head.scratch_free_bytes == pytest.approx(disk.free, rel=0.05)
    said = "0 of 2 workers have room by now: nodes that the autoscaler may add are waited for"
    assert said in survey.remarks()
    assert found["cost"]["price_per_hour"] == 1.0


def test_what_a_person_is_told_of_the_nodes():
    full = NodeRoom(
        address="10.0.0.1",
        workers=2,
        gpus=2.0,
        accelerator="H100",
        scratch_bytes=100 * 10**9,
        scratch_free_bytes=4 * 10**9,
    )
    empty = full.model_copy(
        update={"address": "10.0.0.2", "accelerator": "A100", "scratch_free_bytes": 6 * 10**9}
    )
    silent = NodeRoom(address="10.0.0.3", workers=0, gpus=0.0)
    alike = Survey(nodes=(empty, silent), wanted_workers=2, addable_nodes=0, addable_workers=0)
    assert alike.remarks() == []
    assert alike.describe() == [
        "2 nodes (A100 on 1) with room for 2 workers; 2 are wanted at least"
    ]
    mixed = alike.model_copy(update={"nodes": (full, empty, silent)})
    different, disk = mixed.remarks()
    assert "different GPUs (A100, H100)" in different
    assert "node 10.0.0.1: the disk of Ray's session has 4 GB free of 100 GB" in disk


@pytest.mark.slow
def test_a_run_makes_its_cluster_grow(growing: str, tiny_corpus: Path, tmp_path: Path):
    """Two ranks on nodes that were not there when it was planned."""
    spec, storage = tmp_path / "growing.yaml", str(tmp_path / "runs")
    spec.write_text(
        yaml.safe_dump(tiny_tree(tiny_corpus, resources={"workers": 2, "cpus_per_worker": 1.5}))
    )
    words = ["train", str(spec), "--storage", storage, "--address", growing]
    done = subprocess.run(
        [sys.executable, "-m", "dray.cli", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stderr
    assert Run.open(storage, "tiny").attempts()[0].num_ranks == 2


def begin(head: Growing, corpus: Path, folder: Path, **sections: Any) -> psutil.Popen:
    spec = folder / "spec.yaml"
    spec.write_text(yaml.safe_dump(tiny_tree(corpus, **sections)))
    words = ["train", str(spec), "--storage", str(folder / "runs"), "--address", head.address]
    with (folder / "log").open("wb") as log:
        return psutil.Popen(
            [sys.executable, "-m", "dray.cli", *words],
            stdout=log,
            stderr=log,
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        )


@pytest.mark.slow
def test_an_elastic_run_has_its_cluster_grow_and_go(
    from_none: Growing, tiny_corpus: Path, tmp_path: Path
):
    """From no node that could hold a rank to two and back, with one of them reclaimed on the way:
    what the run has read is proven by its ledger. Ray's provider for tests does not notice that a
    node is gone, so none comes in its place; tests/faults/test_nodes.py has a group that grows
    again. Six minutes."""
    process = begin(
        from_none,
        tiny_corpus,
        tmp_path,
        resources={"workers": [1, 2], "cpus_per_worker": 1.5},
        duration={"steps": 1_000_000},
        checkpoint={"every_steps": 100},
        batch={"global_rows": 16, "micro_rows": 1},
    )
    storage = str(tmp_path / "runs")

    def newest() -> tuple[int, int]:
        """Ranks and step."""
        run = Run.find(storage, "tiny")
        rows = run.metrics() if run else []
        return (rows[-1]["num_ranks"], rows[-1]["step"]) if rows else (0, 0)

    def reached(num_ranks: int, step: int) -> None:
        def is_there() -> bool:
            assert process.poll() is None, (tmp_path / "log").read_text()
            return newest()[0] == num_ranks and newest()[1] >= step

        wait_for(
            is_there,
            f"{num_ranks} ranks at step {step}",
            180,
            lambda: (newest(), (tmp_path / "log").read_text()[-2000:]),
        )

    reached(2, 150)
    assert len(from_none.nodes()) == 2
    kill_all(from_none.nodes()[0])  # reclaimed, without a notice
    reached(1, 200)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, (tmp_path / "log").read_text()
    sizes = [attempt.num_ranks for attempt in Run.open(storage, "tiny").attempts()]
    assert sizes[-2:] == [2, 1]
    done = subprocess.run(
        [sys.executable, "-m", "dray.cli", "verify", "tiny", "--ledger", "--storage", storage],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # What Ray Train has asked for in a run's name is forgotten after three minutes.
    wait_for(lambda: not from_none.nodes(), "the nodes that do nothing are given back", 300)


@pytest.mark.slow
@pytest.mark.parametrize("is_prepared", [False, True])
def test_nodes_that_never_come_end_the_run_in_the_time_that_was_given(
    from_none: Growing, tiny_corpus: Path, tmp_path: Path, is_prepared: bool
):
    """Each node that is added goes at once, as where a cloud has no capacity."""
    resources = {"workers": 2, "cpus_per_worker": 1.5, "wait_minutes": 0.75}
    storage = str(tmp_path / "runs")
    if is_prepared:
        spec = make_spec(tiny_tree(tiny_corpus, resources=resources))
        with connect(None, num_cpus=1):
            prepare(spec, storage)
    begun = time.monotonic()
    process = begin(from_none, tiny_corpus, tmp_path, resources=resources)
    while process.poll() is None:
        for node in from_none.nodes():
            kill_all(node)
        assert time.monotonic() - begun < 240, "it waits for ever"
        time.sleep(0.2)
    said = (tmp_path / "log").read_text()
    if is_prepared:
        assert process.returncode == 3, said
        assert "no group of 2 workers could start for" in said
        assert "the cluster has no room for it" in said
        assert Run.open(storage, "tiny").status == "failed"
    else:
        assert process.returncode == 2, said
        assert "no node with a CPU came within 45 s" in said
        assert Run.find(storage, "tiny") is None


@pytest.mark.slow
def test_an_autoscaler_that_does_not_go_by_labels_is_not_waited_for(
    tiny_corpus: Path, tmp_path: Path
):
    """Version 1 would add two plain nodes, and never one with the label."""
    with growing_head(**TWO_ZONES) as head:
        process = begin(head, tiny_corpus, tmp_path, resources={"labels": {"zone": "b"}})
        assert process.wait(60) == 2
    (said,) = (tmp_path / "log").read_text().splitlines()
    assert "resources.labels: zone=b: no node has it, and none with it may be added; " in said
    assert said.endswith("RAY_enable_autoscaler_v2=1 on the head")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_nodes_with_the_label_are_added(tiny_corpus: Path, tmp_path: Path):
    with growing_head(**TWO_ZONES, **VERSION_2) as head:
        limits = read_limits(head.address)
        assert limits is not None
        labels = {kind.name: kind.node.labels for kind in limits.types}
        assert labels == {"plain": {}, "labelled": {"zone": "b"}}
        resources = {"workers": 2, "cpus_per_worker": 1.5, "labels": {"zone": "b"}}
        process = begin(head, tiny_corpus, tmp_path, resources=resources)
        assert process.wait(300) == 0, (tmp_path / "log").read_text()
        nodes = GcsClient(address=head.address).get_all_node_info().values()
        assert sorted(node.labels.get("zone", "") for node in nodes) == ["", "b", "b"]
    assert Run.open(str(tmp_path / "runs"), "tiny").attempts()[0].num_ranks == 2
