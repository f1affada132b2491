"""Width transfer: what is scaled, and that a step changes a wide model as much as a narrow one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dray.errors import SpecError
from dray.models.build import build_model
from dray.models.groups import parameter_groups
from dray.models.width import width_factor, with_rates
from dray.spec import make_spec
from tiny import tiny_tree

BASE, VOCAB = 64, 512
DECODERS = ("llama", "gpt2", "qwen2")
ENCODERS = ("bert", "modernbert")


def make(architecture: str, width: int, *, transfer: bool = True, **sections: Any) -> Any:
    model = {
        "architecture": architecture,
        "hidden_size": width,
        "num_layers": 2,
        "num_heads": width // 32,
        "intermediate_size": 2 * width,
        "tie_embeddings": False,
    }
    optimizer: dict[str, Any] = {"learning_rate": 1e-2, "weight_decay": 0.1}
    if transfer:
        optimizer["width_transfer"] = {"base_hidden_size": BASE}
    task = {"task": "masked_lm"} if architecture in ENCODERS else {}
    tree = tiny_tree(Path("corpus"), model=model, optimizer=optimizer, **task, **sections)
    return make_spec({**tree, "zero": {"stage": 0}})


def changes(spec: Any, steps: int = 4) -> float:
    """By how much the logits of some rows have changed after a few steps of AdamW on them: their
    mean size."""
    torch.manual_seed(0)
    model = build_model(spec, vocab_size=VOCAB)
    groups = with_rates(model, parameter_groups(model, 0.0), width_factor(spec))
    rate = spec.optimizer.learning_rate
    for group in groups:
        group["lr"] = rate * group.pop("rate_scale", 1.0)
    stepping = torch.optim.AdamW(groups)
    rows = torch.randint(5, VOCAB, (8, 32), generator=torch.Generator().manual_seed(1))
    model.eval()
    with torch.no_grad():
        before = model(input_ids=rows).logits
    for _ in range(steps):
        logits = model(input_ids=rows).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()
        )
        stepping.zero_grad()
        loss.backward()
        stepping.step()
    with torch.no_grad():
        return float((model(input_ids=rows).logits - before).abs().mean())


@pytest.mark.parametrize("architecture", [*DECODERS, *ENCODERS])
def test_a_step_changes_a_wide_model_as_much_as_a_narrow_one(architecture: str) -> None:
    """The coordinate check: from a width of 64 to 512 the change stays about what it was, where
    without transfer it grows with the width."""
    narrow = changes(make(architecture, BASE))
    wide = changes(make(architecture, 8 * BASE))
    unscaled = changes(make(architecture, 8 * BASE, transfer=False))
    assert 0.5 < wide / narrow < 1.6
    assert unscaled / narrow > 1.5 * wide / narrow


def test_matrices_are_scaled_and_nothing_else() -> None:
    """Against the model without transfer, drawn with the same seed."""
    spec = make("llama", 4 * BASE)
    plain = dict(
        build_model(make("llama", 4 * BASE, transfer=False), vocab_size=VOCAB).named_parameters()
    )
    model = build_model(spec, vocab_size=VOCAB)
    for name, parameter in model.named_parameters():
        scale = 0.25 if "lm_head" in name else 0.5 if "proj" in name else 1.0
        torch.testing.assert_close(parameter, plain[name] * scale, rtol=1e-6, atol=0)
    groups = with_rates(model, parameter_groups(model, 0.1), width_factor(spec))
    scales = {
        id(parameter): (group.get("rate_scale"), group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    assert len(scales) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        wanted = (0.25, 0.4) if "proj" in name or "lm_head" in name else (1.0, 0.0)
        assert scales[id(parameter)] == pytest.approx(wanted), name


def test_at_the_base_nothing_changes() -> None:
    spec = make("llama", BASE)
    model = build_model(spec, vocab_size=VOCAB)
    plain = build_model(make("llama", BASE, transfer=False), vocab_size=VOCAB)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    groups = parameter_groups(model, 0.1)
    assert with_rates(model, groups, width_factor(spec)) is groups


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"tie_embeddings": True}}, "model.tie_embeddings=false"),
        ({"model": {"path": "folder"}}, "starts from folder"),
        ({"optimizer": {"name": "sgd"}}, "unknown key optimizer.width_transfer"),
        ({"optimizer": {"width_transfer": {"base": 64}}}, "did you mean"),
    ],
)
def test_where_it_cannot_be(sections: dict[str, Any], said: str) -> None:
    tree = tiny_tree(Path("corpus"), model={"tie_embeddings": False})
    tree["optimizer"] = {"learning_rate": 1e-3, "width_transfer": {"base_hidden_size": 64}}
    for name, values in sections.items():
        tree[name] = values if "path" in values else {**tree[name], **values}
    tree["zero"] = {"stage": 0}
    with pytest.raises(SpecError) as caught:
        make_spec(tree)
    assert said in str(caught.value)
