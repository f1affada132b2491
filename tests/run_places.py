"""Fixtures: storage places of both kinds, a local folder and the tests' S3 server, and runs in
them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from dray.runs import Run, create_run
from dray.spec import Spec
from failing_proxy import FailingProxy, failing_proxy
from sharded_model import PLAN, make_test_spec


@pytest.fixture
def s3_storage(s3_endpoint: str) -> str:
    return f"s3://bucket/{uuid.uuid4().hex}/runs?{s3_endpoint}"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries as they are, with pauses that a test can wait for, and none by the S3 library
    itself."""
    monkeypatch.setattr("dray.storage.retrying.RETRY_SECONDS", 20.0)
    monkeypatch.setattr("dray.storage.retrying.FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("dray.storage.retrying.LONGEST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr("dray.storage.filesystem.SDK_ATTEMPTS", 1)


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
    return create_run(storage, "speeches", spec, PLAN)


@pytest.fixture
def local_run(tmp_path: Path, spec: Spec) -> Run:
    return create_run(tmp_path / "runs", "speeches", spec, PLAN)
