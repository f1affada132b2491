"""The optimisers by themselves: each is torch's own or its paper's, a withheld update changes
nothing, and the engine holds what the spec declares and the plan counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dray.errors import SpecError
from dray.models.build import build_model
from dray.models.groups import parameter_groups, part_hidden
from dray.plan import make_plan, parse_shape
from dray.plan.parameters import count_parameters, load_dimensions
from dray.rank.group import Ranks
from dray.rank.optimizers import build_optimizer, orthogonalize
from dray.spec import OPTIMIZERS, Spec, make_spec
from rank_host import RankHost
from tiny import tiny_tree

RATE, DECAY, STEPS = 0.01, 0.1, 6
SHAPES = ((7, 5), (4, 6), (5,), (70, 64))


class Reference:
    """Lion, step by step as its paper has it."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.moments = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self) -> None:
        for weights, moment in zip(self.parameters, self.moments, strict=True):
            update = torch.sign(0.9 * moment + 0.1 * weights.grad)
            weights -= RATE * (update + DECAY * weights)
            moment.mul_(0.99).add_(weights.grad, alpha=0.01)


class Both:
    """torch's Muon for matrices, its AdamW for the rest."""

    def __init__(self, parameters: list[Any]) -> None:
        matrices = [p for p in parameters if p.dim() == 2]
        self.parts = (
            torch.optim.Muon(matrices, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([p for p in parameters if p.dim() < 2], RATE, (0.9, 0.95)),
        )
        self.parts[1].param_groups[0]["weight_decay"] = DECAY

    def step(self) -> None:
        for part in self.parts:
            part.step()


REFERENCES: dict[str, Callable[[list[Any]], Any]] = {
    "adamw": lambda p: torch.optim.AdamW(p, RATE, (0.9, 0.95), weight_decay=DECAY),
    "adamw_8bit": lambda p: torch.optim.AdamW(p, RATE, (0.9, 0.95), weight_decay=DECAY),
    "sgd": lambda p: torch.optim.SGD(p, RATE, momentum=0.9, weight_decay=DECAY),
    "lion": Reference,
    "adafactor": lambda p: torch.optim.Adafactor(p, RATE, weight_decay=DECAY),
    "muon": Both,
}


def make_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def build(name: str, parameters: list[nn.Parameter]) -> Any:
    groups = [
        {"params": [p for p in parameters if (p.dim() == 2) is hidden], "weight_decay": DECAY}
        | ({"hidden": hidden} if OPTIMIZERS[name].parts_hidden else {})
        for hidden in (True, False)
    ]
    chosen = OPTIMIZERS[name].model_validate({"learning_rate": 1})
    optimizer = build_optimizer(groups, chosen)
    for group in optimizer.param_groups:
        group["lr"] = RATE
        for p in group["params"]:  # as the engine does, by the declaration
            for state in chosen.states(tuple(p.shape), is_hidden=bool(group.get("hidden"))):
                kind = getattr(torch, state.dtype)
                optimizer.state[p][state.name] = torch.zeros(state.shape, dtype=kind)
            if optimizer.counts(is_hidden=bool(group.get("hidden"))):
                optimizer.state[p]["step"] = torch.zeros(())
    return optimizer


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_each_is_torchs_own_or_its_papers(name: str) -> None:
    ours, theirs = make_parameters(), make_parameters()
    optimizer, reference = build(name, ours), REFERENCES[name](theirs)
    withheld = torch.tensor(0.0)
    optimizer.withheld = lambda: withheld
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            its.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    for mine, its, initial in zip(ours, theirs, make_parameters(), strict=True):
        # torch's Muon computes in bf16, ours in fp32 on a CPU; a moment of a byte is a coarse one.
        is_coarse = "exp_avg_scale" in optimizer.state[mine]
        assert is_coarse is (name == "adamw_8bit" and mine.numel() > 4096)
        within = 1e-3 if name == "muon" else 5e-3 if is_coarse else 1e-6
        torch.testing.assert_close(mine, its, rtol=within, atol=within)
        assert (mine - initial).abs().max() > 10 * within


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_withheld_update_changes_nothing_even_with_gradients_that_are_not_finite(
    name: str,
) -> None:
    parameters = make_parameters()
    optimizer, withheld = build(name, parameters), torch.tensor(0.0)
    optimizer.withheld = lambda: withheld
    for bad in (0.0, 1.0, 1.0):
        withheld.fill_(bad)
        for parameter in parameters:
            parameter.grad = torch.full(parameter.shape, float("nan") if bad else 0.5)
        before = [p.detach().clone() for p in parameters]
        states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters]
        optimizer.step()
        if not bad:
            continue
        for parameter, was, state in zip(parameters, before, states, strict=True):
            assert torch.equal(parameter, was)
            assert state.keys() == optimizer.state[parameter].keys()
            for key, tensor in state.items():
                assert torch.equal(optimizer.state[parameter][key], tensor), key


@pytest.mark.parametrize("shape", [(7, 5), (5, 9), (6, 6)])
def test_newton_and_schulz_are_torchs_and_make_singular_values_alike(
    shape: tuple[int, int],
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    from torch.optim._muon import _zeropower_via_newtonschulz

    theirs = _zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert torch.equal(orthogonalize(matrix.bfloat16()), theirs)
    values = torch.linalg.svdvals(orthogonalize(matrix.clone()))
    assert ((values > 0.3) & (values < 1.3)).all()


def make_tiny(name: str, architecture: str, **sections: Any) -> Spec:
    return make_spec(
        tiny_tree(
            Path("none"),
            model={"architecture": architecture},
            optimizer={"name": name, "learning_rate": 1e-2},
            zero={"stage": 0},
            resources={"workers": 1},
            **sections,
        )
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "gpt_neox"])
def test_the_hidden_matrices_are_those_that_the_plan_counts(architecture: str) -> None:
    spec = make_tiny("muon", architecture)
    model = build_model(spec, vocab_size=512, pad_token_id=1, eos_token_id=0)
    groups = part_hidden(model, parameter_groups(model, DECAY))
    hidden = {id(p): p for group in groups if group["hidden"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in hidden}
    assert names
    assert not [name for name in names if "emb" in name or "head" in name or "norm" in name]
    assert {id(p) for group in groups for p in group["params"]} == {
        id(p) for p in model.parameters()
    }
    sizes = load_dimensions(spec, 512)
    kept = sum(4 if id(p) in hidden else 8 for p in model.parameters() for _ in range(p.numel()))
    from dray.plan.parameters import count_state_bytes

    assert count_state_bytes(spec.optimizer, sizes, count_parameters(sizes)) == kept


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(SpecError, match=r"Linear has no matrices in blocks.*optimizer\.name=adamw"):
        part_hidden(nn.Linear(3, 3), [])


def measure_states(ranks: Ranks, spec: Spec) -> tuple[int, int]:
    """(bytes that the engine keeps for the optimiser and hooks, bytes that the plan counts)"""
    from dray.rank.chance import Chance
    from dray.rank.engine import build_engine
    from dray.rank.hooks import build_hooks

    shape = parse_shape("1xCPU(cpus=8,memory=16GB,bf16=1)")
    plan = make_plan(spec, shape, with_ray=False, vocab_size=512)
    engine = build_engine(
        lambda constructing, gathering: build_model(
            spec, vocab_size=512, constructing=constructing, gathering=gathering
        ),
        lambda model: parameter_groups(model, DECAY),
        spec.optimizer,
        plan,
        ranks,
        hooks=build_hooks(spec, Chance()),
    )
    kept = engine._layout.kept
    held = [engine._optimizer.state[flat][state.name] for flat in kept for state in kept[flat]]
    return sum(t.numel() * t.element_size() for t in held), plan.memory.optimizer


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_the_plan_counts_what_the_engine_holds(host: RankHost, name: str) -> None:
    """In half precision, too, where DeepSpeed takes a step before the states are declared."""
    cases = [(*case, ema) for case in (("llama", 0.0), ("gpt2", 0.01)) for ema in ({}, {"ema": {}})]
    for architecture, within, regularization in cases:
        for precision in ("fp32", "bf16")[: 2 if architecture == "llama" else 1]:
            spec = make_tiny(name, architecture, regularization=regularization, precision=precision)
            ((held, counted),) = host.run(measure_states, 1, spec)
            weights = 4 * count_parameters(load_dimensions(spec, 512)).total
            masters = weights if precision == "bf16" else 0  # the weights in fp32
            assert abs(held + masters - counted) <= within * weights
