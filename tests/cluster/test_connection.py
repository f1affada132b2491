"""What is done on Ray, where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
