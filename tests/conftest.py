"""What tests share: a tiny real corpus, a tiny spec, and one local Ray for all tests that train."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHARED = Path(__file__).parents[2] / "shared" / "data"


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

    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About a megabyte of real text in four files: documentation strings of the standard library."""
    folder = tmp_path_factory.mktemp("corpus")
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:120]
    for number in range(4):
        with (folder / f"part-{number}.jsonl").open("w", encoding="utf-8") as file:
            for source in sources[number::4]:
                file.write(json.dumps({"id": source.name, "text": source.read_text("utf-8", "replace")[:8000]}) + "\n")
    return folder
