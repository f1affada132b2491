"""A head that comes back with its memory in Redis: what is still there, and what is not.

Two machines in network namespaces, Debian's redis-server, an S3 server as the storage.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lan import JOBS_PORT, Lan, Machine, lan, needs_lan, wait_for_nodes
from tiny import tiny_tree
from waiting import wait_for

pytestmark = [
    pytest.mark.slow,
    needs_lan,
    pytest.mark.skipif(
        shutil.which("redis-server") is None, reason="redis-server not installed (Debian)"
    ),
]
STEPS, REDIS_PORT = 60, 6390


@pytest.fixture
def site() -> Iterator[tuple[Lan, Callable[[], None]]]:
    """A head without CPUs and a machine for a rank and its reader; what starts the head."""
    with lan(2, network=84) as found:
        head, worker = found.machines
        password = secrets.token_hex(16)
        (head.folder / "redis.conf").write_text(
            f"bind {head.address}\nport {REDIS_PORT}\nrequirepass {password}\nsave ''\n"
        )
        # In the worker's list of processes: it outlives the head.
        redis = head.start("redis-server", str(head.folder / "redis.conf"), log="redis")
        head.processes.remove(redis)
        worker.processes.append(redis)
        deadline = time.monotonic() + 30
        ask = ["redis-cli", "-h", head.address, "-p", str(REDIS_PORT), "ping"]
        while "NOAUTH" not in (answer := head.run(*ask)).stdout + answer.stderr:
            assert time.monotonic() < deadline, answer
            time.sleep(0.2)
        environment = {
            "RAY_REDIS_ADDRESS": f"{head.address}:{REDIS_PORT}",
            "RAY_external_storage_namespace": "dray",
        }

        def start() -> None:
            head.start_ray("", "--redis-password", password, num_cpus=0, **environment)

        start()
        wait_for_nodes(head, 1)
        worker.start_ray(head.address, num_cpus=3)
        wait_for_nodes(head, 2)
        yield found, start


def node_ids(head: Machine) -> dict[str, str]:
    code = (
        "import sys, json; from ray._raylet import GcsClient\n"
        "nodes = GcsClient(address=sys.argv[1]).get_all_node_info()\n"
        "alive = {n.node_manager_address: i.hex() for i, n in nodes.items() if not n.state}\n"
        "print(json.dumps(alive))"
    )
    done = head.run(sys.executable, "-c", code, f"{head.address}:6379")
    return dict(json.loads(done.stdout))


def jobs(head: Machine) -> list[dict[str, Any]]:
    done = head.dray("runs", "--address", f"http://127.0.0.1:{JOBS_PORT}", "--json")
    return list(json.loads(done.stdout)) if done.returncode == 0 else []


def step_of(head: Machine, storage: str, run: str) -> int:
    done = head.dray("show", run, "--storage", storage, "--json")
    if done.returncode != 0:
        return 0
    return max((item["step"] for item in json.loads(done.stdout)["checkpoints"]), default=0)


def weights(head: Machine, storage: str, run: str) -> tuple[int, str]:
    done = head.dray("verify", run, "--storage", storage, "--json")
    found = json.loads(done.stdout)
    return found["step"], found["weights_sha256"]


def test_a_head_that_comes_back_knows_its_nodes_and_jobs(
    site: tuple[Lan, Callable[[], None]], tiny_corpus: Path
):
    found, start = site
    (head, worker), storage = found.machines, found.storage
    tree = tiny_tree(tiny_corpus, resources={"workers": 1}, duration={"steps": STEPS})
    tree |= {"checkpoint": {"every_steps": 10}}
    tree["batch"] = {"global_rows": 128, "micro_rows": 4}  # time for a fault to befall a step
    (head.folder / "spec.yaml").write_text(yaml.safe_dump(tree))
    plain = ["train", f"{head.folder}/spec.yaml", "--storage", storage, "--run"]
    assert head.dray(*plain, "alone").returncode == 0

    address = f"http://127.0.0.1:{JOBS_PORT}"
    supervisor = head.start(
        *(sys.executable, "-m", "dray.cli", "submit", "--supervise"),
        *(*plain[:1], "spec.yaml", "--storage", storage, "--run", "kept", "--address", address),
        log="supervisor",
    )
    head.processes.remove(supervisor)  # it is not on the head
    worker.processes.append(supervisor)
    deadline = time.monotonic() + 180
    while not step_of(head, storage, "kept"):
        assert supervisor.poll() is None, head.log("supervisor")
        assert time.monotonic() < deadline, head.log("supervisor")
    before = node_ids(head)
    head.kill()
    head.hide(head.folder / "r")  # another disk, as a new pod has
    start()

    def after() -> dict[str, str]:
        """Once the head that died is no more among those that live."""
        found = node_ids(head)
        return found if set(found) == set(before) and gone not in found.values() else {}

    gone = before[head.address]
    found_again = wait_for(after, "the head that came back", 90)
    assert found_again[worker.address] == before[worker.address], "the worker began anew"
    assert supervisor.wait(400) == 0, head.log("supervisor")
    known = [job for job in jobs(head) if job["run"] == "kept"]
    assert [job["status"] for job in known] == ["FAILED", "SUCCEEDED"], known
    assert weights(head, storage, "kept") == weights(head, storage, "alone")
