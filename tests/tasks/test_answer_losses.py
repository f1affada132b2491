"""Losses of answers beside trl's, by its own trainers' code with a bare object in their place, and
by hand."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dray.tasks.parts.answer_objectives import (
    GoodOrBadLoss,
    PairLoss,
    PairRule,
    answer_log_probs,
    good_or_bad_losses,
    pair_losses,
)
from dray.tasks.rows import IGNORED


def small_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    ).eval()


def some_batch(rows: int = 5, width: int = 12) -> dict[str, torch.Tensor]:
    """Answers of different lengths behind prompts of different lengths."""
    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (rows, 2, width), generator=drawn)
    before = torch.randint(1, 4, (rows,), generator=drawn)
    sizes = torch.randint(6, width + 1, (rows, 2), generator=drawn)
    ids[:, 1, :3] = ids[:, 0, :3]
    places = torch.arange(width)
    mask = places < sizes[:, :, None]
    ids = ids.masked_fill(~mask, 0)
    labels = torch.full_like(ids, IGNORED)
    labels[:, :, :-1] = ids[:, :, 1:]
    inside = (places + 1 >= before[:, None, None]) & (places + 1 < sizes[:, :, None])
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "labels": labels.masked_fill(~inside, IGNORED),
        "real": torch.ones(rows, dtype=torch.bool),
        "reference": -20 - 5 * torch.rand(rows, 2, generator=drawn),
        "good": torch.arange(rows) % 2 == 0,
        "before": before,
    }


def test_the_log_probabilities_are_those_of_each_answer_by_itself() -> None:
    model, batch = small_model(), some_batch()
    with torch.no_grad():
        found, num_tokens = answer_log_probs(model, batch)
        for row in range(5):
            for which in range(2):
                size = int(batch["attention_mask"][row, which].sum())
                ids = batch["input_ids"][row, which, :size]
                logs = torch.log_softmax(model(input_ids=ids[None]).logits[0], dim=-1)
                start = int(batch["before"][row])
                wanted = sum(logs[at - 1, ids[at]] for at in range(start, size))
                assert found[row, which] == pytest.approx(float(wanted), abs=1e-4)
                assert num_tokens[row, which] == size - start


def numbers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(2)
    log_probs = -30 * torch.rand(6, 2, generator=drawn)
    reference = -30 * torch.rand(6, 2, generator=drawn)
    return log_probs, reference, torch.randint(1, 20, (6, 2), generator=drawn)


def test_odds_keep_their_digits_and_gradients_where_an_answer_is_sure_or_hopeless() -> None:
    log_probs = torch.tensor([[-1e-7, -80.0], [0.0, -0.5]], requires_grad=True)
    losses, _ = pair_losses(
        PairRule("orpo", 0.1), log_probs, torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.int64)
    )
    losses.sum().backward()
    assert losses.isfinite().all()
    assert log_probs.grad is not None
    assert log_probs.grad.isfinite().all()


def test_a_gap_of_nothing_costs_what_a_coin_does() -> None:
    log_probs, _, num_tokens = numbers()
    losses, rewards = pair_losses(PairRule("dpo", 0.3), log_probs, log_probs, num_tokens)
    torch.testing.assert_close(losses, torch.full((6,), math.log(2)))
    assert not rewards.any()


def with_trl(*names: str) -> list[Any]:
    """Classes of trl; its imports warn of what it will drop."""
    from importlib import import_module

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        places = [name.rpartition(".") for name in names]
        return [getattr(import_module(module), name) for module, _, name in places]


class Alone:
    """Of accelerate what the trainers ask of it: one process."""

    device = torch.device("cpu")

    def gather(self, value: Any) -> Any:
        return value

    gather_for_metrics = gather


def trainer(model: Any, **settings: Any) -> SimpleNamespace:
    return SimpleNamespace(
        model=model,
        accelerator=Alone(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_weights=[1.0],
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


@pytest.mark.slow  # trl takes up to half a minute to import
def test_losses_of_pairs_are_trls() -> None:
    compute, add_head, orpo, cpo = with_trl(
        "trl.trainer.dpo_trainer.DPOTrainer",
        "trl.trainer.utils.add_fused_lm_head",
        "trl.experimental.orpo.orpo_trainer.ORPOTrainer",
        "trl.experimental.cpo.cpo_trainer.CPOTrainer",
    )
    model, batch = small_model(), some_batch()
    count = len(batch["input_ids"])
    answers = torch.zeros_like(batch["input_ids"])
    answers[:, :, 1:] = (batch["labels"] != IGNORED)[:, :, :-1]
    inputs = {
        "input_ids": batch["input_ids"].transpose(0, 1).flatten(0, 1),
        "attention_mask": batch["attention_mask"].transpose(0, 1).flatten(0, 1),
        "completion_mask": answers.transpose(0, 1).flatten(0, 1),
        "ref_chosen_logps": batch["reference"][:, 0],
        "ref_rejected_logps": batch["reference"][:, 1],
    }
    ours = {
        name: PairLoss(model, PairRule(name, 0.2))(batch)[0]["loss"][0].detach() / count
        for name in ("dpo", "ipo", "orpo")
    }
    with torch.no_grad():
        log_probs, num_tokens = answer_log_probs(model, batch)
    means = log_probs / num_tokens
    add_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    for name, theirs in {"dpo": "sigmoid", "ipo": "ipo"}.items():
        me = trainer(model, loss_types=[theirs], beta=0.2, label_smoothing=0.0)
        wanted = compute._compute_loss(me, model, inputs, False)
        assert float(ours[name]) == pytest.approx(float(wanted.detach()), abs=1e-5), name
    me = SimpleNamespace(accelerator=Alone(), beta=0.2, label_smoothing=0.1, alpha=0.0)
    odds, *_ = orpo.odds_ratio_loss(me, means[:, 0], means[:, 1])
    assert float(ours["orpo"]) == pytest.approx(float((-means[:, 0] - odds).mean()), abs=1e-5)
    me.loss_type, me.simpo_gamma = "simpo", 0.7
    wanted, _, _ = cpo.cpo_loss(me, means[:, 0], means[:, 1])
    rule = PairRule("simpo", 0.2, margin=0.7, flipped=0.1)
    found, _ = pair_losses(rule, log_probs, batch["reference"], num_tokens)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_loss_of_good_and_bad_answers_is_trls() -> None:
    compute, add_head = with_trl(
        "trl.trainer.kto_trainer.KTOTrainer", "trl.trainer.utils.add_fused_lm_head"
    )
    model, batch = small_model(), some_batch()
    with torch.no_grad():
        log_probs, _ = answer_log_probs(model, batch)
    drifts = log_probs - batch["reference"]
    if drifts[:, 1].mean() < 0:  # a baseline below 0 counts as 0, and would prove nothing
        batch["reference"] = batch["reference"] + drifts[:, 1].mean() - 1.0
    drifts = log_probs - batch["reference"]
    learning = batch | {"baseline": drifts[:, 1].mean()}
    found = GoodOrBadLoss(model, 0.2, (1.5, 0.5))(learning)[0]["loss"][0].detach() / len(drifts)
    by_hand = good_or_bad_losses(drifts[:, 0], batch["good"], drifts[:, 1].mean(), 0.2, (1.5, 0.5))
    assert float(found) == pytest.approx(float(by_hand.mean()), abs=1e-6)
    answers = torch.zeros_like(batch["input_ids"])
    answers[:, :, 1:] = (batch["labels"] != IGNORED)[:, :, :-1]
    inputs = {"label": batch["good"], "ref_logps": batch["reference"][:, 0]}
    inputs["ref_KL_logps"] = batch["reference"][:, 1]
    for prefix, which in (("", 0), ("KL_", 1)):
        inputs[f"{prefix}input_ids"] = batch["input_ids"][:, which]
        inputs[f"{prefix}attention_mask"] = batch["attention_mask"][:, which]
        inputs[f"{prefix}completion_mask"] = answers[:, which]
    add_head(model, outputs=("log_probs", "entropy", "mean_logits"))
    me = trainer(
        model,
        calculate_KL=True,
        loss_type="kto",
        beta=0.2,
        desirable_weight=1.5,
        undesirable_weight=0.5,
    )
    me._compute_kl_logps = lambda model, batch: compute._compute_kl_logps(me, model, batch)
    wanted = compute._compute_loss(me, model, inputs, False)
    assert float(found) == pytest.approx(float(wanted.detach()), abs=1e-5)
