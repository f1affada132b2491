"""Storage places of both kinds: a local folder, and an S3 server in this process."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from failing_proxy import FailingProxy, failing_proxy
from sharded_model import PLAN, make_test_spec

from dray.spec import Spec
from dray.store import Run, open_filesystem


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """host:port of a real S3 server, with one bucket called `bucket`."""
    server_module = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    names = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    query = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    filesystem, _ = open_filesystem(f"s3://bucket/x?{query}&allow_bucket_creation=true")
    filesystem.create_dir("bucket")
    yield query
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture
def s3_storage(s3_endpoint: str) -> str:
    return f"s3://bucket/{uuid.uuid4().hex}/runs?{s3_endpoint}"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries as they are, with pauses that a test can wait for, and none by the S3 library itself."""
    monkeypatch.setattr("dray.store.retrying.RETRY_SECONDS", 20.0)
    monkeypatch.setattr("dray.store.retrying.FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("dray.store.retrying.LONGEST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr("dray.store.filesystem.SDK_ATTEMPTS", 1)


@pytest.fixture
def proxy(s3_endpoint: str, impatient: None) -> Iterator[FailingProxy]:
    """A proxy before the S3 server that fails when told to."""
    target = s3_endpoint.partition("endpoint_override=")[2].partition("&")[0]
    with failing_proxy(target) as running:
        yield running


@pytest.fixture
def failing_storage(proxy: FailingProxy) -> str:
    return f"s3://bucket/{uuid.uuid4().hex}/runs?endpoint_override={proxy.endpoint}&scheme=http&region=us-east-1"


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for runs that does not exist yet, of each kind in turn."""
    if request.param == "local":
        return str(tmp_path / "runs")
    place: str = request.getfixturevalue("s3_storage")
    return place


@pytest.fixture
def spec() -> Spec:
    return make_test_spec()


@pytest.fixture
def run(storage: str, spec: Spec) -> Run:
    return Run.create(storage, "speeches", spec, PLAN)


@pytest.fixture
def local_run(tmp_path: Path, spec: Spec) -> Run:
    return Run.create(tmp_path / "runs", "speeches", spec, PLAN)
