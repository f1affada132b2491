"""A cluster that grows, on one machine: Ray's autoscaler with nodes that are processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from dray.cluster.autoscaler import Limits, NodeType, read_limits
from dray.cluster.nodes import answers
from dray.cluster.survey import NodeRoom, Survey
from dray.runs import Run
from ports import free_ports
from tiny import tiny_tree

CONFIG: dict[str, Any] = {
    "cluster_name": "fake_multinode",
    "max_workers": 2,
    "provider": {
        "type": "fake_multinode",
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
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


@pytest.fixture(scope="module")
def growing() -> Iterator[str]:
    """The address of a head with one CPU, whose autoscaler may add two nodes of two."""
    with tempfile.TemporaryDirectory(prefix="grow", dir="/tmp") as folder:
        config, (port, *others) = Path(folder, "config.yaml"), free_ports(4)
        provider = {**CONFIG["provider"], "gcs_address": f"127.0.0.1:{port}"}
        config.write_text(yaml.safe_dump({**CONFIG, "provider": provider}))
        options = {
            "port": port,
            "dashboard-port": others[0],
            "dashboard-agent-listen-port": others[1],
            "ray-client-server-port": others[2],
            "temp-dir": f"{folder}/r",
            "autoscaling-config": config,
            "num-cpus": 1,
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
            },
        )
        try:
            deadline = time.monotonic() + 90
            address = f"127.0.0.1:{port}"
            while not answers("127.0.0.1", port) or read_limits(address) is None:
                assert process.poll() is None, "the head has ended"
                assert time.monotonic() < deadline, "no autoscaler"
                time.sleep(0.5)
            yield address
        finally:
            for one in [*process.children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()


def test_the_shape_counts_what_may_still_be_added(growing: str):
    assert read_limits(growing) == Limits((NodeType("two", {"CPU": 2.0}, 2),), 2)
    assert read_limits("127.0.0.1:1") is None
    code = (
        "import sys\n"
        "from dray.cluster.connection import connect\n"
        "for num_workers in (1, 2):\n"
        "    cpus = 3 - num_workers\n"
        "    with connect(sys.argv[1], num_cpus=1, cpus_per_worker=cpus,\n"
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
