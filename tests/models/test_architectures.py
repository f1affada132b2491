"""Unlike architectures that no formula knows train under ZeRO 0 and 3, and are what was counted:
a few of those that `make models` tries."""

from __future__ import annotations

import pytest

from bench.architectures import AGREES, count, train
from rank_host import RankHost


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("qwen3_moe", "causal_lm"),
        ("albert", "masked_lm"),
        ("mamba2", "causal_lm"),
        ("deberta-v2", "token_classification"),
        ("deepseek_v3", "causal_lm"),  # the rotated part of a head has a size of its own
        ("esm", "masked_lm"),  # positions are counted from the padding id on
    ],
)
def test_an_architecture_trains_under_zero_0_and_3(
    host: RankHost, architecture: str, task: str
) -> None:
    ((counted, _),) = host.run(count, 1, architecture, task)
    ((number, losses),) = host.run(train, 1, architecture, task, 0)
    assert number == counted
    assert len(set(losses)) == len(losses) == 2
    for of_rank in host.run(train, 2, architecture, task, 3):
        assert of_rank == (counted, pytest.approx(losses, rel=AGREES))
