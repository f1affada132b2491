"""Draws that belong to rows: the same beside any other rows, in rows of any length, and fair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dray.rank.chance import Chance

CPU = torch.device("cpu")


def dropped(chance: Chance, rows: list[int], width: int, step: int = 1, p: float = 0.3) -> Tensor:
    """What is left of ones, [rows, width, 16]."""
    with chance.rows(5, step, np.asarray(rows), CPU):
        chance.enter(3)
        return F.dropout(torch.ones(len(rows), width, 16), p, training=True)


def test_a_row_keeps_its_mask_beside_any_others_and_at_any_width() -> None:
    chance = Chance()
    together = dropped(chance, [4, 9, 2], 40)
    for place, row in enumerate([4, 9, 2]):
        assert torch.equal(dropped(chance, [row], 40)[0], together[place])
        assert torch.equal(dropped(chance, [8, row], 25)[1], together[place, :25])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(dropped(chance, [4], 40, step=2)[0], together[0])


def test_attention_keeps_its_mask_at_any_width() -> None:
    chance = Chance()
    query, key, value = (torch.randn(2, 3, 10, 8, generator=torch.Generator().manual_seed(n))
                         for n in range(3))  # fmt: skip
    mask = torch.ones(2, 1, 10, 10, dtype=torch.bool)
    mask[:, :, :, 7:] = False

    def attend(width: int) -> Tensor:
        parts = [one[:, :, :width] for one in (query, key, value)]
        with chance.rows(0, 1, np.arange(2), CPU):
            return F.scaled_dot_product_attention(
                *parts, attn_mask=mask[..., :width, :width], dropout_p=0.4
            )

    torch.testing.assert_close(attend(10)[:, :, :7], attend(7))
    without = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(
        F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=0.0), without
    )


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_as_much_is_left_out_as_is_asked_for(p: float) -> None:
    left = dropped(Chance(), list(range(200)), 50, p=p)
    share = float((left == 0).float().mean())
    assert share == pytest.approx(p, abs=4 * (p * (1 - p) / left.numel()) ** 0.5)
    assert float(left.mean()) == pytest.approx(1, abs=0.02)
    # Neighbours along every axis fall independently of each other.
    zeros = (left == 0).float() - p
    for axis in range(3):
        pairs = zeros.narrow(axis, 1, zeros.shape[axis] - 1) * zeros.narrow(
            axis, 0, zeros.shape[axis] - 1
        )
        assert abs(float(pairs.mean())) < 5 * p * (1 - p) / pairs.numel() ** 0.5


def test_places_and_passes_have_draws_of_their_own_and_nothing_is_drawn_outside() -> None:
    chance = Chance()
    module = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    chance.watch(module)
    ones = torch.ones(4, 64)
    with chance.rows(0, 1, np.arange(4), CPU):
        first, second = module[0](ones), module[1](ones)
        again = module[0](ones)
        with chance.another_pass(1):
            other = module[0](ones)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    assert F.dropout.__module__ == "torch.nn.functional"
    torch.manual_seed(1)
    one = module[0](ones)
    assert not torch.equal(one, module[0](ones))


def test_numbers_are_uniform_and_normal() -> None:
    chance = Chance()
    with chance.rows(0, 1, np.arange(100), CPU):
        uniform, normal = chance.uniform((100, 1000), 1), chance.normal((100, 1000), 2)
    counts = torch.histc(uniform, 20, 0, 1) / uniform.numel()
    assert float((counts - 0.05).abs().max()) < 0.002
    assert float(normal.mean()) == pytest.approx(0, abs=0.01)
    assert float(normal.std()) == pytest.approx(1, abs=0.01)
    assert float((normal.abs() > 1.96).float().mean()) == pytest.approx(0.05, abs=0.003)
