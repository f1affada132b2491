"""The loss in chunks is torch's own in value and gradients, for every kind of head, and holds no
more than a chunk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dray.tasks import IGNORED
from dray.tasks.causal_lm import CausalLM
from dray.tasks.parts import losses
from dray.tasks.parts.heads import find_head
from dray.tasks.parts.losses import LogitRule, linear_cross_entropy, summed_cross_entropy
from dray.tasks.parts.objectives import NextTokenLoss

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from small_models import VOCAB, small_model, small_spec, some_ids

ROWS, WIDTH, CLASSES = 23, 16, 37


@pytest.fixture
def _three_rows_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "loss_chunk_bytes", lambda on_gpu: 3 * 4 * CLASSES)


def some_labels() -> torch.Tensor:
    labels = torch.randint(0, CLASSES, (ROWS,), generator=torch.Generator().manual_seed(1))
    labels[::4] = IGNORED
    return labels


def plain(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    return F.cross_entropy(
        logits.float(), labels, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing
    )


def assert_same(mine: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(mine / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("_three_rows_a_chunk")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(scale=0.3), LogitRule(cap=5.0)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_a_projections_loss_is_that_of_its_whole_logits(
    smoothing: float, rule: LogitRule, biased: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((ROWS, WIDTH), (CLASSES, WIDTH), *([(CLASSES,)] if biased else []))
    ]
    hidden, weight, bias = (*inputs, None)[:3]
    labels = some_labels()
    mine = linear_cross_entropy(hidden, weight, bias, labels, label_smoothing=smoothing, rule=rule)
    logits = F.linear(hidden, weight, bias) * rule.scale
    logits = logits if rule.cap is None else rule.cap * torch.tanh(logits / rule.cap)
    theirs = plain(logits, labels, smoothing)
    assert mine.dtype == torch.float32
    assert_same(mine, theirs)
    for got, expected in zip(
        torch.autograd.grad(mine * 0.7, inputs),
        torch.autograd.grad(theirs * 0.7, inputs),
        strict=True,
    ):
        assert_same(got, expected)


@pytest.mark.usefixtures("_three_rows_a_chunk")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_logits_takes_them_in_chunks(smoothing: float) -> None:
    logits = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mine, theirs = (
        loss(logits, some_labels(), smoothing) for loss in (summed_cross_entropy, plain)
    )
    assert_same(mine, theirs)
    assert_same(*(torch.autograd.grad(loss, logits)[0] for loss in (mine, theirs)))
    with torch.no_grad():
        assert_same(summed_cross_entropy(logits, some_labels(), smoothing), theirs)
    assert float(summed_cross_entropy(logits, torch.full((ROWS,), IGNORED)).detach()) == 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_widened_vocabulary_changes_nothing(smoothing: float) -> None:
    """What a GPU's chunks do, on a CPU: columns without a class take no part, and get no
    gradient."""
    product = torch.randn(ROWS, CLASSES + 5, generator=torch.Generator().manual_seed(0))
    arguments = (some_labels(), smoothing, LogitRule(scale=0.3, cap=5.0), CLASSES, True)
    wide_loss, wide = losses._chunk_loss(product, *arguments)
    loss, exact = losses._chunk_loss(product[:, :CLASSES].contiguous(), *arguments)
    assert wide_loss == loss
    assert wide is not None
    assert exact is not None
    assert torch.equal(wide[:, :CLASSES], exact)
    assert not wide[:, CLASSES:].any()


@pytest.mark.usefixtures("_three_rows_a_chunk")
def test_half_precision_is_as_near_to_fp32_as_its_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    halves = [
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((ROWS, WIDTH), (CLASSES, WIDTH))
    ]
    found = []
    for inputs in (halves, [half.float() for half in halves]):
        for tensor in inputs:
            tensor.requires_grad_()
        loss = linear_cross_entropy(inputs[0], inputs[1], None, some_labels())
        assert loss.dtype == torch.float32
        found.append([loss, *torch.autograd.grad(loss, inputs)])
    assert [tensor.dtype for tensor in found[0][1:]] == [torch.bfloat16] * 2
    for mine, expected in zip(*found, strict=True):
        assert_same(mine.float(), expected, 0.01)


@pytest.mark.usefixtures("_three_rows_a_chunk")
def test_a_frozen_head_gets_no_gradient_and_a_second_backward_pass_is_refused() -> None:
    hidden, weight = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(CLASSES, WIDTH)
    loss = linear_cross_entropy(hidden, weight, None, some_labels())
    loss.backward(retain_graph=True)
    assert weight.grad is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_more_than_a_chunk_of_logits_is_held() -> None:
    """Counted over every tensor that is made: the largest is a chunk or a gradient, never rows ×
    vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    rows, classes = 512, 16_384
    hidden, weight = (
        torch.randn(rows, 4, requires_grad=True),
        torch.randn(classes, 4, requires_grad=True),
    )
    with Largest() as seen:
        linear_cross_entropy(hidden, weight, None, torch.zeros(rows, dtype=torch.int64)).backward()
        with torch.no_grad():
            losses.count_correct(hidden, weight, None, torch.zeros(rows, dtype=torch.int64))
    assert seen.numel * 4 <= losses.loss_chunk_bytes(False) < rows * classes * 4


FUSED = {  # architecture: (options, what it does to its logits)
    "llama": ({}, LogitRule()),
    "gpt2": ({}, LogitRule()),
    "gptj": ({"rotary_dim": 8}, LogitRule()),
    "phi": ({}, LogitRule()),
    "opt": ({}, LogitRule()),
    "starcoder2": ({}, LogitRule()),
    "qwen2": ({}, LogitRule()),
    "gemma2": ({"final_logit_softcapping": 2.0}, LogitRule(cap=2.0)),
    "cohere": ({}, LogitRule(scale=0.0625)),
    "granite": ({"logits_scaling": 8.0}, LogitRule(scale=0.125)),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", [*FUSED, "bert", "roberta"])
def test_every_architectures_objective_is_the_loss_of_its_own_logits(
    architecture: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, rule = FUSED.get(architecture, ({}, None))
    model = small_model(small_spec(architecture, options=options, tie_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.1 * torch.randn_like(parameter)
            )  # logits that differ, biases that are not zero
    objective = CausalLM().objective(model)
    assert isinstance(objective, NextTokenLoss)
    head = find_head(model)
    assert (head.rule if head else None) == rule
    assert {id(p) for p in objective.parameters()} == {id(p) for p in model.parameters()}
    ids = some_ids(2)
    labels = ids.roll(-1, 1)
    labels[:, -1] = IGNORED
    theirs = plain(model(input_ids=ids).logits.flatten(0, 1), labels.flatten(), 0.0)
    expected = torch.autograd.grad(theirs, list(model.parameters()), allow_unused=True)
    monkeypatch.setattr(losses, "loss_chunk_bytes", lambda on_gpu: 5 * 4 * VOCAB)
    terms, output = objective({"input_ids": ids, "labels": labels})
    mine, count = terms["loss"]
    assert (int(count), output) == (62, {})
    assert_same(mine, theirs)
    found = torch.autograd.grad(mine, list(model.parameters()), allow_unused=True)
    for got, wanted in zip(found, expected, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            assert_same(got, wanted)
    with torch.no_grad():
        terms, output = objective({"input_ids": ids, "labels": labels})
        assert_same(terms["loss"][0], theirs)
        assert int(output["num_correct"]) == int(
            (model(input_ids=ids).logits.argmax(-1) == labels).sum()
        )


def test_a_head_that_is_more_than_a_projection_is_left_to_the_model() -> None:
    model = small_model(small_spec("llama"))
    assert find_head(model) is not None
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(64, VOCAB))
    assert find_head(model) is None
    model = small_model(small_spec("llama"))
    forward = type(model).forward

    class Shifted(type(model)):  # type: ignore[misc]
        def forward(self, **inputs: Any) -> Any:
            out = forward(self, **inputs)
            out.logits = out.logits + 1.0 * torch.arange(VOCAB)
            return out

    model.__class__ = Shifted
    assert find_head(model) is None
