"""A cluster whose nodes differ by labels and by GPUs: runs are on those that they ask for, and what
no node has is refused before anything is written.

The GPUs are numbers that Ray is told, as a person may: what is placed on them does not compute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dray.cluster.local_ray import OPEN_CLUSTER
from dray.runs import Run
from tiny import tiny_tree

ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled"}
CLUSTER = """
    import sys
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    cluster.add_node(num_cpus=1, include_dashboard=False, labels={"zone": "head"})
    for zone, cpus, card in (("a", 4, "A10G"), ("b", 3, "H100")):
        cluster.add_node(num_cpus=cpus, num_gpus=2, labels={"zone": zone},
                         resources={f"accelerator_type:{card}": 1})
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a head of one CPU, and two nodes with two GPUs each: four CPUs and A10Gs in zone a, three
    CPUs and H100s in zone b."""
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CLUSTER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout is not None
        try:
            found = next(line.strip() for line in process.stdout)
            ENVIRONMENT[OPEN_CLUSTER] = found.rpartition(":")[0]
            yield found
        finally:
            process.communicate()  # its standard input closes, and it ends


def run_script(script: str, *words: str, seconds: float = 120) -> Any:
    """What a process of its own prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def dray(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dray.cli", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=ENVIRONMENT,
    )


def write_spec(corpus: Path, folder: Path, **resources: Any) -> str:
    file = folder / "spec.yaml"
    resources = {"workers": 2, "cpus_per_worker": 1.5, **resources}
    file.write_text(yaml.safe_dump(tiny_tree(corpus, resources=resources)))
    return str(file)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["resources.labels={zone: c}"],
            "resources.labels: zone=c: no node has it, and none with it may be added; of zone "
            "there are a, b, head; labels={} takes any node",
        ),
        (
            ["resources.gpus_per_worker=1", "resources.accelerator=H200"],
            "resources.accelerator = H200: no node has one, and none with one may be added; there "
            "are A10G, H100; did you mean H100?",
        ),
        (
            ["resources={gpus_per_worker: 1, accelerator: H100, labels: {zone: a}}"],
            "resources.labels: zone=a: no node with H100 has it, and none with it may be added; "
            "of zone there are b; labels={} takes any node",
        ),
        (
            ["resources.labels={zone: b}", "resources.cpus_per_worker=4"],
            "resources: a worker takes 4 CPU, zone=b; no node with that GPU and those labels has "
            "room for one, there or still to be added; give workers less",
        ),
    ],
)
def test_what_no_node_has_is_refused_before_anything_is_written(
    words: list[str], said: str, address: str, tiny_corpus: Path, tmp_path: Path
):
    spec = write_spec(tiny_corpus, tmp_path)
    done = dray("train", spec, "--address", address, "--storage", f"{tmp_path}/runs", *words)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr.splitlines()[-1]
    assert os.listdir(tmp_path) == ["spec.yaml"]


def test_a_group_is_planned_for_and_put_on_the_nodes_of_its_card_and_labels(address: str):
    """Of two workers; those who read are where they fit."""
    found = run_script(
        """
        import json, sys
        import ray
        from dray.cluster.needs import make_worker_needs
        from dray.cluster.nodes import live_shape
        from dray.cluster.placement import reserved
        from dray.cluster.survey import survey_cluster
        from dray.spec import Resources

        ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
        zones = {node["NodeID"]: node["Labels"]["zone"] for node in ray.nodes()}
        found = []
        for asked in (
            {"gpus_per_worker": 1, "accelerator": "A10G"},
            {"gpus_per_worker": 1, "accelerator": "H100"},
            {"labels": {"zone": "in(b, c)"}},
            {"labels": {"zone": "!b"}},
        ):
            resources = Resources(workers=2, **asked)
            shape = live_shape(make_worker_needs(resources), 2)
            with reserved(resources) as placement:
                assert placement.group.wait(60)
                table = ray.util.placement_group_table(placement.group)
                places = [zones[table["bundles_to_node_id"][index]] for index in (0, 1)]
            card = shape.accelerator and shape.accelerator.name
            found.append([places, shape.num_nodes, shape.cpus_per_node, card,
                          survey_cluster(resources).workers])
        print(json.dumps(found))
        """,
        address,
    )
    assert found == [
        [["a", "a"], 1, 4.0, "A10G", 2],
        [["b", "b"], 1, 3.0, "H100", 2],
        [["b", "b"], 1, 3.0, "H100", 3],
        [["a", "a"], 2, 1.0, None, 5],
    ]


def test_a_given_group_that_was_made_without_the_labels_is_refused(
    address: str, tiny_corpus: Path, tmp_path: Path
):
    said = run_script(
        """
        import json, sys
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from dray.cluster.placement import Placement, make_bundles
        from dray.errors import PlanError
        from dray.spec import load_spec
        from dray.train import train

        address, spec, storage = sys.argv[1:]
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        spec = load_spec(spec, ["resources.labels={zone: b}", "resources.cpus_per_worker=1"])
        group = placement_group(make_bundles(spec.resources),
                                bundle_label_selector=[{"zone": "a"}] * 3)
        try:
            train(spec, storage=storage, placement=Placement(group))
        except PlanError as error:
            print(json.dumps(str(error)))
        remove_placement_group(group)
        """,
        address,
        write_spec(tiny_corpus, tmp_path),
        str(tmp_path / "runs"),
    )
    assert "placement: its bundle 0 is on " in said
    assert "zone=b; make the group with bundle_label_selector=make_selectors(" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_both_ranks_are_on_the_node_with_the_label(address: str, tiny_corpus: Path, tmp_path: Path):
    """Though another node has more room."""
    zones = run_script(
        """
        import json, sys
        import ray
        from dray.spec import load_spec
        from dray.train import train

        address, spec, storage = sys.argv[1:]
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        zones = {node["NodeID"]: node["Labels"]["zone"] for node in ray.nodes()}
        found = set()

        def look(row):
            for key, actor in ray._private.state.actors().items():
                if actor["ActorClassName"] == "RayTrainWorker" and actor["State"] == "ALIVE":
                    found.add((key, zones[actor["Address"]["NodeID"]]))

        spec = load_spec(spec, ["resources.labels={zone: b}"])
        assert train(spec, storage=storage, observer=look).status == "completed"
        print(json.dumps([zone for _, zone in found]))
        """,
        address,
        write_spec(tiny_corpus, tmp_path),
        str(tmp_path / "runs"),
        seconds=300,
    )
    assert zones == ["b", "b"]
    assert Run.open(str(tmp_path / "runs"), "tiny").attempts()[0].num_ranks == 2
