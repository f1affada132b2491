"""A real disk that is too small for a run's checkpoints: refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dray.corpus.prepare import Corpus
from dray.errors import PlanError
from dray.runs import Run
from dray.spec import make_spec
from dray.train.driver import train_locally
from random_corpus import build_random_corpus
from small_disk import small_disk
from tiny import tiny_tree

SIZES = {"architecture": "llama", "hidden_size": 128, "num_layers": 2, "num_heads": 2}
"""Half a million parameters: a checkpoint of 5.5 MB."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_random_corpus(tmp_path_factory.mktemp("corpus"), [50], tokens=64)


def go(disk: Path, corpus: Corpus, steps: int = 4, **checkpoint: Any) -> Run:
    tree = tiny_tree(
        Path("none"),
        model=SIZES,
        checkpoint={"every_steps": 1, **checkpoint},
        duration={"steps": steps},
        validation={},
    )
    return train_locally(make_spec(tree), storage=str(disk / "runs"), corpus=corpus).run


def test_a_disk_without_room_for_the_checkpoints_is_refused(tmp_path: Path, corpus: Corpus) -> None:
    with small_disk(tmp_path / "disk", 15) as disk:
        with pytest.raises(PlanError) as refused:
            go(disk, corpus, keep_last=2)
        text = str(refused.value)
        assert f"--storage {disk}/runs: has 15.7 MB free; the run's checkpoints take" in text
        assert "(3 of 5.51 MB at once); keep fewer (checkpoint.keep_last=1), free some" in text
        assert list(disk.iterdir()) == []
        run = go(disk, corpus, keep_last=1)  # as it was told
        assert [info.step for info in run.checkpoints()] == [4]


def test_what_a_run_has_already_counts(tmp_path: Path, corpus: Corpus) -> None:
    with small_disk(tmp_path / "disk", 20) as disk:
        go(disk, corpus, keep_last=2)
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(5 * 2**20))
        with pytest.raises(PlanError, match=r"take 5\.\d+ MB more \(3 of 5\.51 MB at once\)"):
            go(disk, corpus, steps=6, keep_last=2)
        assert go(disk, corpus, keep_last=2).latest_checkpoint()  # nothing is left to do
        ballast.unlink()
        run = go(disk, corpus, steps=6, keep_last=2)
        assert [info.step for info in run.checkpoints()] == [5, 6]
