"""What tests share: a tiny real corpus, one local Ray for all tests that train, and an S3
server."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from rank_host import RankHost

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHARED = Path(__file__).parents[2] / "shared" / "data"


OWN_RAYS = {"cluster", "faults", "security", "serve"}
"""Folders whose tests start Rays of their own, one after the other."""
ONE_RAY = {"e2e", "release"}
"""Folders whose tests use `local_ray`, or a Ray of one command after the other."""


class _Lanes(LoadScopeScheduling):
    """What starts Rays of its own, and what shares one, each go one test after the other in one
    process, and wait most of the time. All else goes file by file to whoever is free. A third
    process would keep two cores so busy that Rays do not start in time."""

    def _split_scope(self, nodeid: str) -> str:
        """What stays together: xdist's own marks of groups do nothing under pytest 9.2."""
        file = nodeid.partition("::")[0]
        return _lane(file) or file


@cache
def _lane(file: str) -> str:
    path = Path(__file__).parents[1] / file
    if path.parent.name in OWN_RAYS:
        return "own rays"
    text = path.read_text(encoding="utf-8")
    if path.parent.name in ONE_RAY or any(word in text for word in ("local_ray", "started_head")):
        return "one ray"
    return ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """What `pytest -n 2` deals tests by."""
    return _Lanes(config, log)


@pytest.fixture(autouse=True)
def nothing_held() -> Iterator[None]:
    """Credentials that one test's URIs carry are none of another's. It takes no `monkeypatch`:
    other fixtures' order of taking things back would change with it."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr("dray.redaction._held", {})
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent")
    return SHARED.resolve()


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray for every test that trains: starting it costs more than a tiny run."""
    import ray

    from dray.cluster.local_ray import lean
    from dray.cluster.workers import fork_environment

    with lean(
        onlookers=True
    ):  # Ray Train's cleaner asks them, in a Ray that a run has not started itself
        ray.init(
            address="local",
            num_cpus=6,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env=fork_environment("light:full", {}),
        )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def host() -> Iterator[RankHost]:
    """Forks groups of ranks that have imported everything."""
    from rank_host import rank_host

    with rank_host() as host:
        yield host


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About a megabyte of real text in four files: documentation strings of the standard
    library."""
    folder = tmp_path_factory.mktemp("corpus")
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:120]
    for number in range(4):
        with (folder / f"part-{number}.jsonl").open("w", encoding="utf-8") as file:
            for source in sources[number::4]:
                file.write(
                    json.dumps(
                        {"id": source.name, "text": source.read_text("utf-8", "replace")[:8000]}
                    )
                    + "\n"
                )
    return folder


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """host:port of a real S3 server, with one bucket called `bucket`."""
    from dray.storage.filesystem import open_filesystem

    server_module = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    names = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
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
