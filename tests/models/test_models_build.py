"""Initial weights, parameter groups, counts, activation checkpointing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dray.models.build import enable_activation_checkpointing, num_parameters
from dray.models.groups import parameter_groups
from dray.models.initialize import initialize_weights, restore_rotary_buffers
from small_models import VOCAB, digest, small_model, small_spec, some_ids


def first_loss(model: nn.Module, vocabulary: int = VOCAB) -> float:
    ids = torch.randint(2, vocabulary, (2, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    return float(
        nn.functional.cross_entropy(logits[:, :-1].reshape(-1, vocabulary), ids[:, 1:].reshape(-1))
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("architecture", "width", "layers"),
    [
        ("llama", 384, 6),
        ("llama", 768, 1),
        ("gpt2", 384, 6),
        ("gpt2", 768, 1),
        ("qwen3", 256, 2),
        ("gpt_neox", 256, 2),
    ],
)
def test_first_loss_is_that_of_guessing(
    architecture: str, width: int, layers: int, tied: bool
) -> None:
    spec = small_spec(
        architecture, hidden_size=width, num_layers=layers, max_positions=256, tie_embeddings=tied
    )
    loss = first_loss(small_model(spec, vocab_size=8192), 8192)
    assert loss == pytest.approx(math.log(8192), rel=0.03)


def test_weights_depend_on_model_and_seed_alone() -> None:
    spec = small_spec("llama")
    torch.manual_seed(1)
    first = digest(small_model(spec).named_parameters())
    state = torch.get_rng_state()
    second = digest(small_model(spec).named_parameters())
    assert first == second
    assert torch.equal(
        torch.get_rng_state(), state
    )  # nothing was drawn from the run's own generator
    other = digest(small_model(small_spec("llama", sections={"seed": 8})).named_parameters())
    assert other != first
    deeper = dict(small_model(small_spec("llama", num_layers=3)).named_parameters())
    assert all(torch.equal(p, deeper[name]) for name, p in small_model(spec).named_parameters())


def test_weights_have_the_architectures_own_spread() -> None:
    model = small_model(small_spec("gpt2", hidden_size=256))
    spread = {name: float(p.detach().std()) for name, p in model.named_parameters() if p.dim() > 1}
    assert spread["transformer.wte.weight"] == pytest.approx(0.02, rel=0.02)
    assert spread["transformer.h.0.mlp.c_proj.weight"] == pytest.approx(
        0.02 / math.sqrt(4), rel=0.02
    )
    assert all(float(p.detach().std()) == 0 for name, p in model.named_parameters() if p.dim() == 1)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_precision_does_not_change_the_draw() -> None:
    spec = small_spec("llama")
    rounded = {name: p.bfloat16() for name, p in small_model(spec).named_parameters()}
    assert digest(small_model(spec, dtype=torch.bfloat16).named_parameters()) == digest(rounded)


def test_rotary_frequencies_survive_half_precision() -> None:
    model = small_model(small_spec("llama"))
    exact = model.model.rotary_emb.inv_freq.clone()
    model.bfloat16()
    assert not torch.equal(model.model.rotary_emb.inv_freq.float(), exact)
    restore_rotary_buffers(model)
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)


def test_construction_without_weights_still_ties_them() -> None:
    model = small_model(small_spec("llama"), initial_weights=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    initialize_weights(model, seed=7)
    assert digest(model.named_parameters()) == digest(
        small_model(small_spec("llama")).named_parameters()
    )


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("llama", "causal_lm"),
        ("gpt2", "causal_lm"),
        ("bert", "sequence_classification"),
        ("modernbert", "sequence_classification"),
        ("distilbert", "sequence_classification"),
    ],
)
def test_weight_decay_spares_norms_biases_and_embeddings(architecture: str, task: str) -> None:
    model = small_model(small_spec(architecture, task))
    decayed, spared = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    in_groups = [id(p) for group in (decayed, spared) for p in group["params"]]
    assert sorted(in_groups) == sorted(names)
    assert all(
        p.dim() == 2 and "emb" not in names[id(p)] and "wte" not in names[id(p)]
        for p in decayed["params"]
    )
    assert all(
        p.dim() < 2 or "emb" in names[id(p)] or "wte" in names[id(p)] or "wpe" in names[id(p)]
        for p in spared["params"]
    )


def test_an_untied_head_is_decayed_and_frozen_parameters_left_out() -> None:
    model = small_model(small_spec("llama", tie_embeddings=False))
    assert any(p is model.lm_head.weight for p in parameter_groups(model, 0.1)[0]["params"])
    model.lm_head.weight.requires_grad_(False)
    assert not any(
        p is model.lm_head.weight for group in parameter_groups(model, 0.1) for p in group["params"]
    )


def test_num_parameters_counts_tied_ones_once() -> None:
    tied, untied = (
        small_model(small_spec("llama")),
        small_model(small_spec("llama", tie_embeddings=False)),
    )
    assert num_parameters(untied) - num_parameters(tied) == VOCAB * 64


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_activation_checkpointing_keeps_the_gradients(architecture: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = small_model(small_spec(architecture)).train()
        if checkpointed:
            enable_activation_checkpointing(model)
            assert model.is_gradient_checkpointing
        model(input_ids=some_ids()).logits.square().mean().backward()
        gradients.append(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
