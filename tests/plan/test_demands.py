"""What a run takes of its storage and of its time, by its plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dray.corpus import planning, prepare, shards, stream
from dray.plan import Plan, format_plan, free_disk_bytes, make_demands, make_plan, parse_shape
from dray.plan import demands as figures
from dray.spec import Spec, make_spec
from dray.storage.filesystem import open_filesystem
from small_disk import small_disk
from tiny import tiny_tree

MB = 10**6


def planned(num_rows: int | None = 5000, shape: str = "", **sections: Any) -> tuple[Spec, Plan]:
    spec = make_spec(tiny_tree(Path("none"), **sections))
    plan = make_plan(
        spec, parse_shape(shape or "1xCPU(cpus=8,memory=64GB)"), num_rows=num_rows, vocab_size=512
    )
    return spec, plan


@pytest.mark.parametrize(
    ("checkpoint", "num", "kept"),
    [
        ({}, 1, 1),
        ({"every_steps": 40, "keep_last": 9}, 3, 3),
        ({"every_steps": 10, "keep_last": 2}, 10, 3),
        ({"every_steps": 10, "keep_last": 2, "keep_best": 3}, 10, 6),
        ({"every_minutes": 1e6}, 1, 1),
    ],
)
def test_checkpoints_that_are_there_at_once(
    checkpoint: dict[str, Any], num: int, kept: int
) -> None:
    """Those that are kept and the one that is written: a run of 100 steps."""
    spec, plan = planned(checkpoint=checkpoint, duration={"steps": 100})
    found = make_demands(spec, plan)
    assert (found.num_checkpoints, found.kept_checkpoints) == (num, kept)
    assert found.checkpoints_bytes == kept * plan.checkpoint_bytes
    assert plan.shard_bytes is not None
    total = plan.shard_bytes + found.checkpoints_bytes + found.records_bytes
    assert found.total_bytes == total
    assert found.requests is None


def test_what_is_not_known_before_the_corpus_is() -> None:
    every = {"every_steps": 10}
    spec, plan = planned(None, checkpoint=every, duration={"steps": None, "epochs": 2})
    found = make_demands(spec, plan, with_requests=True)
    assert (found.num_checkpoints, found.kept_checkpoints, found.total_bytes) == (None, 3, None)
    assert found.requests is not None
    assert found.requests.total_puts is found.requests.total_gets is None
    assert "after preparing" in format_plan(plan, found)


def test_a_long_run_that_saves_at_its_end_alone_gets_nowhere() -> None:
    """A month on 10,000 GPUs, which fail every five hours."""
    sizes = {"hidden_size": 4096, "num_layers": 32, "num_heads": 32}
    group = {"workers": 10_000, "gpus_per_worker": 1, "cpus_per_worker": 4}
    sections = {
        "model": {"architecture": "llama", **sizes},
        "batch": {"global_rows": 10_000, "micro_rows": 1},
        "duration": {"steps": 10_000_000},
        "resources": group,
        "precision": "bf16",
    }
    found = {
        name: make_demands(*planned(shape="1250x8xH100", **sections, checkpoint=rule))
        for name, rule in (
            ("never", {}),
            ("daily", {"every_minutes": 24 * 60}),
            ("auto", "auto"),
        )
    }
    goodput = {name: demands.goodput or 0.0 for name, demands in found.items()}
    assert goodput["never"] == 0.0
    assert found["never"].seconds_with_failures is None
    assert goodput["daily"] == pytest.approx(0.042, abs=0.002)
    assert goodput["auto"] > 0.97
    _, plan = planned(shape="1250x8xH100", **sections)
    assert "never" in format_plan(plan, found["never"])
    assert plan.save_interval is not None
    assert found["auto"].save_seconds == plan.save_interval.seconds


def test_the_figures_are_those_of_the_corpus() -> None:
    """They lie above what a plan may import."""
    assert (figures.GROUP_ROWS, figures.LABELLED_GROUP_ROWS) == (
        prepare.GROUP_ROWS,
        prepare.LABELLED_GROUP_ROWS,
    )
    assert (figures.LEAST_SHARD_BYTES, figures.MOST_SHARD_BYTES) == (
        planning.SHARD_BYTES,
        planning.MAX_SHARD_BYTES,
    )
    assert figures.OPEN_SHARDS == shards.CACHED_SHARDS
    assert (figures.BLOCK_BYTES, figures.SEGMENT_BYTES) == (
        stream.BLOCK_BYTES,
        stream.SEGMENT_BYTES,
    )


def test_free_bytes_of_a_place_that_is_not_there_yet(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8) as disk:
        assert free_disk_bytes(disk / "runs" / "of" / "mine") == 8 * 2**20
    filesystem, path = open_filesystem(str(tmp_path))
    assert free_disk_bytes(path) > 0
    assert filesystem is not None
