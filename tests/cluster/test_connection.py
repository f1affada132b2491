"""What is done on Ray, where there is none."""

from __future__ import annotations

import http.server
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from heads import dray
from tiny import tiny_tree

CODE = """
import json, sys
import ray
from dray.cluster.placement import reserved
from dray.corpus.prepare import prepare
from dray.errors import UserError
from dray.spec import make_spec

spec = make_spec(json.loads(sys.argv[1]))
for work in (lambda: prepare(spec, "store"), lambda: reserved(spec.resources).__enter__()):
    try:
        work()
    except UserError as error:
        print(error)
assert not ray.is_initialized()
"""


def test_what_needs_ray_neither_starts_nor_joins_one(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text('{"text": "a"}\n')
    tree = tiny_tree(tmp_path / "texts")
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(tree)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert [line.partition(";")[0] for line in lines] == [
        "prepare: no Ray is connected",
        "reserved: no Ray is connected",
    ]
    assert all("connect Ray first: ray.init(" in line for line in lines)
    assert not (tmp_path / "store").exists()


@pytest.fixture(params=["mute", "web"])
def other(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of something that is neither a head nor a server of jobs: it takes connections
    and says nothing, or serves files."""
    if request.param == "mute":
        with socket.create_server(("127.0.0.1", 0)) as listener:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        return
    handler = http.server.SimpleHTTPRequestHandler
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("words", "scheme"),
    [
        (["train", "quickstart", "--storage", "runs"], ""),
        (["plan", "quickstart"], ""),
        (["leave"], ""),
        (["submit", "train", "quickstart", "--storage", "/x"], "http://"),
        (["runs"], "http://"),
    ],
)
def test_what_is_no_cluster_is_told_at_once(
    other: str, tmp_path: Path, words: list[str], scheme: str
) -> None:
    """Ray would ask it for minutes."""
    done = dray(tmp_path, None, *words, "--address", f"{scheme}{other}")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "no server of jobs" in line if scheme else "no Ray cluster answers at" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "address"),
    [
        (["train", "quickstart"], "http://127.0.0.1:8265"),
        (["plan", "quickstart"], "nonsense"),
        (["leave"], "nonsense"),
        (["runs"], "http://"),
    ],
)
def test_what_is_no_address_is_told(tmp_path: Path, words: list[str], address: str) -> None:
    done = dray(tmp_path, None, *words, "--address", address)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert f"--address {address}: is no address of a" in line
