"""Which bundle each worker of a run is in, and what does not fit: arithmetic, without Ray."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from dray.cluster.autoscaler import HEAD_RESOURCE, Limits, NodeType, count_addable, make_limits
from dray.cluster.nodes import has_room
from dray.cluster.placement import Seats, find_seats, make_bundles, make_least_bundles
from dray.errors import PlanError
from dray.spec import Resources

TWO = Resources(workers=2, cpus_per_worker=1.5)


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
    assert has_room([{"CPU": 1}, {"CPU": 2}, {"CPU": 2}], make_bundles(TWO))
    assert not has_room([{"CPU": 2}, {"CPU": 2}], make_bundles(TWO))
    assert not has_room([{"CPU": 8}], make_bundles(Resources(gpus_per_worker=1)))
    assert has_room([{"CPU": 2}], make_least_bundles(Resources(workers=(2, 9))))


# ---- nodes that are still to come --------------------------------------------------------------

SMALL, LARGE = {"CPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}


def every(has: Mapping[str, float]) -> bool:
    return True


def node(resources: dict[str, float], label: str = "") -> dict[str, object]:
    return {"Resources": resources, "Labels": {"ray.io/node-group": label} if label else {}}


HEAD = node({"CPU": 1.0, HEAD_RESOURCE: 1.0})


def test_the_nodes_that_may_still_join_are_those_of_the_limits_without_those_that_have():
    limits = Limits((NodeType("small", SMALL, 3), NodeType("large", LARGE, 2)), 4)
    assert count_addable(limits, [HEAD], 9, every) == [SMALL] * 3 + [LARGE]
    assert count_addable(limits, [HEAD], 1, every) == [SMALL, LARGE]
    assert count_addable(limits, [HEAD, node(LARGE), node({}, "small")], 9, every) == [SMALL] * 2
    assert count_addable(limits, [HEAD, *[node(SMALL)] * 9], 9, every) == []
    # Kinds that are of no use take no room from others.
    assert count_addable(limits, [HEAD], 9, lambda has: has == LARGE) == [LARGE] * 2


def test_the_limits_of_a_file_that_ray_up_takes():
    config = {
        "max_workers": 5,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 1}, "max_workers": 0},
            "small": {"resources": {"CPU": 2}, "max_workers": 3},
            "large": {"resources": {"CPU": 8, "GPU": 1}},
        },
    }
    assert make_limits(config) == Limits(
        (NodeType("small", SMALL, 3), NodeType("large", LARGE, 5)), 5
    )
    assert make_limits({}) == Limits((), 2)
