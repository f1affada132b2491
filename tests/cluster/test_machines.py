"""Runs over several machines: network namespaces with addresses of their own, and an S3 server as
the only storage that they share. Each ends with the very weights of one machine alone."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

import metadata
from lan import GCS_PORT, Lan, Machine, lan, needs_lan, wait_for_nodes
from ports import free_ports
from tiny import tiny_tree

pytestmark = [pytest.mark.slow, needs_lan]
STEPS = 80


@pytest.fixture(scope="module")
def spec(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("spec") / "spec.yaml"
    # A rank to a machine of two CPUs, and the reader on the head's one.
    tree = tiny_tree(tiny_corpus, resources={"workers": 2, "cpus_per_worker": 1.5})
    tree |= {"duration": {"steps": STEPS}, "checkpoint": {"every_steps": 10}}
    tree["batch"] = {"global_rows": 128, "micro_rows": 4}  # time for a fault to befall a step
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.fixture(scope="module")
def site() -> Iterator[Lan]:
    """A head, two machines for a rank each, and a spare one that has not joined."""
    with lan(4) as found:
        head, *workers, _ = found.machines
        head.start_ray(num_cpus=1)
        wait_for_nodes(head, 1)
        for worker in workers:
            worker.start_ray(head.address)
        wait_for_nodes(head, 3)
        yield found


@pytest.fixture(scope="module")
def alone(site: Lan, spec: str) -> dict[str, Any]:
    """What two ranks on one machine come to."""
    words = ["train", spec, "--storage", site.storage, "--run", "alone"]
    done = site.machines[3].dray(*words)
    assert done.returncode == 0, done.stderr
    return weights(site.machines[3], site, "alone")


def weights(machine: Machine, site: Lan, run: str) -> dict[str, Any]:
    done = machine.dray("verify", run, "--storage", site.storage, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {key: found[key] for key in ("step", "ok", "weights_sha256")}


def shown(machine: Machine, site: Lan, run: str) -> dict[str, Any]:
    done = machine.dray("show", run, "--storage", site.storage, "--json")
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


def begin(site: Lan, spec: str, run: str, *more: str) -> psutil.Popen:
    head = site.machines[0]
    words = ["train", spec, "--storage", site.storage, "--run", run, *more]
    address = ["--address", f"{head.address}:{GCS_PORT}"]
    return head.start(sys.executable, "-m", "dray.cli", *words, *address, log=run)


def at_step(site: Lan, run: str, step: int, fault: Callable[[], None], seconds: float = 180):
    """Have a fault happen once the run has come so far."""
    deadline = time.monotonic() + seconds
    while shown(site.machines[0], site, run).get("step", 0) < step:
        assert time.monotonic() < deadline, site.machines[0].log(run)
    fault()


def ended(process: psutil.Popen, site: Lan, run: str) -> None:
    assert process.wait(400) == 0, site.machines[0].log(run)


def test_two_machines_come_to_the_weights_of_one(site: Lan, spec: str, alone: dict[str, Any]):
    ended(begin(site, spec, "two"), site, "two")
    assert alone["ok"]
    assert alone["step"] == STEPS
    assert weights(site.machines[0], site, "two") == alone


def test_over_a_slow_link_they_do_too(site: Lan, spec: str, alone: dict[str, Any]):
    slow = site.machines[1]
    slow.slow("10mbit")
    try:
        ended(begin(site, spec, "slow"), site, "slow")
    finally:
        slow.slow("")
    assert weights(site.machines[0], site, "slow") == alone


def test_a_machine_that_is_cut_off_and_comes_back(site: Lan, spec: str, alone: dict[str, Any]):
    """Its rank can tell nobody of its end, and another machine takes its place; what comes back
    finds itself replaced."""
    head, cut, _, spare = site.machines
    process = begin(site, spec, "cut")
    at_step(site, "cut", 12, cut.cut)
    spare.start_ray(head.address)
    ended(process, site, "cut")
    found = shown(head, site, "cut")
    cut.heal()
    assert weights(head, site, "cut") == alone
    assert [item["status"] for item in found["attempts"]] == ["failed", "completed"]
    assert found["attempts"][0]["reason"] == "node_loss"
    wait_for_nodes(head, 3)  # the one that was given up has ended itself
    time.sleep(5)
    assert weights(head, site, "cut") == alone  # and has written nothing
    cut.kill()
    spare.kill()
    wait_for_nodes(head, 2)
    cut.start_ray(head.address)
    wait_for_nodes(head, 3)


def test_a_machine_that_loses_its_power(site: Lan, spec: str, alone: dict[str, Any]):
    head, dead, _, spare = site.machines
    process = begin(site, spec, "dead")
    at_step(site, "dead", 12, dead.kill)
    spare.start_ray(head.address)
    ended(process, site, "dead")
    assert weights(head, site, "dead") == alone
    spare.kill()
    wait_for_nodes(head, 2)
    dead.start_ray(head.address)
    wait_for_nodes(head, 3)


def test_a_storage_that_one_machine_does_not_see_is_refused(site: Lan, spec: str, tmp_path: Path):
    head, blind = site.machines[:2]
    blind.kill()
    wait_for_nodes(head, 2)
    hidden = tmp_path / "here"
    hidden.mkdir()
    blind.hide(hidden)
    try:
        blind.start_ray(head.address)
        wait_for_nodes(head, 3)
        words = ["train", spec, "--storage", str(hidden / "runs"), "--run", "unseen"]
        done = head.dray(*words, "--address", f"{head.address}:{GCS_PORT}")
        assert done.returncode == 2, done.stderr
        assert blind.address in done.stderr
        assert not (hidden / "runs" / "unseen").exists()

        texts = hidden / "texts"
        shutil.copytree(
            Path(yaml.safe_load(Path(spec).read_text())["data"]["train"][0]).parent, texts
        )
        next(texts.iterdir()).unlink()  # another corpus than the one that is prepared
        words = ["train", spec, "--storage", site.storage, "--run", "unread"]
        more = [f"data.train=[{texts}/*.jsonl]", "--address", f"{head.address}:{GCS_PORT}"]
        done = head.dray(*words, *more)
        assert done.returncode == 2, done.stderr
        assert blind.address in done.stderr
    finally:
        blind.kill()
        wait_for_nodes(head, 2)
        blind.unhide(hidden)
        blind.start_ray(head.address)
        wait_for_nodes(head, 3)


def test_a_notice_of_the_cloud_has_the_run_save_and_go_on_elsewhere(
    site: Lan, spec: str, alone: dict[str, Any], tmp_path: Path
):
    """By the metadata server of a spot instance, on the loopback of the machine that is to go."""
    head, going, _, spare = site.machines
    going.kill()
    wait_for_nodes(head, 2)
    notice, (port,) = tmp_path / "notice", free_ports(1)
    server = Path(metadata.__file__)
    going.start(sys.executable, str(server), "aws", str(port), str(notice), log="metadata")
    going.start_ray(
        head.address,
        AWS_EC2_METADATA_SERVICE_ENDPOINT=f"http://127.0.0.1:{port}",
        AWS_EC2_METADATA_DISABLED="false",
    )
    wait_for_nodes(head, 3)
    process = begin(site, spec, "spot")
    at_step(site, "spot", 12, lambda: notice.write_text("120"))
    spare.start_ray(head.address)
    ended(process, site, "spot")
    check_noticed(site, "spot", alone)
    going.kill()
    spare.kill()
    wait_for_nodes(head, 2)
    going.start_ray(head.address)
    wait_for_nodes(head, 3)


def test_a_node_that_leaves_has_the_run_save_and_go_on_elsewhere(
    site: Lan, spec: str, alone: dict[str, Any]
):
    """As before a pod of Kubernetes ends."""
    head, going, _, spare = site.machines
    process = begin(site, spec, "left")

    def leave() -> None:
        begun = time.monotonic()
        address = f"{head.address}:{GCS_PORT}"
        done = going.dray("leave", "--seconds", "60", "--address", address)
        assert done.returncode == 0, done.stderr
        assert time.monotonic() - begun < 50, "it did not notice that the rank had gone"
        going.kill()
        spare.start_ray(head.address)

    at_step(site, "left", 12, leave)
    ended(process, site, "left")
    check_noticed(site, "left", alone)


def check_noticed(site: Lan, run: str, alone: dict[str, Any]) -> None:
    head = site.machines[0]
    assert weights(head, site, run) == alone
    found = shown(head, site, run)["attempts"]
    assert [(item["status"], item.get("reason", "")) for item in found] == [
        ("failed", "preemption"),
        ("completed", ""),
    ]
    assert found[1]["start_step"] == found[0]["end_step"], "a step was done again"
