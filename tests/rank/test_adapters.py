"""Adapters under every ZeRO stage: the losses are those of peft in a plain loop, and what one place
has saved another restores.

Real DeepSpeed over gloo in forked ranks, real peft beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dray.plan import make_plan, parse_shape
from dray.rank.group import Ranks
from dray.spec import Spec, make_spec
from rank_host import RankHost
from tiny import tiny_tree

VOCAB, ROWS, WIDTH, STEPS, RATE = 256, 8, 16, 4, 3e-3
EPSILON = 1e-4
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "dora": {"rank": 4, "targets": ["q_proj", "down_proj"]},
    "rslora": {"rank": 16, "alpha": 4.0},
    "ia3": {},
    "prefix": {"num_tokens": 3},
    "prompt": {"num_tokens": 3},
    "bottleneck": {"width": 6},
}


def spec_of(adapters: dict[str, Any] | None, stage: int = 0, **sections: Any) -> Spec:
    tree = tiny_tree(
        Path("none"),
        data={"sequence_tokens": WIDTH},
        model={
            "num_kv_heads": 2,
            "max_positions": 64,
            "options": {"initializer_range": 0.15},
        },
        # A greater epsilon: of gradients near zero Adam sees little but their rounding.
        optimizer={"learning_rate": RATE, "weight_decay": 0.0, "epsilon": EPSILON},
        regularization={"clip_grad_norm": None},
        zero={"stage": stage},
        batch={"global_rows": ROWS, "micro_rows": 2},
        **sections,
    )
    return make_spec(tree | ({"adapters": adapters} if adapters else {}))


def build(spec: Spec, *, adapted: bool = True, **around: Any) -> Any:
    from dray.models.build import build_model

    return build_model(
        spec, vocab_size=VOCAB, pad_token_id=1, eos_token_id=0, adapted=adapted, **around
    )


def engine_of(spec: Spec, ranks: Ranks, precision: str = "fp32") -> Any:
    from dray.models.freezing import with_depths
    from dray.models.groups import parameter_groups
    from dray.rank.engine import build_engine

    plan = make_plan(spec, parse_shape("1xCPU(cpus=8,memory=64GB,bf16=1)"), with_ray=False)
    # What a whole machine would hold in one piece is cut into many here.
    zero = plan.deepspeed["zero_optimization"] | (
        {"stage3_param_persistence_threshold": 0} if plan.zero_stage == 3 else {}
    )
    settings = plan.deepspeed | {
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": zero,
    }
    return build_engine(
        lambda constructing, gathering: build(spec, constructing=constructing, gathering=gathering),
        lambda model: with_depths(model, parameter_groups(model, 0.0), spec),
        spec.optimizer,
        plan.model_copy(update={"precision": precision, "deepspeed": settings}),
        ranks,
        make_objective=spec.task.objective,
    )


def rows(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(2, VOCAB, (ROWS, WIDTH), generator=generator)


def train(engine: Any, ranks: Ranks, first: int = 1, last: int = STEPS) -> list[float]:
    """The losses of the steps, each of the whole batch."""
    losses = []
    engine.train(True)
    for step in range(first, last + 1):
        engine.begin_step(step)
        ids = rows(step)
        mine = ids[ranks.rank :: ranks.num_ranks]
        terms, _ = engine({"input_ids": mine, "labels": mine.roll(-1, 1)})
        summed = terms["loss"][0]
        engine.backward(summed * ranks.num_ranks / ids.numel(), last=True)
        engine.step(RATE)
        losses.append(float(ranks.total(summed.detach().double())) / ids.numel())
    return losses


def train_peft(spec: Spec) -> list[float]:
    """The losses of peft in a plain loop of torch, from the same initial weights."""
    import peft

    from dray.models.adapters import as_peft

    config, state = as_peft(build(spec))
    base = build(spec, adapted=False)
    kind = peft.PeftConfig.from_peft_type(**{**config, "inference_mode": False})
    model: Any = peft.get_peft_model(base, kind)
    found = peft.get_peft_model_state_dict(model)
    assert found.keys() == {name.replace(".default", "") for name in state}
    peft.set_peft_model_state_dict(model, state)
    if "prompt_embeddings" in state:
        torch.testing.assert_close(
            model.prompt_encoder["default"].embedding.weight.data, state["prompt_embeddings"]
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    chosen = spec.optimizer
    optimizer = torch.optim.AdamW(
        trained,
        lr=RATE,
        betas=(chosen.beta1, chosen.beta2),
        eps=EPSILON,
        weight_decay=0.0,
    )
    losses = []
    for step in range(1, STEPS + 1):
        ids = rows(step)
        logits = model(input_ids=ids).logits[:, -WIDTH:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def train_everywhere(ranks: Ranks, kind: str, settings: dict[str, Any]) -> dict[str, list[float]]:
    """The losses under each ZeRO stage, and peft's."""
    adapters = {"name": kind, **settings}
    found = {
        f"stage {stage}": train(engine_of(spec_of(adapters, stage), ranks), ranks)
        for stage in range(4)
    }
    if kind != "bottleneck":
        found["peft"] = train_peft(spec_of(adapters))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_pefts_under_every_stage(host: RankHost, kind: str) -> None:
    found, _ = host.run(train_everywhere, 2, kind, KINDS[kind])
    expected = found.pop("peft", None) or found["stage 0"]
    for losses in found.values():
        assert losses == pytest.approx(expected, abs=1e-6)
    assert len(found) == 4


def save_and_restore(
    ranks: Ranks, folder: str, spec: Spec, precision: str, place: str
) -> tuple[list[float], list[str], int]:
    """Train to half, save, go on: the later losses, the names that were saved, and how many bytes.
    At the second place: restore and go on."""
    from dray.rank.saving import Saver
    from dray.runs import CheckpointReader, Run, create_run

    engine = engine_of(spec, ranks, precision)
    shapes = {name: list(shape) for name, shape in engine.parameter_shapes.items()}
    if place == "first":
        run = Run.find(folder, "run") if ranks.rank else create_run(folder, "run", spec, {})
        ranks.barrier()
        run = run or Run.open(folder, "run")
        train(engine, ranks, last=STEPS // 2)
        saver = Saver(run, 1, spec, engine=engine, ranks=ranks, wait_stored=lambda: None)
        saver.begin(STEPS // 2, {"step": STEPS // 2, "shapes": shapes, "optimizer_step": 2})
        outcome = saver.finish()
        assert outcome is not None
        assert not outcome.problem
    else:
        run = Run.open(folder, "run")
        with CheckpointReader(run, run.checkpoints()[-1]) as reader:
            engine.restore(reader, STEPS // 2, {})
    ranks.barrier()
    with CheckpointReader(run, run.checkpoints()[-1]) as reader:
        names = reader.names()
    info = run.checkpoints()[-1]
    return train(engine, ranks, STEPS // 2 + 1), names, info.num_bytes


@pytest.mark.parametrize(
    ("adapters", "first", "then", "precision"),
    [
        ({"name": "lora", "rank": 4}, (3, 2), (0, 1), "fp32"),
        ({"name": "dora", "rank": 2}, (1, 1), (3, 2), "fp32"),
        ({"name": "prefix", "num_tokens": 3}, (2, 2), (3, 1), "fp32"),
        ({"name": "lora", "base": "nf4"}, (2, 2), (0, 1), "fp32"),
        ({"name": "lora", "rank": 4}, (3, 2), (2, 1), "bf16"),
        ({"name": "lora", "base": "nf4"}, (1, 1), (2, 2), "bf16"),
    ],
)
def test_a_checkpoint_holds_what_is_trained_and_goes_anywhere(
    host: RankHost,
    tmp_path: Path,
    adapters: dict[str, Any],
    first: tuple[int, int],
    then: tuple[int, int],
    precision: str,
) -> None:
    found = []
    for (stage, num_ranks), place in ((first, "first"), (then, "second")):
        spec = spec_of(adapters, stage, precision=precision)
        found.append(
            host.run(save_and_restore, num_ranks, str(tmp_path), spec, precision, place)[0]
        )
    (before, names, num_bytes), (after, _, _) = found
    assert after == pytest.approx(before, abs=1e-5 if precision == "fp32" else 3e-2)
    assert all("lora" in name or "virtual_tokens" in name for name in names)
    trained = {name: p for name, p in build(spec).named_parameters() if p.requires_grad}
    assert set(names) == set(trained)
    values = 3 * 4 * sum(parameter.numel() for parameter in trained.values())
    assert values < num_bytes < values + 40_000  # weights, two moments, and what describes them


def thaw(ranks: Ranks, spec: Spec, watched: list[str]) -> list[dict[str, Any]]:
    """Which of the watched parameters each step has changed, and the gradient norms."""
    engine = engine_of(spec, ranks)
    engine.train(True)
    found = []
    before = _whole(engine, watched)
    for step in range(1, 8):
        engine.begin_step(step)
        ids = rows(step)[ranks.rank :: ranks.num_ranks]
        terms, _ = engine({"input_ids": ids, "labels": ids.roll(-1, 1)})
        engine.backward(terms["loss"][0] * ranks.num_ranks / (ROWS * WIDTH), last=True)
        update = engine.step(RATE)
        after = _whole(engine, watched)
        moved = {name: float((after[name] - before[name]).abs().max()) for name in watched}
        found.append({"moved": moved, "norm": float(update.grad_norm)})
        before = after
    return found


def _whole(engine: Any, names: list[str]) -> dict[str, Tensor]:
    """Parameters as wholes, from the fragments of all ranks."""
    import torch.distributed as dist

    found = {name: torch.zeros(engine.parameter_shapes[name]).flatten() for name in names}
    for name, state, start, view in engine.fragments():
        if state == "param" and name in found:
            found[name][start : start + view.numel()] = view.float()
    for tensor in found.values():
        dist.all_reduce(tensor)
    return found


WATCHED = {
    "model.embed_tokens.weight": 7,
    "model.layers.0.mlp.up_proj.weight": 5,
    "model.layers.1.mlp.up_proj.weight": 3,
    "model.norm.weight": 1,
}
"""The first steps that train them, thawed every second step: the head is the embedding."""


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_blocks_thaw_from_the_last_one_down(host: RankHost, stage: int) -> None:
    spec = spec_of(None, stage, freezing={"thaw_every_steps": 2})
    # Momentum and decay must begin with the block, too.
    spec = spec.model_copy(
        update={"optimizer": spec.optimizer.model_copy(update={"weight_decay": 0.1})}
    )
    found, _ = host.run(thaw, 2, spec, list(WATCHED))
    for step, told in enumerate(found, start=1):
        for name, first in WATCHED.items():
            assert (told["moved"][name] > 0) is (step >= first), (step, name)
    assert found[0]["norm"] < found[-1]["norm"]


def test_thawing_goes_on_where_it_was(host: RankHost, tmp_path: Path) -> None:
    spec = spec_of(None, 3, freezing={"thaw_every_steps": 1, "blocks": 1})
    before = host.run(save_and_restore, 2, str(tmp_path), spec, "fp32", "first")[0]
    spec = spec_of(None, 1, freezing={"thaw_every_steps": 1, "blocks": 1})
    after = host.run(save_and_restore, 1, str(tmp_path), spec, "fp32", "second")[0]
    assert after[0] == pytest.approx(before[0], abs=1e-5)
    assert not any(name.startswith("model.layers.0.") for name in before[1])
    assert "model.layers.1.mlp.up_proj.weight" in before[1]


def first_moves(ranks: Ranks, spec: Spec, watched: list[str]) -> dict[str, float]:
    return thaw(ranks, spec, watched)[0]["moved"]


def test_each_block_learns_at_a_share_of_the_rate_of_the_one_above(host: RankHost) -> None:
    """Adam's first update of an element is the rate itself where its gradient is not small."""
    spec = spec_of(None, 1)
    optimizer = spec.optimizer.model_copy(update={"block_rate": 0.5, "epsilon": 1e-12})
    spec = spec.model_copy(update={"optimizer": optimizer})
    (moved, _) = host.run(first_moves, 2, spec, list(WATCHED))
    assert [round(moved[name] / RATE, 3) for name in WATCHED] == [0.125, 0.25, 0.5, 1.0]
