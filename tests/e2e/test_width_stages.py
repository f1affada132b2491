"""Width transfer under ZeRO: rates of their own for groups of parameters, wherever these lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dray.runs import Run
from dray.spec import make_spec
from dray.train import train
from tiny import tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")


def losses(corpus: Path, storage: str, stage: int, *, base: int | None) -> list[float]:
    optimizer: dict[str, Any] = {"learning_rate": 1e-2}
    if base is not None:
        optimizer["width_transfer"] = {"base_hidden_size": base}
    tree = tiny_tree(
        corpus, model={"tie_embeddings": False}, optimizer=optimizer, zero={"stage": stage}
    )
    name = f"stage-{stage}-base-{base}"
    run: Run = train(make_spec(tree), storage=storage, run_name=name).run
    return [row["loss"] for row in run.metrics()]


@pytest.mark.slow
def test_stages_agree_with_width_transfer(tiny_corpus: Path, tmp_path: Path) -> None:
    """Two ranks, under every stage, for a model that is four times as wide as its base."""
    storage = str(tmp_path / "runs")
    whole = losses(tiny_corpus, storage, 0, base=16)
    for stage in (1, 3):
        assert losses(tiny_corpus, storage, stage, base=16) == pytest.approx(whole, rel=2e-5)
    plain = losses(tiny_corpus, storage, 0, base=None)
    assert abs(plain[-1] - whole[-1]) > 1e-3
