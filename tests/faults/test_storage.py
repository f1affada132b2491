"""The storage has a bad day: S3 that is slow, fails or is away, and disks that fill or turn
read-only.

S3 is a real server, behind a proxy that fails on request; the disks are real file systems of a few
megabytes.
"""

from __future__ import annotations

import random
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import (
    EVERY,
    STEPS,
    befalling,
    causes,
    copy_storage,
    disturbed,
    events,
    fill,
    make_case,
)
from pyarrow.fs import copy_files

from dray.corpus.prepare import prepare
from dray.doctor import diagnose
from dray.errors import RunFailed
from dray.rank.saving import MAX_FAILED_IN_A_ROW
from dray.runs import Run, verify_checkpoint
from dray.runs.drivers import HEARTBEAT_SECONDS
from dray.runs.layout import DRIVERS
from dray.spec import make_spec
from dray.storage.filesystem import open_filesystem
from dray.train.driver import train
from failing_proxy import FailingProxy, Fault, failing_proxy
from small_disk import small_disk
from waiting import rank_processes, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
OUTAGE_SECONDS = HEARTBEAT_SECONDS + 5
"""An outage into which one of the driver's signs of life falls."""


@pytest.fixture(scope="module")
def proxy(s3_endpoint: str) -> Iterator[FailingProxy]:
    with failing_proxy(s3_endpoint.partition("endpoint_override=")[2].partition("&")[0]) as running:
        yield running


@pytest.fixture(scope="module")
def s3_storage(proxy: FailingProxy) -> str:
    return f"s3://bucket/{uuid.uuid4().hex}/runs?endpoint_override={proxy.endpoint}&scheme=http&region=us-east-1"


def slow(method: str, path: str) -> Fault | None:
    time.sleep(0.2)
    return None


def flaky(method: str, path: str) -> Fault | None:
    faults: tuple[Fault, ...] = ((503, "SlowDown"), (500, "InternalError"), "reset", "lost")
    return random.choice(faults) if random.random() < 0.3 else None


def down(method: str, path: str) -> Fault | None:
    return "reset"


@pytest.mark.parametrize(
    ("decide", "seconds"),
    [
        pytest.param(slow, 1e6, id="answers-0.2-s-late"),
        pytest.param(flaky, 1e6, id="fails-30-%-of-all-requests"),
        pytest.param(down, OUTAGE_SECONDS, id=f"is-away-for-{OUTAGE_SECONDS:.0f}-s"),
    ],
)
def test_s3_on_a_bad_day(
    decide: Callable[[str, str], Fault | None],
    seconds: float,
    s3_storage: str,
    s3_endpoint: str,
    proxy: FailingProxy,
    tiny_corpus: Path,
    undisturbed: Run,
    measured,
):
    """S3 {id}"""
    direct = f"{s3_storage.partition('?')[0]}?{s3_endpoint}"  # what the test asks for does not fail
    name = decide.__name__

    asked: list[str] = []

    def begin() -> None:
        proxy.decide = lambda method, path: (asked.append(path), decide(method, path))[1]
        timer.start()

    def end() -> None:
        proxy.decide = lambda method, path: None

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    failed = proxy.num_failed
    spec = make_spec(make_case(tiny_corpus))
    try:
        with befalling(direct, name, {3: begin}):
            train(spec, storage=s3_storage, run_name=name)
    finally:
        end()
    run = Run.open(direct, name)
    measured(run, undisturbed)
    assert (causes(run), len(run.attempts()), run.driver()["number"]) == ([], 1, 1)
    assert run.status == "completed"
    assert proxy.num_failed > failed or decide is slow
    assert (
        any(DRIVERS in path for path in asked) or decide is not down
    )  # signs of life were refused, too


def test_a_corpus_is_prepared_on_a_bad_day(
    s3_storage: str, s3_endpoint: str, proxy: FailingProxy, tiny_corpus: Path, tmp_path: Path
):
    """Its sources and its place are on an S3 that fails 30 % of all requests."""
    folder, query = s3_storage.replace("/runs?", "/texts?").split("?")
    filesystem, path = open_filesystem(f"{folder}?{s3_endpoint}")
    copy_files(str(tiny_corpus), path, destination_filesystem=filesystem)
    spec = make_spec(make_case(tiny_corpus, data={"train": [f"{folder}/*.jsonl?{query}"]}))
    failed, proxy.decide = proxy.num_failed, flaky
    try:
        found = prepare(spec, s3_storage).manifest
    finally:
        proxy.decide = lambda method, path: None
    assert proxy.num_failed > failed
    assert found == prepare(spec, str(tmp_path)).manifest


def test_a_disk_is_full(
    storage: str, tiny_corpus: Path, undisturbed: Run, measured, tmp_path: Path
):
    """the disk is full, and freed after the run has failed"""
    with small_disk(tmp_path / "disk", 48) as disk:
        place, ballast = copy_storage(storage, disk / "runs"), []
        spec = make_case(tiny_corpus, resources={"workers": 2, "max_failures": 0})
        with (
            befalling(place, "full", {8: lambda: ballast.append(fill(disk, left=300_000))}),
            pytest.raises(RunFailed) as failed,
        ):
            train(make_spec(spec), storage=place, run_name="full")
        assert "No space left" in failed.value.diagnosis
        wait_for(lambda: not rank_processes(), "the ranks' end", 30)
        run = Run.open(place, "full")
        assert (causes(run), diagnose(run).fault) == (["storage"], "storage")
        sound = run.checkpoints()
        assert sound
        assert sound[-1].step < STEPS
        assert [info.step for info in sound] == list(range(EVERY, sound[-1].step + 1, EVERY))
        assert all(verify_checkpoint(run, info).ok for info in sound)
        ballast[0].unlink()
        train(make_spec(spec), storage=place, run_name="full")
        measured(run, undisturbed, interval=STEPS)


def test_a_full_disk_is_freed_in_time(
    storage: str, tiny_corpus: Path, undisturbed: Run, measured, tmp_path: Path
):
    """the disk is full, and freed after more saves in a row have failed than would end the run in
    the long term"""
    with small_disk(tmp_path / "disk", 48) as disk:
        place = copy_storage(storage, disk / "runs")

        def num_failed() -> int:
            return len(events(Run.open(place, "freed"), "checkpoint_failed"))

        def fill_for_a_while() -> None:
            ballast = fill(disk, left=300_000)
            wait_for(lambda: num_failed() > MAX_FAILED_IN_A_ROW, "saves that failed")
            ballast.unlink()

        run = disturbed(
            place,
            tiny_corpus,
            "freed",
            {4: fill_for_a_while},
            checkpoint={"every_steps": 2, "keep_last": 2},
        )
        measured(run, undisturbed)
        assert (causes(run), len(run.attempts())) == ([], 1)
        problems = [event["problem"] for event in events(run, "checkpoint_failed")]
        assert len(problems) > MAX_FAILED_IN_A_ROW
        assert all("No space left" in problem for problem in problems)


def test_a_disk_turns_read_only(
    storage: str, tiny_corpus: Path, undisturbed: Run, measured, tmp_path: Path
):
    """the disk turns read-only, and is mended after the run has failed"""
    with small_disk(tmp_path / "disk", 48) as disk:
        place = copy_storage(storage, disk / "runs")

        def remount(how: str) -> bool:  # refused while a file is open for writing
            command = ["mount", "-o", f"remount,{how}", str(disk)]
            return subprocess.run(command, check=False, capture_output=True).returncode == 0

        spec = make_spec(make_case(tiny_corpus))
        with (
            befalling(
                place, "closed", {8: lambda: wait_for(lambda: remount("ro"), "a read-only disk")}
            ),
            pytest.raises(RunFailed) as failed,
        ):
            train(spec, storage=place, run_name="closed")
        assert "Read-only file system" in failed.value.diagnosis
        assert "storage" in failed.value.diagnosis
        wait_for(lambda: not rank_processes(), "the ranks' end", 30)
        assert remount("rw")
        run = train(spec, storage=place, run_name="closed").run
        measured(run, undisturbed)
