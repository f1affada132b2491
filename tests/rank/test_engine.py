"""The engine around DeepSpeed: where a model is built and what that costs, compiled for real, one
update at stage 0.

Real DeepSpeed over gloo in forked ranks.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from dray.plan import Plan, make_plan, parse_shape
from dray.rank.group import Ranks
from dray.spec import Spec, make_spec
from rank_host import RankHost
from tiny import tiny_tree

VOCAB = 512
ARCHITECTURES = ("llama", "gpt2", "gptj", "bert", "gemma2", "opt", "mamba")


def make_case(
    stage: int, precision: str, *, compiled: bool = False, **model: Any
) -> tuple[Spec, Plan]:
    sizes = {"architecture": "llama", "hidden_size": 64, "num_layers": 2, "num_heads": 4}
    spec = make_spec(
        tiny_tree(
            Path("none"), zero={"stage": stage}, resources={"workers": 1}, model=sizes | model
        )
    )
    plan = make_plan(spec, parse_shape("1xCPU(cpus=8,memory=64GB,bf16=1)"), with_ray=False)
    config = plan.deepspeed | {"bf16": {"enabled": precision == "bf16"}}
    return spec, plan.model_copy(
        update={"precision": precision, "compile": compiled, "deepspeed": config}
    )


def build(spec: Spec, plan: Plan, ranks: Ranks) -> Any:
    from dray.models.build import build_model
    from dray.models.groups import parameter_groups
    from dray.rank.engine import build_engine
    from dray.tasks.causal_lm import CausalLM

    return build_engine(
        lambda constructing, gathering: build_model(
            spec,
            vocab_size=VOCAB,
            pad_token_id=1,
            eos_token_id=0,
            constructing=constructing,
            gathering=gathering,
        ),
        lambda model: parameter_groups(model, 0.1),
        spec.optimizer,
        plan,
        ranks,
        make_objective=CausalLM().objective,
    )


def train(engine: Any, num_steps: int, grad_norms: list[float] | None = None) -> list[float]:
    engine.train(True)
    losses, generator = [], torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        ids = torch.randint(2, VOCAB, (4, 32), generator=generator)
        terms, _ = engine({"input_ids": ids, "labels": ids.roll(-1, 1)})
        engine.backward(terms["loss"][0] / ids.numel(), last=True)
        norm = engine.step(1e-2).grad_norm
        if grad_norms is not None:
            grad_norms.append(float(norm))
        losses.append(float(terms["loss"][0].detach()) / ids.numel())
    return losses


def compare_built(ranks: Ranks, architecture: str) -> list[str]:
    """Names of what differs between a model built in bf16 and one that is built in fp32 and then
    cast."""
    from dray.models.build import build_model
    from dray.rank.engine import _parameters_at

    spec, _ = make_case(1, "bf16", architecture=architecture)
    arguments = {"vocab_size": VOCAB, "pad_token_id": 1, "eos_token_id": 0}
    whole = build_model(spec, **arguments)
    half = build_model(spec, **arguments, constructing=_parameters_at(ranks.device, torch.bfloat16))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    cast = {name: parameter.bfloat16() for name, parameter in whole.named_parameters()} | dict(
        whole.named_buffers()
    )
    built = dict(half.named_parameters()) | dict(half.named_buffers())
    assert built.keys() == cast.keys()
    return [
        name
        for name, tensor in built.items()
        if tensor.dtype != cast[name].dtype or not torch.equal(tensor, cast[name])
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_built_in_half_precision_is_one_that_was_cast(
    host: RankHost, architecture: str
) -> None:
    assert host.run(compare_built, 1, architecture) == [[]]


def measure_building(ranks: Ranks) -> tuple[int, int, int]:
    """(bytes that building takes at its peak, of the parameters in bf16, of the largest tensor in
    fp32)"""
    from dray.models.build import build_model
    from dray.rank.engine import _parameters_at

    for width, vocab in ((64, 512), (1024, 4096)):  # the first takes what is imported on the way
        spec, _ = make_case(
            1, "bf16", hidden_size=width, num_layers=6, num_heads=16, vocab_size=vocab
        )
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _peak_bytes()
        model = build_model(
            spec,
            vocab_size=VOCAB,
            pad_token_id=1,
            eos_token_id=0,
            constructing=_parameters_at(ranks.device, torch.bfloat16),
        )
    sizes = [parameter.numel() for parameter in model.parameters()]
    return _peak_bytes() - before, 2 * sum(sizes), 4 * max(sizes)


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def test_building_takes_the_compute_types_size_and_a_few_tensors(host: RankHost) -> None:
    ((peak, parameters, largest),) = host.run(measure_building, 1)
    assert parameters > 150_000_000
    assert peak < parameters + 3 * largest + 10_000_000  # in fp32 it would be twice the parameters


def run_compiled(ranks: Ranks) -> tuple[list[float], list[float], dict[str, int]]:
    """Losses eager and compiled; what Dynamo counted."""
    import dray.rank.engine
    import dray.tasks.parts.losses

    dray.tasks.parts.losses.loss_chunk_bytes = lambda on_gpu: 4 * VOCAB * 50  # three chunks
    # Dynamo captures and guards as ever; only the minute that Inductor takes for its code is left
    # out.
    dray.rank.engine.compile_model = functools.partial(
        dray.rank.engine.compile_model, backend="aot_eager"
    )
    eager = train(build(*make_case(1, "fp32"), ranks), 3)
    compiled = train(build(*make_case(1, "fp32", compiled=True), ranks), 3)
    from torch._dynamo.utils import counters

    return eager, compiled, dict(counters["stats"])


def test_a_compiled_engine_is_compiled(host: RankHost) -> None:
    ((eager, compiled, counted),) = host.run(run_compiled, 1)
    assert compiled == pytest.approx(eager, rel=1e-5)
    assert counted["unique_graphs"] >= 1
    assert counted["calls_captured"] > 50  # the model's operations


def call_muon(ranks: Ranks) -> list[str]:
    """What torch is asked to compile when one of Muon's functions is called, and when it is called
    again."""
    import deepspeed

    asked: list[str] = []

    def compiled(function: Any, **options: Any) -> Any:
        asked.append(function.__name__)
        return function

    torch.compile = compiled
    for _ in range(2):
        deepspeed.runtime.zero.muon.original_muon.zeropower_via_newtonschulz5(torch.eye(4), 1)
    return asked


def test_muons_functions_are_compiled_at_their_first_call(host: RankHost) -> None:
    assert host.run(call_muon, 1) == [["zeropower_via_newtonschulz5"]]


def train_at_stage_0(ranks: Ranks, own_step: bool) -> tuple[list[float], list[float]]:
    engine = build(*make_case(0, "bf16"), ranks)
    if own_step:
        del engine._wrapper.step  # DeepSpeed's
    norms: list[float] = []
    return train(engine, 6, norms), norms


def test_the_update_in_a_few_kernels_is_deepspeeds(host: RankHost) -> None:
    ((mine, my_norms),) = host.run(train_at_stage_0, 1, False)
    ((theirs, their_norms),) = host.run(train_at_stage_0, 1, True)
    assert mine == pytest.approx(theirs, rel=2e-3)
    assert my_norms == pytest.approx(their_norms, rel=2e-2)
    assert my_norms[0] == pytest.approx(their_norms[0], rel=1e-5)


def train_both_ways(ranks: Ranks, stage: int, precision: str) -> list[list[float]]:
    """Losses and norms by DeepSpeed's own measuring and by ours, and by ours with a gradient that
    is not finite at the second step."""
    from dray.rank.layouts import measure_and_clip_queued

    found = []
    for ours, broken in ((False, False), (True, False), (True, True)):
        engine = build(*make_case(stage, precision), ranks)
        if ours:
            measure_and_clip_queued(engine._wrapper)
        norms: list[float] = []
        losses = train(engine, 2, norms)
        if broken:
            ids = torch.ones((4, 32), dtype=torch.int64)
            terms, _ = engine({"input_ids": ids, "labels": ids})
            engine.backward(terms["loss"][0] * float("inf"), last=True)
            assert not engine.step(1e-2).applied
        found.append([*losses, *train(engine, 2, norms), *norms])
    return found


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (1, "bf16"), (2, "bf16")])
def test_what_a_gpu_measures_and_clips_by_is_what_deepspeed_does(
    host: RankHost, stage: int, precision: str
) -> None:
    """The functions a GPU's ranks take in DeepSpeed's place, on CPUs, where both can run."""
    for theirs, ours, broken in host.run(train_both_ways, 2, stage, precision):
        assert ours == pytest.approx(theirs, rel=1e-5 if precision == "fp32" else 1e-3)
        assert broken == ours  # a step that was withheld has changed nothing
