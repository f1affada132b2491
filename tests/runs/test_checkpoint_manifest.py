"""Where the parts of a checkpoint lie: written down in a few numbers, and refused where it does not
add up."""

from __future__ import annotations

import json
import math
import pickle
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dray.errors import StoreError
from dray.runs import CheckpointReader, Fragment, RankFile, Run, verify_checkpoint
from dray.runs.checkpoint_manifest import CheckpointManifest, Fragments, Partition, make_sha256
from dray.runs.layout import make_rank_file
from dray.storage.filesystem import read_bytes, write_bytes
from sharded_model import SHAPES, make_whole, save

STATES = ("param", "exp_avg", "exp_avg_sq")


def make_files(num_ranks: int, shapes: dict[str, list[int]]) -> list[RankFile]:
    """What ranks write under ZeRO-3: rank r holds elements from r · partition on."""
    files = []
    for rank in range(num_ranks):
        fragments = []
        for name, shape in shapes.items():
            size = math.prod(shape)
            share = -(-size // num_ranks)
            length = max(0, min(share, size - rank * share))
            fragments += [Fragment(name, state, rank * share, length) for state in STATES if length]
        files.append(
            RankFile(
                rank, make_rank_file(rank, num_ranks), 100, "0" * 64, Fragments.make(fragments)
            )
        )
    return files


@pytest.mark.parametrize(
    ("num_ranks", "flat"), [(1, True), (3, True), (7, True), (2, False), (7, False), (40, False)]
)
def test_any_range_from_any_way_of_dealing_out(local_run: Run, num_ranks: int, flat: bool) -> None:
    info, whole = save(local_run, 1, num_ranks, flat=flat), make_whole(1)
    with CheckpointReader(local_run, info) as reader:
        for name, shape in SHAPES.items():
            size = math.prod(shape)
            for start, count in (
                (0, size),
                (size // 2, size - size // 2),
                (size, 0),
                (0, 1),
                (size - 1, 1),
            ):
                assert torch.equal(
                    reader.read(name, "exp_avg", start, count),
                    whole[name, "exp_avg"][start : start + count],
                )


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    num_ranks=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=80)
def test_what_is_written_down_is_what_was_dealt_out(
    sizes: list[int], num_ranks: int, seed: int
) -> None:
    """Cut at random places and dealt to random ranks, or in equal parts: every element is found
    where it was put."""
    rng, shapes = random.Random(seed), {f"w{number}": [size] for number, size in enumerate(sizes)}
    per_rank: list[list[Fragment]] = [[] for _ in range(num_ranks)]
    for name, (size,) in shapes.items():
        cuts = sorted({0, size, *(rng.randint(0, size) for _ in range(rng.randint(0, 4)))})
        for start, stop in zip(cuts, cuts[1:] or [0], strict=False):
            per_rank[rng.randrange(num_ranks)].append(Fragment(name, "param", start, stop - start))
    files = [
        RankFile(rank, make_rank_file(rank, num_ranks), 1, "", Fragments.make(fragments))
        for rank, fragments in enumerate(per_rank)
    ]
    manifest = CheckpointManifest.make(
        1, 1, pickle.loads(pickle.dumps(files)), {"shapes": shapes}, "here"
    )
    places = CheckpointManifest.from_bytes(manifest.to_bytes(), "here").places("here")
    for rank, fragments in enumerate(per_rank):
        for fragment in fragments:
            for element in range(fragment.start, fragment.start + fragment.length):
                key = fragment.parameter, "param"
                (piece,) = places[key].pieces(key, element, element + 1)
                assert (piece.file, piece.fragment) == (rank, fragment)


def test_a_thousand_ranks() -> None:
    """Written, checked and read in seconds, in kilobytes."""
    shapes = {
        f"model.layers.{layer}.{name}.weight": [4096, 1024]
        for layer in range(16)
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
            "input_layernorm",
            "post_attention_layernorm",
        )
    }
    sent = [pickle.dumps(file) for file in make_files(1000, shapes)]
    assert max(map(len, sent)) < 25_000
    begun = time.process_time()
    manifest = CheckpointManifest.make(
        1, 1, [pickle.loads(content) for content in sent], {"shapes": shapes}, "here"
    )
    content = manifest.to_bytes()
    places = CheckpointManifest.from_bytes(content, "here").places("here")
    assert time.process_time() - begun < 5  # bench.scale says how long on a quiet machine
    assert len(content) < 300_000
    assert len(places) == 3 * len(shapes)
    assert set(map(type, places.values())) == {Partition}


def rewrite(run: Run, path: str, change: Any) -> None:
    """Change a manifest, with a marker that fits."""
    tree = json.loads(read_bytes(run.filesystem, f"{path}/manifest.json"))
    content = json.dumps(change(tree) or tree).encode()
    write_bytes(run.filesystem, f"{path}/manifest.json", content)
    marker = json.dumps({"manifest_sha256": make_sha256(content)}).encode()
    write_bytes(run.filesystem, f"{path}/COMMITTED", marker)


@pytest.mark.parametrize("flat", [True, False])
def test_a_manifest_of_version_1_is_read(run: Run, flat: bool) -> None:
    """A list of all fragments with each file, as it was written before."""
    info = save(run, 5, 3, flat=flat, validation={"loss": 2.0})
    with CheckpointReader(run, info) as reader:
        places = reader.manifest.places("")

    def to_version_1(tree: dict[str, Any]) -> None:
        tree["version"] = 1
        for index, file in enumerate(tree["files"]):
            file["fragments"] = [
                list(piece.fragment)
                for key, place in places.items()
                for piece in place.pieces(key, 0, math.prod(SHAPES[key[0]]))
                if piece.file == index
            ]
        del tree["partitions"], tree["others"]

    expected = verify_checkpoint(run, info)
    rewrite(run, info.path, to_version_1)
    (found,) = run.checkpoints()
    assert found.metrics == {"loss": 2.0}
    assert verify_checkpoint(run, found) == expected
    assert expected.ok


def set_first_partition(tree: dict[str, Any], length: Any) -> None:
    tree["partitions"][0][1] = length


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: set_first_partition(tree, 1),
        lambda tree: set_first_partition(tree, 0),
        lambda tree: set_first_partition(tree, -3),
        lambda tree: set_first_partition(tree, 10**9),
        lambda tree: set_first_partition(tree, "x"),
        lambda tree: tree["partitions"].pop(),
        lambda tree: tree["partitions"].append(["unknown", 1, ["param"]]),
        lambda tree: tree.pop("others"),
        lambda tree: tree["others"].append(["norm", "buffer", [9], [0], [1]]),
        lambda tree: tree["others"].append(["norm", "buffer", [-1], [0], [1]]),
        lambda tree: tree["others"].append(["norm", "buffer", [0, 1], [0, 0], [1, 1]]),
        lambda tree: tree["others"].append(["norm", "buffer", [0], [0, 1], [1]]),
        lambda tree: tree["others"].append(["norm", "buffer", [0], [0], [2**70]]),
        lambda tree: tree["files"].pop(),
        lambda tree: tree.update(version=4),
    ],
)
def test_a_manifest_that_does_not_add_up(local_run: Run, change: Any) -> None:
    """Damage that checksums cannot tell, as a faulty writer would leave it: one error, and no
    tensor is read."""
    info = save(local_run, 5, 3, flat=False)
    rewrite(local_run, info.path, lambda tree: change(tree) and None)
    with pytest.raises(StoreError):
        CheckpointReader(local_run, info)
    assert not verify_checkpoint(local_run, info).ok


def test_a_manifest_that_lies_about_a_file(local_run: Run) -> None:
    """Parts of half the length cover a tensor too, but the files' own headers say otherwise."""
    info = save(local_run, 5, 3, flat=False)

    def halve(tree: dict[str, Any]) -> None:
        for partition in tree["partitions"]:
            if partition[0] == "odd":
                partition[1] += 1

    rewrite(local_run, info.path, halve)
    with (
        CheckpointReader(local_run, info) as reader,
        pytest.raises(StoreError, match="not as the manifest has it"),
    ):
        reader.read("odd")
    assert not verify_checkpoint(local_run, info).ok
    assert Path(info.path).is_dir()
