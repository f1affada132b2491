"""What the rows come through fails: a token shard that is gone, an object store that is full,
clocks that differ."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from harness import (
    Training,
    ask_own_ray,
    befalling,
    causes,
    copy_storage,
    disturbed,
    kill,
    make_case,
    random_rank,
)

from dray.doctor import diagnose
from dray.errors import RunFailed
from dray.runs import Run
from dray.spec import make_spec
from dray.train.driver import train
from waiting import wait_for

pytestmark = pytest.mark.slow

FILL = """
import sys, time, numpy, ray
from ray._private.internal_api import memory_summary
ray.init(address=sys.argv[1], log_to_driver=False)
held = [ray.put(numpy.full(2_000_000, number, dtype="int64")) for number in range(15)]
print(memory_summary(sys.argv[1], stats_only=True), flush=True)
time.sleep(600)
"""
"""Holds 240 MB in a store of 80: the most of it is spilled to disk, and all that follows finds no
free place."""


def delete(shard: Path) -> None:
    shard.unlink()


def flip_bits(shard: Path) -> None:
    """One bit of each group's tokens: the file keeps its size and its form."""
    content = bytearray(shard.read_bytes())
    with pa.ipc.open_file(pa.py_buffer(bytes(content))) as reader:
        for group in range(reader.num_record_batches):
            tokens = reader.get_batch(group).column("input_ids").flatten().to_numpy()
            content[content.index(tokens[:256].tobytes())] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        pytest.param(delete, "No such file", id="deleted"),
        pytest.param(flip_bits, "is not what was written", id="with a flipped bit in each group"),
    ],
)
def test_a_token_shard_is_harmed(
    harm: Callable[[Path], None],
    words: str,
    storage: str,
    tiny_corpus: Path,
    undisturbed: Run,
    measured,
    tmp_path: Path,
):
    """a token shard {id}, then a worker killed, so that it is read again"""
    place, name = copy_storage(storage, tmp_path / "runs"), harm.__name__
    spec = make_spec(make_case(tiny_corpus, resources={"workers": 2, "max_failures": 1}))
    shard, sound = next(Path(place, "corpora").rglob("train*/*.arrow")), tmp_path / "sound"
    shutil.copy(shard, sound)

    def do_harm() -> None:
        harm(shard)
        kill(random_rank())

    with befalling(place, name, {8: do_harm}), pytest.raises(RunFailed) as failed:
        train(spec, storage=place, run_name=name)
    run = Run.open(place, name)
    assert causes(run) == ["killed", "data"]
    found = diagnose(run)
    assert found.fault == "data"
    assert shard.name in failed.value.diagnosis
    assert words in failed.value.diagnosis
    shutil.copy(sound, shard)
    train(spec, storage=place, run_name=name)
    measured(run, undisturbed)


@pytest.fixture
def small_store() -> Iterator[str]:
    """Address of a Ray whose object store holds 80 MB. This process is not connected to it."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 6,
            "object_store_memory": 80_000_000,
            "include_dashboard": False,
        },
    )
    yield cluster.address
    cluster.shutdown()
    ask_own_ray()


def test_the_object_store_is_full(
    small_store: str, storage: str, tiny_corpus: Path, undisturbed: Run, measured, tmp_path: Path
):
    """the object store full: another program holds three times as much as it takes"""
    with (tmp_path / "fill.log").open("wb") as log:
        filler = subprocess.Popen(
            [sys.executable, "-c", FILL, small_store], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wait_for(
            lambda: "Spilled" in (tmp_path / "fill.log").read_text(), "objects that are spilled"
        )
        training = Training(
            make_case(tiny_corpus), storage, "spilled", tmp_path, address=small_store
        )
        assert training.finish(600) == 0, training.output
    finally:
        filler.kill()
        filler.wait(timeout=20)
    measured(training.run, undisturbed)
    assert causes(training.run) == []


def test_the_clock_of_a_rank_is_an_hour_fast(
    storage: str, tiny_corpus: Path, undisturbed: Run, measured, name_fault, local_ray: None
):
    """the clock of one rank an hour fast (a stand-in: Python's clock in that process), and a worker
    killed"""
    happened = name_fault("dray.train.worker:run_rank:before", "hasten_clock")
    run = disturbed(
        storage,
        tiny_corpus,
        "hasty",
        {13: lambda: kill(random_rank())},
        checkpoint={"every_steps": 6, "keep_last": 2},
    )
    assert happened.exists()
    measured(run, undisturbed)
    assert causes(run) == ["killed"]  # and nothing that a clock would bring about
    assert [info.step for info in run.checkpoints()] == [18, 24]
    assert all(0 < event["seconds"] < 600 for event in run.events() if event["kind"] == "recovered")
