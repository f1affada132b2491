"""Answers that a model writes and learns from, the same ones for any number of ranks.

What is drawn comes in as numbers of each row: a token is where one of them lies in the model's
distribution. transformers' own decoding does the rest, with its cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dray.tasks.parts.answer_objectives import answer_log_probs
from dray.tasks.rewards import Reward
from dray.tasks.rows import IGNORED
from dray.tasks.task import Batch, Decode, Output, Terms

_LEAST_DEVIATION = 1e-4


class _Drawing:
    """Leaves of a model's scores the one token that a row's number picks."""

    def __init__(self, uniforms: Tensor, temperature: float, width: int) -> None:
        self._uniforms, self._temperature, self._width = uniforms, temperature, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = self._uniforms[:, input_ids.shape[1] - self._width, None]
        sums = torch.softmax(scores.double() / self._temperature, dim=-1).cumsum(dim=-1)
        token = (sums <= drawn * sums[:, -1:]).sum(dim=-1, keepdim=True)
        chosen = torch.full_like(scores, -torch.inf)
        return chosen.scatter(1, token.clamp(max=scores.shape[1] - 1), 0.0)


@torch.no_grad()
def write_answers(
    model: Any, prompts: Tensor, mask: Tensor, uniforms: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """One answer to each prompt: its tokens [rows, most] and their number [rows], the end token
    included where one was written; what follows it is anything.

    `prompts` and `mask`: int64 [rows, width], padded before their beginning. `uniforms`: numbers
    from 0 to 1, [rows, most], one for each token. Under ZeRO-3, whose ranks gather weights
    together, all of them go on until the last one is done.
    """
    from transformers import GenerationConfig

    most, width = uniforms.shape[1], prompts.shape[1]
    ends = end_tokens(model)
    found = model.generate(
        prompts,
        attention_mask=mask,
        generation_config=GenerationConfig(
            max_new_tokens=most,
            do_sample=False,
            repetition_penalty=1.0,
            pad_token_id=_pad(model, ends),
            eos_token_id=ends or None,
            use_cache=True,
        ),
        logits_processor=[_Drawing(uniforms, temperature, width)],
        synced_gpus=any(hasattr(parameter, "ds_id") for parameter in model.parameters()),
    )[:, width : width + most]
    answers = torch.full_like(uniforms, _pad(model, ends), dtype=torch.int64)
    answers[:, : found.shape[1]] = found
    is_end = torch.isin(answers, answers.new_tensor(ends)) if ends else torch.zeros_like(answers)
    before = is_end.long().cumsum(dim=1) - is_end.long()
    return answers, (before == 0).sum(dim=1)


def end_tokens(model: Any) -> list[int]:
    """What ends a text of the model's."""
    found = model.config.eos_token_id
    return list(found) if isinstance(found, list | tuple) else [] if found is None else [int(found)]


def _pad(model: Any, ends: list[int]) -> int:
    found = model.config.pad_token_id
    return int(found) if found is not None else ends[0] if ends else 0


def joined_answers(
    prompts: Tensor, mask: Tensor, answers: Tensor, sizes: Tensor
) -> dict[str, Tensor]:
    """Prompts with their answers as `input_ids`, `attention_mask` and `labels` [rows, width],
    padded behind their ends: labels[:, t] is the token at t + 1 where that is one of the answer,
    else IGNORED."""
    whole = torch.cat([prompts, answers], dim=1)
    width, prompt_width = whole.shape[1], prompts.shape[1]
    places = torch.arange(width, device=whole.device) + (mask == 0).sum(dim=1, keepdim=True)
    stops = (prompt_width + sizes)[:, None]
    inside = places < stops
    ids = whole.gather(1, places.clamp(max=width - 1)) * inside
    following = torch.zeros_like(ids)
    following[:, :-1] = ids[:, 1:]
    is_target = (places + 1 >= prompt_width) & (places + 1 < stops)
    labels = following.masked_fill(~is_target, IGNORED)
    return {"input_ids": ids, "attention_mask": inside.long(), "labels": labels}


def advantages(rewards: Tensor, *, scaled: bool) -> Tensor:
    """By how much each answer's reward is above the mean of its prompt's, [rows, answers] each; in
    standard deviations if `scaled` (Shao et al. 2024, section 4.1.2)."""
    above = rewards - rewards.mean(dim=1, keepdim=True)
    return above / (rewards.std(dim=1, keepdim=True) + _LEAST_DEVIATION) if scaled else above


class WrittenAnswersLoss(nn.Module):
    """A language model that writes answers where no gradient is wanted, and learns from them where
    one is.

    The value of its loss is minus the summed rewards, and its gradient that of the advantages times
    the log-probabilities of answers: by the mean over their tokens, or by their sum over `divisor`.
    """

    def __init__(
        self,
        model: Any,
        rewards: Sequence[tuple[float, Reward]],
        decode: Decode | None,
        *,
        temperature: float,
        divisor: int | None,
    ) -> None:
        super().__init__()
        self.model, self.rewards, self.decode = model, rewards, decode
        self.temperature, self.divisor = temperature, divisor

    def forward(self, batch: Batch) -> tuple[Terms, Output]:
        return self._learn(batch) if torch.is_grad_enabled() else self._write(batch)

    def _learn(self, batch: Batch) -> tuple[Terms, Output]:
        log_probs, num_tokens = answer_log_probs(self.model, batch, self.temperature)
        real = batch["real"][:, None]
        each = log_probs / (self.divisor or num_tokens.clamp(min=1))
        gained = torch.where(real, batch["advantages"] * each, 0.0).sum()
        loss = gained.detach() - gained - torch.where(real, batch["rewards"], 0.0).sum()
        return {"loss": (loss, real.sum() * log_probs.shape[1])}, {}

    def _write(self, batch: Batch) -> tuple[Terms, Output]:
        uniforms, real = batch["uniforms"], batch["real"]
        shape = uniforms.shape[:2]
        prompts, mask = (
            batch[name].repeat_interleave(shape[1], dim=0) for name in ("prompts", "mask")
        )
        answers, sizes = write_answers(
            self.model, prompts, mask, uniforms.flatten(0, 1), self.temperature
        )
        worth = torch.tensor(self._worth(batch, answers, sizes), device=answers.device)
        output = joined_answers(prompts, mask, answers, sizes)
        output = {name: values.view(*shape, -1) for name, values in output.items()}
        output |= {"rewards": worth.view(shape), "lengths": sizes.view(shape)}
        total = torch.where(real[:, None], output["rewards"], 0.0).sum()
        return {"loss": (-total, real.sum() * shape[1])}, output

    def _worth(self, batch: Batch, answers: Tensor, sizes: Tensor) -> list[float]:
        """What each answer is worth. Rows that only fill up are worth nothing, and cost none."""
        if self.decode is None:
            raise RuntimeError("answers are judged as texts, by the corpus' tokeniser")
        ends = set(end_tokens(self.model))
        found: list[float] = []
        num_answers = len(answers) // max(1, len(batch["real"]))
        written = zip(answers.tolist(), sizes.tolist(), strict=True)
        texts = [
            self.decode([token for token in ids[:size] if token not in ends])
            for ids, size in written
        ]
        rows = zip(
            batch["prompts"].tolist(),
            batch["mask"].tolist(),
            batch["wanted"].tolist(),
            batch["real"].tolist(),
            strict=True,
        )
        for row, (prompt, mask, wanted, real) in enumerate(rows):
            if not real:
                found += [0.0] * num_answers
                continue
            asked = self.decode(prompt[len(prompt) - sum(mask) :])
            right = bytes(byte for byte in wanted if byte >= 0).decode()
            found += [
                sum(weight * reward(text, right, asked) for weight, reward in self.rewards)
                for text in texts[row * num_answers : (row + 1) * num_answers]
            ]
        return found
