"""The round trip of a checkpoint: written by any number of ranks, read in any ranges, the same in
any storage."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from dray.errors import StoreError
from dray.runs import (
    CheckpointReader,
    CheckpointWriter,
    Run,
    make_fragment_key,
    parse_fragment_key,
    verify_checkpoint,
)
from dray.storage.filesystem import list_files
from sharded_model import SHAPES, STATES, make_fragments, make_whole, save


@pytest.mark.parametrize(("num_ranks", "flat"), [(1, True), (2, True), (3, False), (5, True)])
def test_round_trip(run: Run, num_ranks: int, flat: bool) -> None:
    info = save(run, 20, num_ranks, flat=flat, tokens=1234, validation={"loss": 2.5})
    assert run.latest_checkpoint() == info
    assert info.verified
    assert info.metrics == {"loss": 2.5}
    assert info.num_bytes == sum(list_files(run.filesystem, info.path).values())
    whole = make_whole(20)
    with CheckpointReader(run, info) as reader:
        assert reader.metadata["tokens"] == 1234
        assert reader.num_files == num_ranks
        assert reader.names() == sorted(SHAPES)
        for (name, state), expected in whole.items():
            assert reader.shape(name) == tuple(SHAPES[name])
            assert torch.equal(reader.read(name, state), expected)
        assert reader.verify_files(range(num_ranks)) == []


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(sorted(SHAPES)),
    state=st.sampled_from(STATES),
    low=st.floats(0, 1),
    high=st.floats(0, 1),
)
def test_any_range(local_run: Run, name: str, state: str, low: float, high: float) -> None:
    info = local_run.latest_checkpoint() or save(local_run, 1, 4)
    size = math.prod(SHAPES[name])
    start, stop = sorted((round(low * size), round(high * size)))
    with CheckpointReader(local_run, info) as reader:
        expected = make_whole(1)[name, state][start:stop]
        assert torch.equal(reader.read(name, state, start, stop - start), expected)


def test_rank_files_are_plain_safetensors(local_run: Run) -> None:
    info = save(local_run, 7, 2)
    expected = make_fragments(make_whole(7), 1, 2)
    with safe_open(f"{info.path}/rank-00001-of-00002.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(expected)
        for key, tensor in expected.items():
            assert torch.equal(file.get_tensor(key), tensor)


def test_hashes_do_not_depend_on_the_place(local_run: Run) -> None:
    reports = []
    for step, num_ranks, flat in ((1, 1, True), (2, 3, True), (3, 4, False)):
        reports.append(
            verify_checkpoint(local_run, save(local_run, step, num_ranks, flat=flat, seed=0))
        )
    other = verify_checkpoint(local_run, save(local_run, 4, 1, seed=1))
    assert all(report.ok for report in reports)
    assert len({report.weights_sha256 for report in reports}) == 1
    assert len({report.optimizer_sha256 for report in reports}) == 1
    assert other.weights_sha256 != reports[0].weights_sha256
    assert other.optimizer_sha256 != reports[0].optimizer_sha256
    digest = hashlib.sha256()
    for name in sorted(SHAPES):
        digest.update(
            name.encode()
            + str(SHAPES[name]).encode()
            + make_whole(0)[name, "param"].numpy().tobytes()
        )
    assert reports[0].weights_sha256 == digest.hexdigest()
    digest = hashlib.sha256()
    for name in sorted(SHAPES):
        for state in ("exp_avg", "exp_avg_sq"):  # as it was before there were other states
            digest.update(name.encode() + state.encode() + str(SHAPES[name]).encode())
            digest.update(make_whole(0)[name, state].numpy().tobytes())
    assert reports[0].optimizer_sha256 == digest.hexdigest()
    tree = json.loads(json.dumps(reports[1].to_json()))
    assert {"step", "ok", "files", "weights_sha256", "optimizer_sha256"} <= tree.keys()
    assert [file["ok"] for file in tree["files"]] == [True] * 3


def test_buffers_extras_frozen_and_tied(run: Run) -> None:
    writer = CheckpointWriter(run, 3, 1)
    tensors = {
        make_fragment_key("frozen", "param", 0): torch.arange(6.0),
        make_fragment_key("positions", "buffer", 0): torch.arange(5),
        make_fragment_key("mask", "buffer", 0): torch.tensor([True, False]),
        make_fragment_key("half", "buffer", 0): torch.arange(4, dtype=torch.bfloat16),
        make_fragment_key("generator/0", "extra", 0): torch.get_rng_state(),
        make_fragment_key("empty", "buffer", 0): torch.empty(0),
    }
    shapes = {
        "frozen": [2, 3],
        "positions": [5],
        "mask": [2],
        "half": [2, 2],
        "empty": [0],
        "generator/0": list(torch.get_rng_state().shape),
    }
    info = writer.commit(
        [writer.write_rank(0, 1, tensors)], {"shapes": shapes, "tied": {"head": "frozen"}}
    )
    with CheckpointReader(run, info) as reader:
        for key, tensor in tensors.items():
            name, state, _ = parse_fragment_key(key)
            found = reader.read(name, state)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
        assert reader.names("param") == ["frozen"]
        assert reader.names("buffer") == ["empty", "half", "mask", "positions"]
        assert reader.shape("head") == (2, 3)
        assert torch.equal(reader.read("head", start=2, count=3), torch.tensor([2.0, 3.0, 4.0]))
        assert not reader.has("head", "exp_avg")
        with pytest.raises(StoreError, match="no exp_avg was saved"):
            reader.read("frozen", "exp_avg")
        with pytest.raises(StoreError, match="elements 4 to 9 of 6"):
            reader.read("frozen", "param", 4, 5)
        with pytest.raises(StoreError, match="no such tensor"):
            reader.read("unknown")
    assert verify_checkpoint(run, info).ok


def test_states_of_any_name_shape_and_dtype(run: Run) -> None:
    """Dealt out to any number of ranks, read in any range, part of the hash."""
    states = {
        ("wide", "param"): torch.arange(12.0),
        ("wide", "row_var"): torch.arange(3.0) + 100,
        ("wide", "codes"): torch.arange(12, dtype=torch.uint8),
        ("wide", "scales"): torch.arange(2, dtype=torch.bfloat16),
        ("bias", "param"): torch.arange(5.0),
        ("bias", "variance"): torch.arange(5.0) + 7,
    }
    metadata = {
        "shapes": {"wide": [3, 4], "bias": [5]},
        "state_shapes": {"wide": {"row_var": [3, 1], "scales": [2]}},
    }
    hashes = []
    for step, num_ranks in ((1, 1), (2, 2), (3, 7)):
        writer, files = CheckpointWriter(run, step, 1), []
        for rank in range(num_ranks):
            mine = {}
            for (name, state), tensor in states.items():
                share = -(-tensor.numel() // num_ranks)
                start = min(tensor.numel(), rank * share)
                if start < tensor.numel():
                    part = tensor[start : start + share]
                    mine[make_fragment_key(name, state, start)] = part
            files.append(writer.write_rank(rank, num_ranks, mine))
        info = writer.commit(files, metadata)
        with CheckpointReader(run, info) as reader:
            assert reader.kept("wide") == ["codes", "row_var", "scales"]
            assert (reader.shape("wide", "row_var"), reader.shape("wide", "codes")) == (
                (3, 1),
                (3, 4),
            )
            for (name, state), tensor in states.items():
                found = reader.read(name, state, 1, tensor.numel() - 1)
                assert found.dtype == tensor.dtype
                assert torch.equal(found, tensor[1:])
        report = verify_checkpoint(run, info)
        assert report.ok, report.problems
        hashes.append(report.optimizer_sha256)
    assert len(set(hashes)) == 1
    writer = CheckpointWriter(run, 4, 1)
    whole = {make_fragment_key(*key, 0): tensor for key, tensor in states.items()}
    file = writer.write_rank(0, 1, whole)
    wrong = {"state_shapes": {"wide": {"row_var": [2, 1], "scales": [2]}}}
    with pytest.raises(StoreError, match=r"wide\|row_var: has 3 elements, its shape only 2"):
        writer.commit([file], metadata | wrong)


@pytest.mark.parametrize(
    ("key", "tensor", "what"),
    [
        ("w|param|0", torch.zeros(2, 2), "shape"),
        ("w|param|0", torch.zeros(2, dtype=torch.bfloat16), "bfloat16"),
        ("w|9th|0", torch.zeros(2), "'9th' is no state's name"),
        ("w|param", torch.zeros(2), "not a fragment's name"),
        ("w|param|-1", torch.zeros(2), "not a fragment's name"),
        ("w|buffer|0", torch.zeros(2, dtype=torch.complex64), "complex64"),
    ],
)
def test_wrong_tensors_are_refused(
    local_run: Run, key: str, tensor: torch.Tensor, what: str
) -> None:
    with pytest.raises(StoreError, match=what):
        CheckpointWriter(local_run, 1, 1).write_rank(0, 1, {key: tensor})
    assert local_run.checkpoints(verified_only=False) == []


@pytest.mark.parametrize(
    ("pieces", "what"),
    [
        ([{"w|param|0": 4}, {"w|param|6": 4}], r"w\|param: elements 4 to 5 are missing"),
        (
            [{"w|param|0": 6}, {"w|param|5": 5}],
            r"w\|param: elements from 5 on are written again in "
            r"rank-00001",
        ),
        ([{"w|param|0": 10}, {"w|param|0": 10}], "written again"),
        ([{"w|param|0": 6}], "elements 6 to 9 are missing"),
        ([{"w|param|0": 12}], "has 12 elements, its shape only 10"),
        ([{"w|param|0": 10, "w|exp_avg|0": 5}], r"w\|exp_avg: elements 5 to 9 are missing"),
        ([{"w|param|0": 10, "other|param|0": 5}], "other: no shape"),
        ([{}], "w: no rank wrote it"),
        ([{"w|exp_avg|0": 10}], "w: no rank wrote it"),
    ],
)
def test_coverage(local_run: Run, pieces: list[dict[str, int]], what: str) -> None:
    writer = CheckpointWriter(local_run, 1, 1)
    files = [
        writer.write_rank(
            rank, len(pieces), {key: torch.zeros(size) for key, size in tensors.items()}
        )
        for rank, tensors in enumerate(pieces)
    ]
    with pytest.raises(StoreError, match=what):
        writer.commit(files, {"shapes": {"w": [10]}})
    assert local_run.latest_checkpoint() is None
    assert [info.verified for info in local_run.checkpoints(verified_only=False)] == [False]


def test_commit_wants_every_rank(local_run: Run) -> None:
    writer, whole = CheckpointWriter(local_run, 1, 1), make_whole()
    first = writer.write_rank(0, 2, make_fragments(whole, 0, 1))
    with pytest.raises(StoreError, match="every rank's file"):
        writer.commit([first], {"shapes": SHAPES})
    with pytest.raises(StoreError, match="no shapes"):
        writer.commit([first], {})


def test_commit_wants_the_files_in_storage(local_run: Run) -> None:
    writer = CheckpointWriter(local_run, 1, 1)
    file = writer.write_rank(0, 1, make_fragments(make_whole(), 0, 1))
    Path(writer.path, file.file).unlink()
    with pytest.raises(StoreError, match="no bytes in storage"):
        writer.commit([file], {"shapes": SHAPES})


def test_committed_is_never_written_again(run: Run) -> None:
    save(run, 5)
    with pytest.raises(StoreError, match="committed already"):
        save(run, 5)


def test_stale_attempt_does_not_commit(run: Run) -> None:
    first = run.begin_attempt(2, 0)
    save(run, 10, attempt=first)
    second = run.begin_attempt(2, 10)
    with pytest.raises(StoreError, match=r"attempt 1 is over: attempt 2 has begun"):
        save(run, 20, attempt=first)
    assert [info.step for info in run.checkpoints()] == [10]
    save(run, 20, attempt=second)
    assert [(info.step, info.attempt) for info in run.checkpoints()] == [(10, 1), (20, 2)]


def test_what_a_later_attempt_undid_is_not_read(local_run: Run) -> None:
    local_run.begin_attempt(2, 0)
    save(local_run, 10, attempt=1)
    save(local_run, 20, attempt=1)
    local_run.begin_attempt(2, 10)
    assert [info.step for info in local_run.checkpoints()] == [10]
    assert local_run.checkpoints(verified_only=False)[-1].problem == (
        "undone: attempt 2 started before it"
    )


def test_reader_states_travel(run: Run) -> None:
    info = save(run, 5)
    copy, file = pickle.loads(pickle.dumps((run, info)))
    assert torch.equal(CheckpointReader(copy, file).read("odd"), make_whole(5)["odd", "param"])


def test_memory_is_bounded_by_one_tensor(local_run: Run) -> None:
    """Verifying reads the whole checkpoint, but never holds more than a part of a tensor."""
    writer, num_tensors, size = CheckpointWriter(local_run, 1, 1), 12, 2_000_000
    tensors = {f"w{n}|param|0": torch.full((size,), float(n)) for n in range(num_tensors)}
    info = writer.commit(
        [writer.write_rank(0, 1, tensors)],
        {"shapes": {f"w{n}": [size] for n in range(num_tensors)}},
    )
    del tensors
    tracemalloc.start()
    assert verify_checkpoint(local_run, info).ok
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 4 * size
