"""What passes is waited for, what stays is one clear error: with a real S3 server that fails, and
real full disks."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dray.errors import StorageFailed, StoreError
from dray.runs import (
    CheckpointReader,
    apply_retention,
    check_storage,
    create_run,
    open_or_create,
    verify_checkpoint,
)
from dray.storage.filesystem import (
    RangeReader,
    append_line,
    delete_folder,
    exists,
    list_files,
    list_folders,
    open_filesystem,
    read_bytes,
    write_bytes,
    write_whole,
)
from dray.storage.retrying import is_transient, patience, retry
from failing_proxy import FailingProxy, Fault
from sharded_model import PLAN, SHAPES, make_test_spec, make_whole, save


class GoogleError(Exception):
    """Like those of Google's libraries, which have a numeric code and are no OSErrors."""

    code = 503


GoogleError.__module__ = "google.api_core.exceptions"
AWS = "When reading information for key 'runs/timeout-503/x' in bucket 'b': AWS Error"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            OSError(
                f"{AWS} UNKNOWN (HTTP status 503) during HeadObject operation: No response body."
            ),
            True,
        ),
        (
            OSError(
                f"{AWS} UNKNOWN (HTTP status 429) during HeadObject operation: No response body."
            ),
            True,
        ),
        (
            OSError(
                f"{AWS} SLOW_DOWN during PutObject operation: Please reduce your request rate."
            ),
            True,
        ),
        (
            OSError(
                f"{AWS} REQUEST_TIMEOUT during PutObject operation: Your socket connection was "
                "not read"
            ),
            True,
        ),
        (
            OSError(
                f"{AWS} NETWORK_CONNECTION during GetObject operation: curlCode: 28, Timeout was "
                "reached"
            ),
            True,
        ),
        (
            OSError(
                f"{AWS} NETWORK_CONNECTION during GetObject operation: curlCode: 60, SSL peer "
                "certificate"
            ),
            False,
        ),
        (OSError(f"{AWS} INTERNAL_FAILURE during ListObjectsV2 operation: InternalError"), True),
        (OSError(f"{AWS} ACCESS_DENIED during PutObject operation: AccessDenied"), False),
        (
            OSError(
                f"{AWS} UNKNOWN (HTTP status 400) during HeadObject operation: No response body."
            ),
            False,
        ),
        (
            OSError(
                f"{AWS} UNKNOWN (HTTP status 507) during PutObject operation: XMinioStorageFull"
            ),
            False,
        ),
        (
            OSError(f"{AWS} NO_SUCH_BUCKET during CreateMultipartUpload operation: NoSuchBucket"),
            False,
        ),
        (
            OSError(
                "google::cloud::Status(UNAVAILABLE: Retry policy exhausted, CURL error [7]=Could "
                "not connect)"
            ),
            True,
        ),
        (
            OSError(
                "google::cloud::Status(PERMISSION_DENIED: caller has no storage.objects.create)"
            ),
            False,
        ),
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        (TimeoutError(), True),
        (OSError(255, "Unknown"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError(errno.EROFS, "Read-only file system"), False),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), False),
        (PermissionError(errno.EACCES, "no"), False),
        (FileNotFoundError(errno.ENOENT, "timeout"), False),
        (FileExistsError("connection"), False),
        (GoogleError("backend"), True),
        (fsspec.exceptions.FSTimeoutError(), True),
        (RuntimeError("connection timed out"), False),
        (ValueError("HTTP status 503"), False),
        (StoreError("s3://b", "timed out"), False),
        (StorageFailed("s3://b", "timed out", number=errno.EIO), False),
    ],
    ids=str,
)
def test_what_passes(error: Exception, expected: bool) -> None:
    assert is_transient(error) is expected


FAULTS: list[Fault] = [
    (503, "SlowDown"),
    (500, "InternalError"),
    (429, "TooManyRequests"),
    (504, "Timeout"),
    "reset",
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_every_operation_survives(proxy: FailingProxy, failing_storage: str, fault: Fault) -> None:
    filesystem, path = open_filesystem(failing_storage)

    def failing(times: int = 3) -> None:
        proxy.fail_next(times, fault)

    failing()
    write_bytes(filesystem, f"{path}/a/b", b"content")
    failing()
    assert read_bytes(filesystem, f"{path}/a/b") == b"content"
    failing()
    assert exists(filesystem, f"{path}/a/b")
    failing()
    assert list_files(filesystem, f"{path}/a") == {"b": 7}
    failing()
    assert list_folders(filesystem, path) == ["a"]
    reader = RangeReader(filesystem, f"{path}/a/b")
    failing()
    assert reader.read_at(3, 0) == b"con"
    failing()
    assert reader.read_at(4, 3) == b"tent"
    failing()
    write_whole(
        filesystem, f"{path}/a/c", lambda stream: stream.write(b"x" * 12_000_000)
    )  # in several parts
    assert list_files(filesystem, f"{path}/a") == {"b": 7, "c": 12_000_000}
    failing()
    delete_folder(filesystem, f"{path}/a")
    assert list_files(filesystem, f"{path}/a") == {}
    assert proxy.num_failed == 9 * 3


def test_a_failure_in_the_middle_of_a_large_file(proxy: FailingProxy, failing_storage: str) -> None:
    """The producer starts over, and what is there in the end is whole."""
    filesystem, path = open_filesystem(failing_storage)
    content, calls = os.urandom(14_000_000), []
    failed = []

    def decide(method: str, where: str) -> Fault | None:
        if method == "PUT" and "partNumber=2" in where and len(failed) < 2:
            failed.append(where)
            return 503, "SlowDown"
        return None

    def produce(stream: object) -> int:
        calls.append(1)
        for at in range(0, len(content), 1_000_000):
            stream.write(content[at : at + 1_000_000])  # type: ignore[attr-defined]
        return len(content)

    proxy.decide = decide
    assert write_whole(filesystem, f"{path}/large", produce) == len(content)
    assert len(calls) == 3
    assert read_bytes(filesystem, f"{path}/large") == content


def test_a_run_lives_through_bad_days(proxy: FailingProxy, failing_storage: str) -> None:
    """Every seventh request fails, in turn in every way: a whole life of a run, and nothing is lost
    or torn."""
    count = [0]

    def decide(method: str, path: str) -> Fault | None:
        count[0] += 1
        return FAULTS[count[0] // 7 % len(FAULTS)] if count[0] % 7 == 0 else None

    proxy.decide = decide
    run = open_or_create(failing_storage, "speeches", make_test_spec(), PLAN)
    driver = run.take_over()
    attempt = run.begin_attempt(2, 0, driver=driver.number)
    for step in range(1, 7):
        run.log_metrics([{"step": step, "attempt": attempt, "loss": 1.0}])
        run.heartbeat(driver)
        if step % 2 == 0:
            info = save(run, step, attempt=attempt)
            apply_retention(run, keep_last=2)
    run.set_status("completed", driver=driver)
    run.release(driver)
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 6]
    assert [found.step for found in run.checkpoints()] == [4, 6]
    assert verify_checkpoint(run, info).ok
    whole = make_whole(6)
    with run.hold(info), CheckpointReader(run, info) as reader:
        assert all(bool((reader.read(name) == whole[name, "param"]).all()) for name in SHAPES)
    assert proxy.num_failed > 20


def test_an_outage_is_survived(
    proxy: FailingProxy, failing_storage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A store that is down for seconds: the caller waits, and is told so."""
    filesystem, path = open_filesystem(failing_storage)
    proxy.decide = lambda method, path: "reset"
    threading.Timer(2.0, lambda: setattr(proxy, "decide", lambda method, path: None)).start()
    begun = time.monotonic()
    write_bytes(filesystem, f"{path}/a", b"content")
    assert time.monotonic() - begun > 1.5
    assert read_bytes(filesystem, f"{path}/a") == b"content"
    assert "the storage fails" in caplog.text


def test_a_store_that_stays_down_is_one_clear_error(
    proxy: FailingProxy, failing_storage: str
) -> None:
    filesystem, path = open_filesystem(failing_storage)
    proxy.decide = lambda method, path: (503, "SlowDown")
    begun = time.monotonic()
    with (
        patience(0.5),
        pytest.raises(StorageFailed, match=r"the storage failed for .* it is up") as caught,
    ):
        read_bytes(filesystem, f"{path}/a")
    assert time.monotonic() - begun < 3
    assert "\n" not in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.what, copy.errno) == (str(caught.value), caught.value.what, None)


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ((403, "AccessDenied"), "the storage refuses it"),
        ((507, "XMinioStorageFull"), "the storage is full"),
        ((400, "InvalidRequest"), "the storage fails"),
    ],
)
def test_what_stays_is_not_tried_again(
    proxy: FailingProxy, failing_storage: str, fault: Fault, what: str
) -> None:
    filesystem, path = open_filesystem(failing_storage)
    proxy.decide = lambda method, path: fault
    with pytest.raises(StorageFailed, match=what):
        write_bytes(filesystem, f"{path}/a", b"content")
    assert len(proxy.requests) == 1
    with pytest.raises(StoreError, match="cannot be written"):
        check_storage(failing_storage)


def test_a_failed_replacement_keeps_what_was_there(
    proxy: FailingProxy, failing_storage: str
) -> None:
    filesystem, path = open_filesystem(failing_storage)
    write_bytes(filesystem, f"{path}/run.json", b"before")
    for fault in ("reset", (403, "AccessDenied")):
        proxy.fail_next(10**6, fault, "PUT")
        with patience(0.2), pytest.raises(StorageFailed):
            write_bytes(filesystem, f"{path}/run.json", b"after")
        proxy.fail_next(0, fault)
        assert read_bytes(filesystem, f"{path}/run.json") == b"before"


def test_what_is_out_of_reach_is_not_unsound(proxy: FailingProxy, failing_storage: str) -> None:
    """An outage must neither send a run back to an older checkpoint nor set one aside."""
    run = create_run(failing_storage, "speeches", make_test_spec(), PLAN)
    save(run, 10)
    info = save(run, 20)
    reader = CheckpointReader(run, info)
    proxy.fail_next(10**6, (503, "SlowDown"), path="step-00000020-a0001")
    with patience(0.2):
        for look in (
            run.latest_checkpoint,
            lambda: reader.verify_files([0]),
            lambda: verify_checkpoint(run, info),
        ):
            with pytest.raises(StorageFailed):
                look()
    proxy.fail_next(0, "reset")
    assert run.latest_checkpoint() == info


class Flaky(MemoryFileSystem):
    """A filesystem of fsspec in memory whose next operations fail with an error of the operating
    system."""

    protocol = "flaky"
    store: dict[str, object] = {}  # noqa: RUF012 - as in the class above
    pseudo_dirs = [""]  # noqa: RUF012
    failures: list[int] = []  # noqa: RUF012

    def _fail(self) -> None:
        if Flaky.failures:
            number = Flaky.failures.pop()
            raise OSError(number, os.strerror(number))

    def _open(self, *args: object, **more: object) -> object:
        self._fail()
        return super()._open(*args, **more)

    def info(self, *args: object, **more: object) -> object:
        self._fail()
        return super().info(*args, **more)


@pytest.fixture
def flaky(impatient: None) -> Iterator[str]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.failures.clear()
    yield f"flaky://{uuid.uuid4().hex}"
    Flaky.failures.clear()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_network_mount_that_fails_for_a_moment(flaky: str, number: int) -> None:
    filesystem, path = open_filesystem(flaky)
    Flaky.failures += [number] * 3
    write_bytes(filesystem, f"{path}/a", b"content")
    Flaky.failures += [number] * 3
    assert read_bytes(filesystem, f"{path}/a") == b"content"
    Flaky.failures.append(errno.EACCES)
    with pytest.raises(StorageFailed, match="refuses it") as caught:
        read_bytes(filesystem, f"{path}/a")
    assert caught.value.errno == errno.EACCES


def test_a_file_that_stays_unreadable_is_damage(flaky: str) -> None:
    """A bad sector fails for ever with EIO: after the waiting it is that file's fault, and an older
    one is used."""
    run = create_run(flaky, "speeches", make_test_spec(), PLAN)
    info = save(run, 10, num_ranks=1)
    with CheckpointReader(run, info) as reader, patience(0.1):
        Flaky.failures += [errno.EIO] * 100
        assert "cannot be read" in reader.verify_files([0])[0]


def test_a_stale_handle_is_opened_anew(tmp_path: Path) -> None:
    """The handle of the first opening is closed under the reader's feet, as a server's restart
    does."""
    (tmp_path / "a").write_bytes(b"content")
    filesystem, path = open_filesystem(tmp_path / "a")
    reader = RangeReader(filesystem, path)
    assert reader.read_at(3, 0) == b"con"
    handle = next(fd for fd in map(int, os.listdir("/proc/self/fd")) if _target(fd) == path)
    with (tmp_path / "b").open("wb") as other:
        os.dup2(other.fileno(), handle)  # can only be written: reading fails with EBADF
    with pytest.raises(StorageFailed):
        reader.read_at(3, 0)
    assert reader.read_at(3, 0) == b"con"
    reader.close()


def _target(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_is_said_at_once(small_disk: Path) -> None:
    filesystem, path = open_filesystem(small_disk)
    write_bytes(filesystem, f"{path}/a", b"before")
    begun = time.monotonic()
    with pytest.raises(
        StorageFailed, match=r"the storage is full \(.*No space left.* free space there"
    ) as caught:
        write_bytes(filesystem, f"{path}/a", b"x" * 3_000_000)
    assert caught.value.errno == errno.ENOSPC
    assert time.monotonic() - begun < 5
    assert read_bytes(filesystem, f"{path}/a") == b"before"
    assert list_files(filesystem, path) == {"a": 6}


def test_rows_that_do_not_fit_leave_none_of_themselves(small_disk: Path) -> None:
    path = f"{small_disk}/rows.jsonl"
    append_line(path, b'{"step": 1}\n')
    with pytest.raises(StorageFailed, match="the storage is full"):
        append_line(path, b'{"step": 2}\n' * 300_000)
    assert Path(path).read_bytes() == b'{"step": 1}\n'
    append_line(path, b'{"step": 2}\n')
    assert Path(path).read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_read_only_disk(small_disk: Path) -> None:
    run = create_run(small_disk, "speeches", make_test_spec(), PLAN)
    info = save(run, 10, num_ranks=1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreError, match=r"cannot be written \(.*Read-only"):
        check_storage(small_disk)
    with pytest.raises(StorageFailed, match=r"refuses it .*Read-only"):
        run.begin_attempt(1, 10)
    assert verify_checkpoint(run, info).ok
    with run.hold(info):
        assert run.latest_checkpoint() == info


def test_what_is_no_failure_of_the_storage_comes_through(tmp_path: Path) -> None:
    filesystem, path = open_filesystem(tmp_path)
    calls = []

    def produce(stream: object) -> None:
        calls.append(1)
        raise RuntimeError("connection timed out")

    with pytest.raises(RuntimeError):
        write_whole(filesystem, f"{path}/a", produce)
    with pytest.raises(FileNotFoundError):
        read_bytes(filesystem, f"{path}/a")
    with pytest.raises(KeyboardInterrupt):
        retry(lambda: (_ for _ in ()).throw(KeyboardInterrupt()), "here")
    assert len(calls) == 1
    assert os.listdir(tmp_path) == []
