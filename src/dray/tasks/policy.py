"""Learning from rewards that a program gives: a model writes several answers to each prompt, and
those that are worth more than the others of their prompt become likelier (group relative policy
optimisation, Shao et al. 2024).

Each step's answers are those of the weights that it updates, so that there is no ratio to clip:
it is 1, and its gradient the policy gradient. Rows are prompts, each with what was wanted. What is
drawn for an answer belongs to the seed, the step and the row, so a resumed run writes the same
ones. The loss that is shown is minus the mean reward.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field as Key
from pydantic import model_validator

from dray.spec import Direction, Field, Head
from dray.spec.sections import Float, Int, Section
from dray.tasks.parts.answers import PROMPT_TOKENS
from dray.tasks.rewards import Reward, find_reward, pattern_reward, reward_names
from dray.tasks.rows import Column
from dray.tasks.task import Batch, Output, Task, TaskMetrics

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor, nn

    from dray.tasks.rows import Encoded, Tools

REGEX = "regex"


class Policy(Task):
    """Answers that are worth more become likelier."""

    class Settings(Section):
        """What is written, and what it is worth."""

        rewards: dict[str, Annotated[Float, Key(gt=0)]] = {"exact": 1.0}  # noqa: RUF012
        """What counts, and how much: `exact`, `numeric` (the last number), `regex` (`pattern`
        matches the whole answer), or a reward of an installed package."""
        pattern: str | None = None
        """The regular expression of the reward `regex`."""
        answers: Annotated[Int, Key(ge=2, le=1024)] = 8
        """Answers to each prompt, which are compared with each other."""
        max_tokens: Annotated[Int, Key(ge=1, le=100_000)] = 32
        """Tokens of an answer at most; a row has room for a prompt beside them."""
        temperature: Annotated[Float, Key(gt=0)] = 1.0
        """Of what is drawn."""
        loss: Literal["grpo", "dr_grpo"] = "grpo"
        """`grpo`: rewards are divided by their standard deviation among the answers to a prompt,
        and an answer counts the mean over its tokens; `dr_grpo`: neither (Liu et al. 2025), and an
        answer counts the sum over its tokens by `max_tokens`."""

        @model_validator(mode="after")
        def _rewarding(self) -> Self:
            known = {*reward_names(), REGEX}
            if not self.rewards or (unknown := sorted(set(self.rewards) - known)):
                what = f"there is no reward {unknown[0]!r}" if self.rewards else "none is given"
                raise ValueError(
                    f"rewards: {what}; there are {', '.join(sorted(known))}, and the entry points "
                    "of the group dray.tasks.rewards: a spec names no code"
                )
            if REGEX in self.rewards and not self.pattern:
                raise ValueError(f"rewards: {REGEX} goes by `pattern`; give that, too")
            if self.pattern is not None and REGEX not in self.rewards:
                raise ValueError(f"pattern: the reward {REGEX} alone goes by it; leave it out")
            try:
                re.compile(self.pattern or "")
            except re.error as error:
                raise ValueError(f"pattern: is no regular expression ({error})") from error
            return self

    name = "policy"
    generates = explores = True
    smooths = False
    fields: Mapping[str, Field] = {
        "prompt": Field("record", column="prompt"),
        "answer": Field("text", column="answer"),
    }
    metrics: Mapping[str, Direction] = {
        "loss": "lower",
        "reward": "higher",
        "best_reward": "higher",
        "varied": "higher",
        "length": "lower",
    }
    columns = (Column(PROMPT_TOKENS), Column("wanted", "uint8", varies=True))
    head = Head("AutoModelForCausalLM", over="vocabulary", each="token", looks_ahead=False)

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self.head = replace(type(self).head, sequences=self.settings.answers)
        self.needed_tokens = self.settings.max_tokens

    @property
    def row_settings(self) -> dict[str, Any]:
        own = {"max_tokens": self.settings.max_tokens}
        return {"packs_rows": self.packs, "task": self.name, "version": self.version, **own}

    def encode(self, texts: pa.Array, targets: pa.Array | None, tools: Tools) -> Encoded:
        from dray.tasks.parts.answers import encode_prompts

        return encode_prompts(texts, tools, self.settings.max_tokens)

    def collate(self, table: pa.Table, draw: int = 0) -> Batch:
        """`prompts` and `mask`, int64 [rows, width], padded before their beginning; `wanted`, UTF-8
        bytes, int64 [rows, most], -1 behind them; `uniforms` [rows, answers, max_tokens]; `real`,
        bool [rows]."""
        import numpy as np
        import torch

        from dray.tasks.parts.answers import prompt_batch
        from dray.tasks.parts.columns import drawn_by_row

        shape = (self.settings.answers, self.settings.max_tokens)
        return {
            **prompt_batch(table, self.pad_token_id, "wanted"),
            "uniforms": torch.from_numpy(drawn_by_row(table, draw, shape, np.float32)),
        }

    def num_targets(self, batch: Batch) -> int:
        return int(batch["real"].sum()) * int(self.settings.answers)

    def rewards(self) -> list[tuple[float, Reward]]:
        """What counts, each with its weight."""
        return [
            (
                weight,
                pattern_reward(str(self.settings.pattern)) if name == REGEX else find_reward(name),
            )
            for name, weight in self.settings.rewards.items()
        ]

    def objective(self, model: Any, label_smoothing: float = 0.0) -> nn.Module:
        from dray.tasks.parts.rollouts import WrittenAnswersLoss

        return WrittenAnswersLoss(
            model,
            self.rewards(),
            self.decode,
            temperature=self.settings.temperature,
            divisor=self.settings.max_tokens if self.settings.loss == "dr_grpo" else None,
        )

    def explored(self, batch: Batch, output: Output, means: Mapping[str, Tensor]) -> Batch:
        from dray.tasks.parts.rollouts import advantages

        scaled = self.settings.loss == "grpo"
        found = {"advantages": advantages(output["rewards"], scaled=scaled), "real": batch["real"]}
        kept = ("input_ids", "attention_mask", "labels", "rewards")
        return {**found, **{name: output[name] for name in kept}}

    def new_metrics(self) -> TaskMetrics:
        from dray.tasks.parts.answer_metrics import RewardMetrics

        return RewardMetrics()
