"""An S3 server in this process, reachable from Ray's workers too."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

from dray.store.filesystem import open_filesystem


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A URI with `{}` for the path below an empty bucket; it carries its credentials."""
    server_module = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    query = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    filesystem, _ = open_filesystem(f"s3://key:secret@{name}/x?{query}")
    filesystem.create_dir(name)
    yield f"s3://key:secret@{name}/{{}}?{query.removesuffix('&allow_bucket_creation=true')}"
    server.stop()
