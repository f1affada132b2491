"""Zeros of a pruned model under every ZeRO stage: they stay, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_engine import VOCAB, make_case, train

from dray.rank.group import Ranks
from rank_host import RankHost

HELD = "layers.1.mlp.down_proj.weight"


def train_pruned(ranks: Ranks, stage: int, precision: str, keeps: bool) -> tuple[int, int, int]:
    """(elements that were zero, of these not zero after some steps, elements that have moved) of a
    matrix, on this rank."""
    from dray.models.build import build_model
    from dray.models.groups import parameter_groups
    from dray.rank.chance import Chance
    from dray.rank.engine import build_engine
    from dray.rank.hooks import build_hooks
    from dray.tasks.causal_lm import CausalLM

    spec, plan = make_case(stage, precision)
    regularization = spec.regularization.model_copy(update={"keep_zeros": keeps})
    spec = spec.model_copy(update={"regularization": regularization})

    def build(constructing: Any, gathering: Any) -> Any:
        model = build_model(
            spec,
            vocab_size=VOCAB,
            pad_token_id=1,
            eos_token_id=0,
            constructing=constructing,
            gathering=gathering,
        )
        matrix = model.get_parameter(f"model.{HELD}")
        with torch.no_grad(), gathering([matrix]):
            matrix[:, ::2] = 0.0
        return model

    engine = build_engine(
        build,
        lambda model: parameter_groups(model, 0.1),
        spec.optimizer,
        plan,
        ranks,
        make_objective=CausalLM().objective,
        hooks=build_hooks(spec, Chance()),
    )

    def pieces() -> list[torch.Tensor]:
        found = engine.fragments(whole_replicas=True)
        return [f.view.clone() for f in found if f.parameter.endswith(HELD) and f.state == "param"]

    before = pieces()
    train(engine, 3)
    counts = [0, 0, 0]
    for was, now in zip(before, pieces(), strict=True):
        zero = was == 0
        counts[0] += int(zero.sum())
        counts[1] += int((now[zero] != 0).sum())
        counts[2] += int((now[~zero] != was[~zero]).sum())
    return tuple(counts)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")],
)
def test_zeros_stay_under_every_stage(host: RankHost, stage: int, precision: str) -> None:
    found = host.run(train_pruned, 2, stage, precision, True)
    zeros, grown, moved = (sum(column) for column in zip(*found, strict=True))
    assert zeros > 0
    assert grown == 0
    assert moved > 0


def test_without_it_they_grow_back(host: RankHost) -> None:
    found = host.run(train_pruned, 1, 1, "fp32", False)
    assert found[0][1] > 0
