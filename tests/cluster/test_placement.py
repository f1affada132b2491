"""Which bundle each worker of a run is in, and what does not fit: arithmetic, without Ray."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from dray.cluster.autoscaler import HEAD_RESOURCE, Limits, NodeType, count_addable, make_limits
from dray.cluster.needs import KIND, Needs, Node, check_offered, has_room, make_worker_needs
from dray.cluster.placement import (
    Seats,
    find_seats,
    format_bundles,
    make_bundles,
    make_least_needs,
    make_needs,
    make_selectors,
)
from dray.errors import PlanError
from dray.spec import Resources

TWO = Resources(workers=2, cpus_per_worker=1.5)


def of_cpus(*cpus: float) -> list[Node]:
    return [Node({"CPU": amount}) for amount in cpus]


def test_the_bundles_of_a_run_seat_it():
    for resources in (
        TWO,
        Resources(workers=1, cpus_per_worker=0.5, reader_cpus=0.25),
        Resources(workers=3, gpus_per_worker=1, cpus_per_worker=4, reader_cpus=2),
        Resources(workers=(1, 4)),
    ):
        seats = find_seats(resources, make_bundles(resources))
        assert seats.workers == tuple(range(resources.max_workers))
        assert seats.reader == resources.max_workers


@pytest.mark.parametrize(
    ("bundles", "seats"),
    [
        ([{"CPU": 4}], Seats((0, 0), 0)),
        ([{"CPU": 1}, {"CPU": 3}], Seats((1, 1), 0)),
        ([{"CPU": 1.5}, {"CPU": 2.0}, {"CPU": 1.5}], Seats((0, 1), 2)),
        ([{"CPU": 1.5, "GPU": 1}, {"CPU": 2.5}], Seats((0, 1), 1)),
    ],
)
def test_workers_may_share_a_bundle_with_each_other_and_with_those_who_read(
    bundles: list[dict[str, float]], seats: Seats
):
    assert find_seats(TWO, bundles) == seats


def test_an_elastic_group_takes_what_there_is():
    elastic = Resources(workers=(2, 8))
    assert len(find_seats(elastic, [{"CPU": 4}]).workers) == 3
    assert len(find_seats(elastic, [{"CPU": 40}]).workers) == 8


@pytest.mark.parametrize(
    ("bundles", "said"),
    [
        ([{"CPU": 3}], "room for 1 worker; 2 workers × 1.5 CPUs, and 1 CPUs in one bundle"),
        ([{"CPU": 0.5}] * 9, "none of its bundles has 1 CPUs for reading"),
        ([{"GPU": 4}], "none of its bundles has 1 CPUs for reading"),
        ([], "none of its bundles"),
    ],
)
def test_what_does_not_fit_is_one_line(bundles: list[dict[str, float]], said: str):
    with pytest.raises(PlanError, match=r"placement: .*make_bundles") as refused:
        find_seats(TWO, bundles)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_empty_nodes_could_hold():
    assert has_room(of_cpus(1, 2, 2), make_needs(TWO))
    assert not has_room(of_cpus(2, 2), make_needs(TWO))
    assert not has_room(of_cpus(8), make_needs(Resources(gpus_per_worker=1)))
    assert has_room(of_cpus(2), make_least_needs(Resources(workers=(2, 9))))


# ---- cards and labels --------------------------------------------------------------------------

H100 = Resources(workers=2, gpus_per_worker=1, accelerator="H100")
IN_B = Resources(workers=2, labels={"zone": "b"})


def test_a_worker_asks_for_its_card_and_its_labels_and_those_who_read_for_neither():
    assert make_bundles(H100) == [{"CPU": 1, "GPU": 1, f"{KIND}H100": 0.001}] * 2 + [{"CPU": 1}]
    assert make_selectors(H100) == [{}] * 3
    assert make_bundles(IN_B) == [{"CPU": 1}] * 3
    assert make_selectors(IN_B) == [{"zone": "b"}] * 2 + [{}]
    both = H100.model_copy(update={"labels": {"zone": "b"}})
    assert format_bundles(make_needs(both)) == "2 × (1 CPU, 1 GPU, H100, zone=b) + (1 CPU)"


@pytest.mark.parametrize(
    ("value", "matching"),
    [("b", ["b"]), ("!b", ["a", None]), ("in(a, b)", ["a", "b"]), ("!in(a, b)", [None])],
)
def test_labels_match_as_ray_matches_them(value: str, matching: list[str | None]):
    needs = make_worker_needs(Resources(labels={"zone": value}))
    found = [
        zone for zone in ("a", "b", None) if needs.matches({"zone": zone} if zone else {"x": "y"})
    ]
    assert found == matching
    assert not needs.matches(None)  # whoever adds that node does not go by labels
    assert Needs({"CPU": 1}).matches(None)


def test_only_nodes_with_the_card_and_the_labels_have_room():
    a100, h100 = ({"CPU": 8.0, "GPU": 2.0, f"{KIND}{name}": 1.0} for name in ("A100", "H100"))
    assert not has_room([Node(a100), Node(a100)], make_needs(H100))
    assert has_room([Node(a100), Node(h100)], make_needs(H100))
    in_a, in_b = (Node({"CPU": 2.0}, {"zone": zone}) for zone in ("a", "b"))
    assert not has_room([in_a, in_a], make_needs(IN_B))
    assert not has_room([in_b], make_needs(IN_B))
    # Those who read may be anywhere, and leave the nodes of the workers to them.
    wide = IN_B.model_copy(update={"reader_cpus": 2.0})
    assert has_room([in_b, in_a], make_needs(wide))


def test_the_bundles_of_a_given_group_must_have_the_card():
    bundles = make_bundles(H100)
    assert find_seats(H100, bundles) == Seats((0, 1), 2)
    whole = {"CPU": 3.0, "GPU": 2.0, f"{KIND}H100": 0.002}
    assert find_seats(H100, [whole]) == Seats((0, 0), 0)
    others = [{"CPU": 1.0, "GPU": 1.0}] * 2 + [{"CPU": 1.0}]
    with pytest.raises(PlanError, match=r"room for 0 workers; .* \(accelerator_type:H100"):
        find_seats(H100, others)


CARDS = [
    Node({"CPU": 8.0, "GPU": 1.0, f"{KIND}{name}": 1.0}, {"zone": zone, "ray.io/node-id": name})
    for name, zone in (("H100", "a"), ("A10G", "b"))
]


@pytest.mark.parametrize(
    ("asked", "nodes", "said"),
    [
        (
            {"accelerator": "H10"},
            CARDS,
            "resources.accelerator = H10: no node has one, and none with one may be added; "
            "there are A10G, H100; did you mean H100?",
        ),
        ({"accelerator": "T4"}, [Node({"CPU": 1})], "no node names its GPUs; accelerator=null"),
        ({"labels": {"zone": "c"}}, CARDS, "zone=c: no node has it, .* of zone there are a, b;"),
        ({"labels": {"zoen": "a"}}, CARDS, "there are the labels zone; did you mean zone?"),
        ({"labels": {"zone": "a"}}, [Node({})], "no node has a label; labels={} takes any node"),
        (
            {"labels": {"zone": "a"}},
            [Node({}), Node({}, None)],
            "an autoscaler that goes by labels is version 2: RAY_enable_autoscaler_v2=1",
        ),
        (
            {"accelerator": "H100", "labels": {"zone": "b"}},
            CARDS,
            "zone=b: no node with H100 has it, .* of zone there are a",
        ),
        (
            {"accelerator": "H100", "labels": {"zone": "a"}, "cpus_per_worker": 9},
            CARDS,
            "a worker takes 9 CPU, 1 GPU, H100, zone=a; no node .* has room for one",
        ),
    ],
)
def test_what_no_node_has_is_named_beside_what_there_is(
    asked: dict[str, Any], nodes: list[Node], said: str
):
    gpus = {"gpus_per_worker": 1} if "accelerator" in asked else {}
    with pytest.raises(PlanError) as refused:
        check_offered(make_worker_needs(Resources(**gpus, **asked)), nodes)
    assert re.search(said.replace("(", r"\(").replace("?", r"\?"), str(refused.value))
    assert "\n" not in str(refused.value)


def test_what_some_node_has_is_not_refused():
    worker = make_worker_needs(H100.model_copy(update={"labels": {"zone": "!b"}}))
    check_offered(worker, CARDS)
    check_offered(Needs({"CPU": 1_000}), CARDS)  # of amounts alone the plan speaks


# ---- nodes that are still to come --------------------------------------------------------------

SMALL, LARGE = Node({"CPU": 2.0}, None), Node({"CPU": 8.0, "GPU": 1.0}, None)


def every(node: Node) -> bool:
    return True


def node(resources: Mapping[str, float], label: str = "") -> dict[str, object]:
    return {"Resources": resources, "Labels": {"ray.io/node-group": label} if label else {}}


HEAD = node({"CPU": 1.0, HEAD_RESOURCE: 1.0})


def test_the_nodes_that_may_still_join_are_those_of_the_limits_without_those_that_have():
    limits = Limits((NodeType("small", SMALL, 3), NodeType("large", LARGE, 2)), 4)
    assert count_addable(limits, [HEAD], 9, every) == [SMALL] * 3 + [LARGE]
    assert count_addable(limits, [HEAD], 1, every) == [SMALL, LARGE]
    there = [HEAD, node(LARGE.resources), node({}, "small")]
    assert count_addable(limits, there, 9, every) == [SMALL] * 2
    assert count_addable(limits, [HEAD, *[node(SMALL.resources)] * 9], 9, every) == []
    # Kinds that are of no use take no room from others.
    assert count_addable(limits, [HEAD], 9, lambda has: has == LARGE) == [LARGE] * 2


def test_the_limits_of_a_file_that_ray_up_takes():
    config = {
        "max_workers": 5,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 1}, "max_workers": 0},
            "small": {"resources": {"CPU": 2}, "max_workers": 3, "labels": {"zone": "b"}},
            "large": {"resources": {"CPU": 8, "GPU": 1}},
        },
    }
    assert make_limits(config, with_labels=False) == Limits(
        (NodeType("small", SMALL, 3), NodeType("large", LARGE, 5)), 5
    )
    small, large = make_limits(config, with_labels=True).types
    assert (small.node, large.node.labels) == (Node({"CPU": 2.0}, {"zone": "b"}), {})
    assert make_limits({}, with_labels=False) == Limits((), 2)
