"""One way to any storage: what a place means, what is refused, and that files appear whole or not
at all."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest
import torch
from pyarrow import fs as pafs

from dray.errors import StoreError
from dray.runs import (
    CheckpointReader,
    CheckpointWriter,
    Run,
    apply_retention,
    create_run,
    verify_checkpoint,
)
from dray.storage.exclusive import create_exclusive
from dray.storage.filesystem import (
    absolute,
    child,
    list_files,
    open_filesystem,
    open_whole,
    parent,
    read_bytes,
    shown,
    write_bytes,
)
from sharded_model import PLAN, SHAPES, make_test_spec, make_whole, save


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("/a/b", "/a/b"),
        ("/a/../b/", "/b"),
        ("file:///a/b", "/a/b"),
        ("~/x", os.path.expanduser("~/x")),
        ("runs", os.path.join(os.getcwd(), "runs")),
        ("s3://bucket/a?region=x", "s3://bucket/a?region=x"),
        ("memory://a", "memory://a"),
    ],
)
def test_absolute(place: str, expected: str) -> None:
    assert absolute(place) == expected


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("/a", "/a/x/y"),
        ("s3://bucket", "s3://bucket/x/y"),
        ("s3://bucket/a/", "s3://bucket/a/x/y"),
        ("s3://bucket/a?region=r&scheme=http", "s3://bucket/a/x/y?region=r&scheme=http"),
    ],
)
def test_child(place: str, expected: str) -> None:
    assert child(place, "x", "y") == expected


@pytest.mark.parametrize("place", ["/a/b", "s3://bucket", "s3://bucket/a?endpoint_override=x:1"])
def test_a_place_is_in_the_folder_that_it_is_a_child_of(place: str) -> None:
    assert parent(child(place, "c")) == absolute(place)
    assert parent(child(place, "c", "d")) == child(place, "c")


def test_messages_show_no_secrets() -> None:
    assert shown("s3://key:secret@bucket/a?region=x") == "s3://bucket/a"
    assert shown("/a/b") == "/a/b"


def test_opened(tmp_path: Path, s3_storage: str) -> None:
    assert open_filesystem(tmp_path) == (pafs.LocalFileSystem(), str(tmp_path))
    filesystem, path = open_filesystem(s3_storage)
    assert filesystem.type_name == "s3"
    assert path.startswith("bucket/")
    assert path.endswith("/runs")
    assert open_filesystem("memory://a/b/")[1].strip("/") == "a/b"


@pytest.mark.parametrize("place", ["nope://x/y", "s3://", "s3://bucket/x?nonsense=1"])
def test_unusable(place: str) -> None:
    with pytest.raises(StoreError, match="cannot be opened") as caught:
        open_filesystem(place)
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_nothing(storage: str) -> None:
    filesystem, path = open_filesystem(storage)
    write_bytes(filesystem, f"{path}/a", b"before")

    def write_half() -> None:
        with open_whole(filesystem, f"{path}/b") as stream:
            stream.write(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert list_files(filesystem, path) == {"a": 6}
    write_bytes(filesystem, f"{path}/a", b"after")
    assert read_bytes(filesystem, f"{path}/a") == b"after"


def test_created_once(storage: str) -> None:
    filesystem, path = open_filesystem(storage)
    assert create_exclusive(filesystem, f"{path}/a/b", b"one")
    assert not create_exclusive(filesystem, f"{path}/a/b", b"two")
    assert read_bytes(filesystem, f"{path}/a/b") == b"one"
    assert list_files(filesystem, f"{path}/a") == {"b": 3}


def test_a_run_on_any_fsspec_filesystem() -> None:
    """The whole life of a run on a filesystem that only fsspec knows."""
    storage = f"memory://{uuid.uuid4().hex}/runs"
    run = create_run(storage, "speeches", make_test_spec(), PLAN)
    attempt = run.begin_attempt(2, 0)
    run.log_metrics([{"step": step, "attempt": attempt, "loss": 1.0} for step in (1, 2)])
    run.log_metrics([{"step": 3, "attempt": attempt, "loss": 1.0}])
    for step in (1, 2, 3):
        info = save(run, step, num_ranks=3)
    assert len(apply_retention(run, keep_last=2)) == 1
    run.export_metrics_parquet()
    run.set_status("completed")
    again = Run.open(storage, "speeches")
    assert [row["step"] for row in again.metrics()] == [1, 2, 3]
    assert again.latest_checkpoint() == info
    assert verify_checkpoint(again, info).ok
    assert again.summary()["status"] == "completed"


def test_blocks_of_remote_files(s3_storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges below, across and above the size of a block are the same bytes."""
    monkeypatch.setattr("dray.runs.checkpoint_reader.READ_BLOCK_BYTES", 64)
    monkeypatch.setattr("dray.runs.checkpoint_reader.KEPT_BLOCKS", 2)
    run = create_run(s3_storage, "speeches", make_test_spec(), PLAN)
    info, whole = save(run, 1, num_ranks=3), make_whole(1)
    with CheckpointReader(run, info) as reader:
        for name in SHAPES:
            assert torch.equal(reader.read(name), whole[name, "param"])
        for start, count in ((0, 1), (5, 20), (15, 1), (15, 17), (400, 300), (1000, 0)):
            assert torch.equal(
                reader.read("embedding.weight", "exp_avg", start, count),
                whole["embedding.weight", "exp_avg"][start : start + count],
            )


def test_many_small_tensors_take_few_requests(s3_storage: str) -> None:
    run, names = (
        create_run(s3_storage, "speeches", make_test_spec(), PLAN),
        [f"layers.{n}.bias" for n in range(400)],
    )
    writer = CheckpointWriter(run, 1, 1)
    file = writer.write_rank(0, 1, {f"{name}|param|0": torch.full((8,), 1.0) for name in names})
    info = writer.commit([file], {"shapes": {name: [8] for name in names}})
    with CheckpointReader(run, info) as reader:
        reader.read(names[0])
        stream = reader._open[0][0]._stream
        before = stream.tell()
        assert all(reader.read(name).sum() == 8 for name in names)
        assert stream.tell() == before
        assert reader._blocks is not None
        assert len(reader._blocks._blocks) == 1


def test_importing_the_store_is_light() -> None:
    heavy = ("torch", "ray", "mlflow", "wandb", "fsspec")
    code = f"import sys, dray.runs; print([module for module in {heavy} if module in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_uri_without_an_authority_keeps_its_slashes() -> None:
    assert child("hdfs:///data", "runs") == "hdfs:///data/runs"
    assert child("s3://bucket/runs?scheme=http", "one") == "s3://bucket/runs/one?scheme=http"
    assert shown("s3://user:secret@bucket/runs?token=x") == "s3://bucket/runs"
    assert shown("hdfs:///data") == "hdfs:///data"


def test_a_folder_that_comes_and_goes_meanwhile_holds_nothing(tmp_path: Path) -> None:
    """Arrow looks a second time where it finds no folder, and fails if there is one by then."""
    folder, done = tmp_path / "folder", threading.Event()

    def flicker() -> None:
        while not done.is_set():
            folder.mkdir()
            folder.rmdir()

    thread = threading.Thread(target=flicker)
    thread.start()
    try:
        for _ in range(20_000):  # some hundred are enough
            assert list_files(pafs.LocalFileSystem(), str(folder)) == {}
    finally:
        done.set()
        thread.join()
