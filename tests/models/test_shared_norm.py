"""Batch normalisation over ranks: the same numbers as one rank with all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dray.models.build import build_model
from dray.models.shared_norm import SharedBatchNorm, share_batch_norms
from dray.spec import make_spec
from rank_host import RankHost

ROWS = 12


def make_layers() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten())
    return layers.append(nn.Linear(5 * 16, 6)).append(nn.BatchNorm1d(6, momentum=None))


def run_steps(layers: nn.Sequential, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two passes, the gradients of the last one, and what is remembered."""
    for scale in (1.0, 3.0):
        layers.zero_grad()
        out = layers(images * scale)
        out.cos().sum().backward()
    found = {f"grad.{name}": value.grad for name, value in layers.named_parameters()}
    return {**found, **dict(layers.named_buffers()), "out": out.detach()}


def images() -> torch.Tensor:
    return torch.randn(ROWS, 2, 6, 6, generator=torch.Generator().manual_seed(1)) + 2


def run_rank(ranks: Any) -> dict[str, Any]:
    layers = make_layers()
    assert share_batch_norms(layers) == 2
    share = ROWS // ranks.num_ranks
    found = run_steps(layers, images()[ranks.rank * share : (ranks.rank + 1) * share])
    return {name: value.tolist() for name, value in found.items()}


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_normalise_as_one(host: RankHost, num_ranks: int) -> None:
    expected = run_steps(make_layers(), images())
    parts = host.run(run_rank, num_ranks)
    for name, value in expected.items():
        own = [torch.tensor(part[name]) for part in parts]
        if name == "out":
            found = torch.cat(own)
        elif name.startswith("grad."):
            found = torch.stack(own).sum(dim=0)
        else:
            assert all(torch.equal(one, own[0]) for one in own)
            found = own[0]
        assert torch.allclose(found, value, rtol=1e-4, atol=1e-5), name


def test_alone_it_is_torchs_own_by_name_and_number() -> None:
    layers, shared = make_layers(), make_layers()
    share_batch_norms(shared)
    assert isinstance(shared[1], SharedBatchNorm)
    assert isinstance(shared[1], nn.BatchNorm2d)
    assert share_batch_norms(shared) == 2  # again, which changes nothing
    assert shared.state_dict().keys() == layers.state_dict().keys()
    expected, found = run_steps(layers, images()), run_steps(shared, images())
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-5), name
    assert torch.equal(layers.eval()(images()), layers(images()))
    assert torch.allclose(shared.eval()(images()), layers(images()), atol=1e-5)
    half = make_layers().bfloat16()
    share_batch_norms(half)
    assert half(images().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ["resnet", "mobilenet_v1", "regnet"])
def test_their_weights_are_drawn_as_the_architecture_says(architecture: str) -> None:
    spec = make_spec(
        {
            "name": "x",
            "task": {"name": "image_classification", "size": 32},
            "data": {"train": {"path": "none", "format": "files"}},
            "model": {"architecture": architecture},
            "duration": {"steps": 1},
        }
    )
    model = build_model(spec, vocab_size=0)
    norms = [module for module in model.modules() if isinstance(module, SharedBatchNorm)]
    assert len(norms) > 20
    for norm in norms:
        assert not norm.bias.any()
        assert norm.weight.unique().tolist() in ([0.0], [1.0])
        assert norm.running_mean is not None
        assert not norm.running_mean.any()
