"""How rows and hashes of a large corpus travel: in two steps, with the same result as in one, and
few reads."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.scale import count_opens
from dray.corpus import planning, prepare
from dray.corpus.planning import Deal, Plans, plan_bundles
from dray.spec import make_spec
from tiny import tiny_tree


def write_documents(folder: Path) -> Path:
    """Some files of texts, many of them more than once, in three classes."""
    rng = random.Random(1)
    folder.mkdir()
    for number in range(6):
        texts = [
            f"often {rng.randrange(200)}"
            if rng.random() < 0.1
            else " ".join(str(rng.getrandbits(9)) for _ in range(rng.randrange(3, 80)))
            for _ in range(600)
        ]
        lines = (json.dumps({"text": text, "label": len(text) % 3}) for text in texts)
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return folder


def run_here(
    job: Any, stage: str, function: Any, items: Sequence[Any], say: Any
) -> list[dict[str, Any]]:
    """A stage in this process; what it did is said."""
    say(f"{stage} {len(items)}")
    return [function(job, items[index]) for index in range(len(items))]


def prepare_here(
    tree: dict[str, Any], storage: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, list[str]]:
    """A corpus of many small chunks, partitions and shards, without Ray."""
    for place, name, value in (
        (planning, "SHARD_BYTES", 1 << 14),
        (planning, "MIN_PART_BYTES", 1 << 15),
        (prepare, "GROUP_ROWS", 16),
        (prepare, "LABELLED_GROUP_ROWS", 16),
        (prepare, "MIN_CHUNK_BYTES", 1 << 15),
        (prepare, "PARTITION_BYTES", 1 << 17),
        (prepare, "require_connected", lambda where: None),
        (prepare, "wait_for_cpu", lambda seconds, say: None),
        (prepare, "_check_seen", lambda inputs, placement: None),
        (prepare, "run_stage", run_here),
        (prepare, "run_task", lambda job, function, item: function(job, item)),
    ):
        monkeypatch.setattr(place, name, value)
    lines: list[str] = []
    return prepare.prepare(make_spec(tree), str(storage), lines.append), lines


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
def test_two_steps_give_what_one_step_gives(
    tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources apart, duplicates over all of them, held-out documents, labels: byte for byte."""
    folder = write_documents(tmp_path / "in")
    labelled = {} if task == "causal_lm" else {"label": "label"}
    train = [
        {"path": f"{folder}/{some}.jsonl", "weight": 1.0} | labelled for some in ("[01]", "[234]")
    ]
    validation = {"share": 0.1} if task == "causal_lm" else {"path": f"{folder}/5.jsonl"} | labelled
    architecture = "llama" if task == "causal_lm" else "bert"
    tree = tiny_tree(
        folder,
        task=task,
        data={"train": train, "validation": validation, "sequence_tokens": 32},
        model={"architecture": architecture},
    )
    one, lines = prepare_here(tree, tmp_path / "one", monkeypatch)
    assert {"hashes 0", "drops 0", "mixed 0"} <= set(lines)
    monkeypatch.setattr(planning, "DIRECT_READS", 8)
    two, lines = prepare_here(tree, tmp_path / "two", monkeypatch)
    assert not {"hashes 0", "drops 0", "mixed 0"} & set(lines)
    assert two.manifest == one.manifest
    assert len(one.manifest.train.sources[0].shards) > 4
    assert one.manifest.dropped["duplicate"] > 50


@settings(max_examples=60, deadline=None)
@given(
    num_chunks=st.integers(1, 9),
    num_shards=st.integers(1, 9),
    bundle=st.integers(1, 5),
    group=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_each_row_goes_to_its_shard_by_either_way(
    num_chunks: int, num_shards: int, bundle: int, group: int, seed: int
) -> None:
    """Rows as (chunk, place): what a shard reads from files in between is what it reads from the
    chunks."""
    counts = np.random.default_rng(seed).integers(0, 4, (num_chunks, num_shards))
    chunks = np.arange(num_chunks) * 3
    one, two = (Deal("train", 0, chunks, counts, *way) for way in ((0, 0), (bundle, group)))
    files = {
        f"packed/{chunk:06d}.train": [(chunk, place) for place in range(counts[index].sum())]
        for index, chunk in enumerate(chunks.tolist())
    }

    def read(slices: Any) -> list[tuple[int, int]]:
        for piece in slices:
            assert piece.rows_in_file == len(files[piece.file])
        return [
            row
            for piece in slices
            for row in files[piece.file][piece.start : piece.start + piece.num_rows]
        ]

    for index in range(two.num_mixes):
        mix = two.mix(index)
        shard_of = np.concatenate(
            [[], *(np.repeat(np.arange(len(row)), row) for row in mix.counts)]
        )
        rows = read(mix.slices)
        files[mix.file] = [rows[place] for place in np.argsort(shard_of, kind="stable").tolist()]
    found = [row for index in range(num_shards) for row in read(one.shard(index).slices)]
    assert sorted(found) == sorted(
        row for name, rows in files.items() if name.startswith("packed") for row in rows
    )
    for index in range(num_shards):
        assert read(two.shard(index).slices) == read(one.shard(index).slices)


def test_plans_are_numbered_through_all_deals() -> None:
    deals = [
        Deal("train", source, np.arange(2), np.ones((2, shards), np.int64), 0, 0)
        for source, shards in enumerate((2, 1, 3))
    ]
    plans = Plans(deals, lambda deal: deal.num_shards, Deal.shard)
    assert [(number, plan.source, plan.index) for number, plan in plans] == [
        (0, 0, 0),
        (1, 0, 1),
        (2, 1, 0),
        (3, 2, 0),
        (4, 2, 1),
        (5, 2, 2),
    ]
    assert len(plans[1:4]) == 3
    with pytest.raises(IndexError):
        plans[6]


def test_bundles_are_made_where_there_are_many_reads_and_never_of_too_many_documents() -> None:
    assert plan_bundles(100, 100, 10**6) == 1
    assert plan_bundles(4000, 2000, 4000 * 10**5) == 64
    assert plan_bundles(4000, 2000, 4000 * 10**6) == 8
    assert plan_bundles(4000, 2000, 4000 * 10**8) == 1


def test_ten_times_the_text_is_not_a_hundred_times_the_reads() -> None:
    small, large = (count_opens(size * 10**9)["all"] for size in (30, 300))
    assert large < 32 * small
    assert large < 150_000
