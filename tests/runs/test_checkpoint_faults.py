"""What storage and killed processes do to a checkpoint: it is found out, named, and the one before
is used."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dray.errors import StoreError
from dray.runs import (
    CheckpointInfo,
    CheckpointReader,
    Run,
    apply_retention,
    create_run,
    find_checkpoint,
    verify_checkpoint,
)
from dray.storage.filesystem import list_files, read_bytes, write_bytes
from sharded_model import SHAPES, save

RANK_FILE = "rank-00001-of-00002.safetensors"


def edit(run: Run, info: CheckpointInfo, name: str, change: Callable[[bytes], bytes]) -> None:
    path = f"{info.path}/{name}"
    write_bytes(run.filesystem, path, change(read_bytes(run.filesystem, path)))


def flip(content: bytes, at: int) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        (RANK_FILE, lambda content: content[:-1], "rank-00001-of-00002.safetensors has"),
        (RANK_FILE, None, "rank-00001-of-00002.safetensors is missing"),
        (
            "manifest.json",
            lambda content: flip(content, 40),
            "manifest.json is not the one that was committed",
        ),
        ("manifest.json", None, "manifest.json is missing"),
        ("COMMITTED", None, "no marker COMMITTED"),
        ("COMMITTED", lambda content: content[:20], "marker COMMITTED is unreadable"),
        ("COMMITTED", lambda content: b"", "marker COMMITTED is unreadable"),
        (
            "COMMITTED",
            lambda content: flip(content, content.index(b'": "') + 6),
            "is not the one that was committed",
        ),
    ],
    ids=[
        "short",
        "missing",
        "manifest-flipped",
        "no-manifest",
        "no-marker",
        "torn-marker",
        "empty-marker",
        "other",
    ],
)
def test_damage_seen_without_reading_the_tensors(
    run: Run, name: str, change: Callable[[bytes], bytes] | None, problem: str
) -> None:
    before, info = save(run, 10), save(run, 20)
    if change is None:
        run.filesystem.delete_file(f"{info.path}/{name}")
    else:
        edit(run, info, name, change)
    assert run.latest_checkpoint() == before
    found = run.checkpoints(verified_only=False)[-1]
    assert not found.verified
    assert problem in found.problem
    with pytest.raises(StoreError, match="is used only if"):
        CheckpointReader(run, info)
    report = verify_checkpoint(run, info)
    assert not report.ok
    assert problem in report.problems[0]
    assert report.weights_sha256 == ""


@pytest.mark.parametrize("at", [3, 30, -1, -2000])
def test_one_flipped_bit_is_found(run: Run, at: int) -> None:
    """The sizes are right, so only a look at every byte tells: the reader of that file says so."""
    before, info = save(run, 10), save(run, 20)
    edit(run, info, RANK_FILE, lambda content: flip(content, at))
    assert run.latest_checkpoint() == info
    with CheckpointReader(run, info) as reader:
        assert reader.verify_files([0]) == []
        assert reader.verify_files([1]) == [f"{RANK_FILE} has changed: its checksum is another"]
    report = verify_checkpoint(run, info)
    assert [file["ok"] for file in report.files] == [True, False]
    assert not report.ok
    run.set_aside(info, report.problems[0])
    assert run.latest_checkpoint() == before
    assert run.checkpoints(verified_only=False)[-1].problem.startswith("set aside: rank-00001")
    assert run.events()[-1]["kind"] == "checkpoint_set_aside"


def test_the_checkpoint_to_verify(local_run: Run) -> None:
    """By default the newest that was committed, damaged or not; one that is being written only when
    asked for."""
    with pytest.raises(StoreError, match="has no checkpoint; steps with one: none"):
        find_checkpoint(local_run)
    for step in (10, 20, 30):
        save(local_run, step)
    paths = {info.step: Path(info.path) for info in local_run.checkpoints()}
    (paths[20] / RANK_FILE).unlink()
    (paths[30] / "COMMITTED").unlink()
    assert find_checkpoint(local_run).step == 20
    assert verify_checkpoint(local_run, find_checkpoint(local_run)).problems == [
        f"{RANK_FILE} is missing"
    ]
    assert verify_checkpoint(local_run, find_checkpoint(local_run, 10)).ok
    assert "no marker" in verify_checkpoint(local_run, find_checkpoint(local_run, 30)).problems[0]
    with pytest.raises(
        StoreError, match="has no checkpoint of step 15; steps with one: 10, 20, 30"
    ):
        find_checkpoint(local_run, 15)


def test_file_gone_while_reading(local_run: Run) -> None:
    info = save(local_run, 20)
    reader = CheckpointReader(local_run, info)
    Path(info.path, RANK_FILE).unlink()
    assert "cannot be read" in reader.verify_files([1])[0]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        b"\xff" * 64,
        (5).to_bytes(8, "little") + b"{no}}",
        (61).to_bytes(8, "little")
        + b'{"a|param|0":{"dtype":"F32","shape":[9],"data_offsets":[0,9]}}'[:61],
        (2).to_bytes(8, "little") + b"[]",
        (10**17).to_bytes(8, "little") + b"{}",
    ],
)
def test_header_that_is_none(local_run: Run, content: bytes) -> None:
    """A rank file of the right size whose header is nonsense never becomes a tensor."""
    info = save(local_run, 20)
    size = len(read_bytes(local_run.filesystem, f"{info.path}/{RANK_FILE}"))
    edit(local_run, info, RANK_FILE, lambda _: content.ljust(size, b"\0"))
    with pytest.raises(StoreError, match=r"not a safetensors file|not as the manifest has it"):
        CheckpointReader(local_run, info).read("norm")
    with pytest.raises(StoreError):
        CheckpointReader(local_run, info).read("odd")


def test_a_name_in_the_manifest_never_leaves_the_folder(local_run: Run) -> None:
    import json

    from dray.runs.checkpoint_manifest import make_sha256

    info = save(local_run, 20)
    edit(
        local_run,
        info,
        "manifest.json",
        lambda content: content.replace(RANK_FILE.encode(), b"../../run.json"),
    )
    content = read_bytes(local_run.filesystem, f"{info.path}/manifest.json")
    edit(
        local_run,
        info,
        "COMMITTED",
        lambda _: json.dumps({"manifest_sha256": make_sha256(content)}).encode(),
    )
    with pytest.raises(StoreError, match="is not a rank file's name"):
        CheckpointReader(local_run, info)


WRITE_AND_COMMIT = """
import sys, torch
from dray.runs import CheckpointWriter, Run
storage, stop_before = sys.argv[1:3]
run = Run.open(storage, "speeches")
class Stopping(CheckpointWriter):
    def _check_current(self):
        if stop_before == "marker":
            print("before the marker", flush=True); sys.stdin.read()
writer = Stopping(run, 20, 1)
size = 50_000_000 if stop_before == "file" else 1000
print("writing", flush=True)
file = writer.write_rank(0, 1, {"w|param|0": torch.zeros(size)})
if stop_before == "manifest":
    print("before the manifest", flush=True); sys.stdin.read()
writer.commit([file], {"shapes": {"w": [size]}})
print("committed", flush=True); sys.stdin.read()
"""


def kill_when(storage: str, stop_before: str, ready: Callable[[str], bool]) -> None:
    """Run a process that saves a checkpoint and kill it, with SIGKILL, once `ready` says so of its
    last line."""
    child = subprocess.Popen(
        [sys.executable, "-c", WRITE_AND_COMMIT, storage, stop_before],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert child.stdout is not None
    assert child.stdin is not None
    line = child.stdout.readline().strip()
    while not ready(line):
        if line == "writing" and stop_before == "file":
            time.sleep(0.001)
        else:
            line = child.stdout.readline().strip()
            assert line, "the process ended by itself"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    child.stdin.close()


@pytest.mark.parametrize("stop_before", ["file", "manifest", "marker", "end"])
def test_kill_9(local_run: Run, stop_before: str) -> None:
    local_run.begin_attempt(2, 0)
    before = save(local_run, 10)
    folder = f"{local_run.path}/checkpoints/step-00000020-a0001"
    if stop_before == "file":  # in the middle of the bytes
        kill_when(
            local_run.storage,
            stop_before,
            lambda _: any(
                size > 1_000_000 for size in list_files(local_run.filesystem, folder).values()
            ),
        )
        left = list_files(local_run.filesystem, folder)
        assert left
        assert all(name.startswith(".tmp-") for name in left), (
            "no half file under a rank file's name"
        )
    else:
        last = {
            "manifest": "before the manifest",
            "marker": "before the marker",
            "end": "committed",
        }[stop_before]
        kill_when(local_run.storage, stop_before, lambda line: line == last)
    newest = local_run.latest_checkpoint()
    assert newest is not None
    if stop_before == "end":
        assert newest.step == 20
        assert verify_checkpoint(local_run, newest).ok
        return
    assert newest == before
    assert local_run.checkpoints(verified_only=False)[-1].problem.startswith("no marker")
    attempt = local_run.begin_attempt(2, 10)
    save(local_run, 20, attempt=attempt)  # the next attempt is not disturbed by what was left …
    assert [(info.step, info.attempt) for info in local_run.checkpoints()] == [(10, 1), (20, 2)]
    assert apply_retention(local_run, keep_last=2) == [folder]  # … and clears it away
    assert not os.path.exists(folder)


def test_full_disk_leaves_no_file_under_the_name(tmp_path: Path, local_run: Run) -> None:
    """A real full file system, where this process may mount one."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        run = create_run(mount, "speeches", local_run.spec(), {"num_steps": 50})
        save(run, 10, num_ranks=1)
        import torch

        from dray.runs import CheckpointWriter

        writer = CheckpointWriter(run, 20, 1)
        with pytest.raises(OSError, match="No space left"):
            writer.write_rank(0, 1, {"w|param|0": torch.zeros(1_000_000)})
        assert list_files(run.filesystem, writer.path) == {}
        latest = run.latest_checkpoint()
        assert latest is not None
        assert latest.step == 10
        assert sorted(CheckpointReader(run, latest).names()) == sorted(SHAPES)
    finally:
        subprocess.run(["umount", str(mount)], check=True)
