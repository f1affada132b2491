"""Of any number of writers exactly one creates a file: real processes that race, on a disk and on
S3; lost answers."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs as pafs

from dray.errors import StorageFailed, StoreError
from dray.runs import CheckpointWriter, Run, create_run
from dray.storage import exclusive
from dray.storage.exclusive import _build_store, _s3_settings, create_exclusive
from dray.storage.filesystem import list_files, open_filesystem, read_bytes, write_bytes
from dray.storage.retrying import patience
from failing_proxy import FailingProxy, Fault
from races import race
from sharded_model import PLAN, SHAPES, make_fragments, make_test_spec, make_whole, save

RACE = """
import sys
from dray.storage.filesystem import open_filesystem
from dray.storage.exclusive import create_exclusive
filesystem, path = open_filesystem(sys.argv[1])
create_exclusive(filesystem, f"{path}/warm-{sys.argv[2]}", sys.argv[2].encode())
print("ready", flush=True)
sys.stdin.readline()
won = [n for n in range(15)
       if create_exclusive(filesystem, f"{path}/race/{n}", f"{sys.argv[2]}-{n}".encode())]
print(*won)
"""


@pytest.mark.parametrize("kind", ["disk", "s3"])
def test_exactly_one_of_several_processes(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    storage = str(tmp_path) if kind == "disk" else request.getfixturevalue("failing_storage")
    told = race(RACE, *((storage, str(number)) for number in range(4)))
    winners = [said.split() for said in told]
    assert sorted(int(number) for won in winners for number in won) == list(range(15))
    filesystem, path = open_filesystem(storage)
    for writer, won in enumerate(winners):
        for number in won:
            assert read_bytes(filesystem, f"{path}/race/{number}") == f"{writer}-{number}".encode()


FAULTS: list[Fault] = [
    "lost",
    "reset",
    (503, "SlowDown"),
    (409, "ConditionalRequestConflict"),
    (429, "TooMany"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_the_winner_knows_it_whatever_happens(
    proxy: FailingProxy, failing_storage: str, fault: Fault
) -> None:
    """Also when the answer to a put that was carried out is lost: the second try meets the own
    file."""
    filesystem, path = open_filesystem(failing_storage)
    proxy.fail_next(2, fault, "PUT")
    assert create_exclusive(filesystem, f"{path}/a", b"one")
    assert proxy.num_failed == 2
    proxy.fail_next(2, fault, "PUT")
    assert not create_exclusive(filesystem, f"{path}/a", b"two")
    assert read_bytes(filesystem, f"{path}/a") == b"one"


def test_a_refusal_is_one_clear_error(
    proxy: FailingProxy, failing_storage: str, s3_endpoint: str
) -> None:
    filesystem, path = open_filesystem(failing_storage)
    proxy.decide = lambda method, path: (403, "AccessDenied")
    with pytest.raises(StorageFailed, match="the storage refuses it"):
        create_exclusive(filesystem, f"{path}/a", b"one")
    proxy.decide = lambda method, path: (503, "SlowDown")
    with patience(0.2), pytest.raises(StorageFailed, match="the storage failed for"):
        create_exclusive(filesystem, f"{path}/a", b"one")
    filesystem, path = open_filesystem(f"s3://no-such-bucket/runs?{s3_endpoint}")
    with pytest.raises(StoreError, match="no such bucket"):
        create_exclusive(filesystem, f"{path}/a", b"one")


def test_a_marker_is_never_replaced(run: Run) -> None:
    writer, whole = CheckpointWriter(run, 10, 1), make_whole()
    files = [writer.write_rank(rank, 2, make_fragments(whole, rank, 2)) for rank in range(2)]
    info = writer.commit(files, {"shapes": SHAPES})
    before = read_bytes(run.filesystem, f"{info.path}/COMMITTED")
    with pytest.raises(StoreError, match="is committed already"):
        writer.write_rank(0, 2, make_fragments(whole, 0, 2))
    with pytest.raises(StoreError, match="is committed already"):
        writer.commit(files, {"shapes": SHAPES})
    assert read_bytes(run.filesystem, f"{info.path}/COMMITTED") == before
    assert run.latest_checkpoint() == info


def test_a_commit_whose_answers_are_lost(proxy: FailingProxy, failing_storage: str) -> None:
    run = create_run(failing_storage, "speeches", make_test_spec(), PLAN)
    proxy.fail_next(2, "lost", "PUT", "COMMITTED")
    info = save(run, 10)
    assert proxy.num_failed == 2
    assert run.latest_checkpoint() == info


def test_keys_with_odd_names(s3_storage: str) -> None:
    filesystem, path = open_filesystem(s3_storage)
    for name in ("a b", "a%20b", "ü", "a+b", "a'b"):
        assert create_exclusive(filesystem, f"{path}/{name}", name.encode())
        assert not create_exclusive(filesystem, f"{path}/{name}", b"other")
        assert read_bytes(filesystem, f"{path}/{name}") == name.encode()


def options_of(uri: str) -> dict[str, object]:
    options: dict[str, object] = open_filesystem(uri)[0].__reduce__()[1][0]
    return options


def test_settings_come_from_the_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _s3_settings(
        options_of(
            "s3://key:secret@bucket/x?endpoint_override=127.0.0.1:9000&scheme=http&region=eu-west-3"
        )
    )
    assert settings == {
        "region": "eu-west-3",
        "skip_signature": False,
        "virtual_hosted_style_request": False,
        "endpoint": "http://127.0.0.1:9000",
        "access_key_id": "key",
        "secret_access_key": "secret",
    }
    assert _s3_settings(options_of("s3://anonymous@bucket/x?region=eu-west-3"))[
        "skip_signature"
    ] in (True, False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from-the-environment")
    assert "access_key_id" not in _s3_settings(options_of("s3://other/x?region=eu-west-3")), (
        "obstore reads it itself"
    )


def test_settings_come_from_a_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = a\naws_secret_access_key = b\n"
        "[team]\naws_access_key_id = c\naws_secret_access_key = d%\naws_session_token = e\n"
    )
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    settings = _s3_settings(options_of("s3://bucket/x?region=eu-west-3"))
    assert (settings["access_key_id"], settings["secret_access_key"]) == ("a", "b")
    monkeypatch.setenv("AWS_PROFILE", "team")
    settings = _s3_settings(options_of("s3://bucket/x?region=eu-west-3"))
    assert (
        settings["access_key_id"],
        settings["secret_access_key"],
        settings["session_token"],
    ) == ("c", "d%", "e")


class _Gcs(http.server.BaseHTTPRequestHandler):
    """What Google's storage does with a conditional put, and no more: its own server is not to be
    had here."""

    objects: dict[str, bytes] = {}  # noqa: RUF012

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        only_new = self.headers.get("x-goog-if-generation-match") == "0"
        taken = only_new and self.path in self.objects
        if not taken:
            self.objects[self.path] = content
        self.send_response(412 if taken else 200)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def gcs_endpoint() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Gcs)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_google_is_asked_to_create_only(gcs_endpoint: str) -> None:
    from dray.storage.exclusive import _put

    filesystem, path = open_filesystem(
        f"gs://anonymous@bucket/x?endpoint_override={gcs_endpoint}&scheme=http"
    )
    assert isinstance(filesystem, pafs.GcsFileSystem)
    store = _build_store(filesystem, "bucket")
    assert _put(store, "x/a", path, b"one")
    assert not _put(store, "x/a", path, b"two")
    assert list(_Gcs.objects.values()) == [b"one"]


def test_where_nothing_is_conditional_the_last_one_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old way, which other filesystems are left with: of simultaneous writers all but one see
    that they lost. fsspec's memory is no store for threads, so each of its operations is let go by
    itself: they may still come in any order."""
    monkeypatch.setattr("dray.storage.exclusive.SETTLE_SECONDS", 0.2)
    alone = threading.Lock()

    def one_by_one(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with alone:
                return operation(*arguments)

        return call

    for name in ("exists", "read_bytes", "write_bytes"):
        monkeypatch.setattr(exclusive, name, one_by_one(getattr(exclusive, name)))
    filesystem, path = open_filesystem(f"memory://{os.urandom(6).hex()}")
    won: list[int] = []

    def write(number: int) -> None:
        if create_exclusive(filesystem, f"{path}/a", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(number).encode() for number in won] == [read_bytes(filesystem, f"{path}/a")]
    assert not create_exclusive(filesystem, f"{path}/a", b"late")


def test_a_server_without_conditions_is_told_of(
    proxy: FailingProxy, failing_storage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Older servers refuse the condition; a plain put, which has none, they take."""
    filesystem, path = open_filesystem(failing_storage)
    proxy.fail_next(3, (501, "NotImplemented"), "PUT")  # obstore tries a request three times itself
    assert create_exclusive(filesystem, f"{path}/a", b"one")
    assert not create_exclusive(filesystem, f"{path}/a", b"two")
    assert "no conditional put" in caplog.text


def test_other_ways_of_writing_still_replace(storage: str) -> None:
    filesystem, path = open_filesystem(storage)
    assert create_exclusive(filesystem, f"{path}/a", b"one")
    write_bytes(filesystem, f"{path}/a", b"two")
    assert read_bytes(filesystem, f"{path}/a") == b"two"
    assert list_files(filesystem, path) == {"a": 3}
