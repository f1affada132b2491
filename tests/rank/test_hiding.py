"""Rows' gradients are shortened one by one, and noise is of the size that is told."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dray.errors import SpecError
from dray.rank.chance import Chance
from dray.rank.hiding import PrivateNoise, PrivateRows
from dray.rank.hooks import Part, Whole
from dray.rank.passes import Micro
from dray.spec import Privacy
from small_models import some_ids

SETTINGS = Privacy(max_grad_norm=0.5, noise_multiplier=1.0)


def objective_of(seed: int = 0) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    from dray.tasks.parts.objectives import LabelLoss

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return LabelLoss(BertForSequenceClassification(config).train())


def batch_of(num_rows: int) -> dict[str, torch.Tensor]:
    ids = some_ids(num_rows, 12)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.arange(num_rows) % 3,
    }


def learn(objective: Any, batch: dict[str, torch.Tensor], settings: Privacy) -> Any:
    passes = PrivateRows(settings, Chance())
    passes.around(objective)

    def backward(loss: torch.Tensor, *, last: bool) -> None:
        assert last
        loss.backward()

    micro = Micro(lambda batch: None, lambda batch: None, backward)
    loss = passes.learn(micro, batch)
    return loss, [one.grad.clone() for one in objective.parameters() if one.grad is not None]


@pytest.mark.parametrize("most", [0.05, 0.5, 1e6])
def test_a_batch_has_the_sum_of_its_rows_shortened_gradients(most: float) -> None:
    batch = batch_of(5)
    reference, wanted, losses = objective_of(), None, 0.0
    for place in range(5):
        reference.zero_grad()
        row = {name: value[place : place + 1] for name, value in batch.items()}
        loss = reference(row)[0]["loss"][0]
        loss.backward()
        losses += float(loss.detach())
        own = [one.grad.clone() for one in reference.parameters() if one.grad is not None]
        norm = math.sqrt(sum(float(one.square().sum()) for one in own))
        own = [one * min(1.0, most / norm) for one in own]
        wanted = own if wanted is None else [a + b for a, b in zip(wanted, own, strict=True)]
    settings = SETTINGS.model_copy(update={"max_grad_norm": most})
    loss, found = learn(objective_of(), batch, settings)
    assert float(loss) == pytest.approx(losses, rel=1e-5)
    for one, other in zip(found, wanted or (), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_no_row_moves_the_sum_by_more_than_the_greatest_length() -> None:
    """Whatever a row holds: that is what the noise hides."""
    batch = batch_of(4)
    _, without = learn(objective_of(), {name: one[:3] for name, one in batch.items()}, SETTINGS)
    _, whole = learn(objective_of(), batch, SETTINGS)
    apart = [a - b for a, b in zip(whole, without, strict=True)]
    length = math.sqrt(sum(float(one.square().sum()) for one in apart))
    assert length <= SETTINGS.max_grad_norm * (1 + 1e-5)


def test_padding_rows_add_nothing() -> None:
    batch = batch_of(4)
    batch["labels"][3] = -100
    loss, found = learn(objective_of(), batch, SETTINGS)
    own, wanted = learn(objective_of(), {n: one[:3] for n, one in batch.items()}, SETTINGS)
    assert float(loss) == pytest.approx(float(own))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def noise_of(key: str, step: int, start: int, size: int, name: str = "w") -> torch.Tensor:
    hook = PrivateNoise(SETTINGS, {"key": key, "noise_multiplier": 2.0}, global_rows=8)
    gradient = torch.zeros(size)
    hook.before_update([Part(name, start, torch.zeros(size), gradient, Whole((size,), True))], step)
    return gradient


def test_noise_is_of_its_size_and_each_time_another() -> None:
    key = "ab" * 32
    drawn = noise_of(key, 1, 0, 200_000)
    assert float(drawn.std()) == pytest.approx(2.0 * 0.5 / 8, rel=0.01)
    assert float(drawn.mean()) == pytest.approx(0.0, abs=0.001)
    others = [noise_of(key, 2, 0, 200_000), noise_of("cd" * 32, 1, 0, 200_000)]
    others.append(noise_of(key, 1, 0, 200_000, name="v"))
    for other in others:
        both = torch.stack([drawn, other])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.01


def test_noise_of_a_part_is_that_of_the_whole_there() -> None:
    whole = noise_of("ab" * 32, 3, 0, 1000)
    torch.testing.assert_close(noise_of("ab" * 32, 3, 400, 100), whole[400:500])


def test_a_model_whose_rows_know_of_each_other_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    with pytest.raises(SpecError, match="normalises rows by each other"):
        PrivateRows(SETTINGS, Chance()).around(model)
