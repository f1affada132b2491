"""Learning from preferences: an answer that people prefer over another one, or that they found good
or bad, becomes likelier, or less likely.

`dpo`, `ipo` and `kto` measure that against the model that the run begins with, whose
log-probabilities are computed once and lie in the rows; `orpo` and `simpo` need none. Rows are
records: of a prompt with a `chosen` and a `rejected` answer, or, for `kto`, with one `completion`
and a `label` that says whether it is good. The baseline of `kto` is that of a step's rows, each
with the answer of the record behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field as Key
from pydantic import model_validator

from dray.spec import Direction, Field, Head
from dray.spec.sections import Float, Section
from dray.tasks.parts.answers import OTHER, PROMPT_TOKENS
from dray.tasks.rows import Column
from dray.tasks.task import Batch, Output, Task, TaskMetrics

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor, nn

    from dray.tasks.rows import Encoded, Tools

WITH_REFERENCE = ("dpo", "ipo", "kto")
WEIGHTS = ("good_weight", "bad_weight")
TRUTHS = {"true": 1, "1": 1, "false": 0, "0": 0}


class Preference(Task):
    """Answers that are preferred become likelier."""

    class Settings(Section):
        """The loss, and its numbers."""

        loss: Literal["dpo", "ipo", "kto", "orpo", "simpo"] = "dpo"
        """Direct preference optimisation, identity preference optimisation, Kahneman and Tversky's,
        odds ratios beside the likelihood of the chosen answer, or simple preference
        optimisation."""
        beta: Annotated[Float | None, Key(gt=0)] = None
        """How much a reward of the model's log-ratio is worth; of `orpo`, the weight of the odds.
        Without it 0.1, and 2 for `simpo`."""
        margin: Annotated[Float, Key(ge=0)] = 0.0
        """`simpo`: by how much the chosen answer's reward is to be the greater one."""
        flipped: Annotated[Float, Key(ge=0, lt=0.5)] = 0.0
        """`dpo` and `simpo`: share of the pairs that are taken to be the wrong way round."""
        good_weight: Annotated[Float, Key(gt=0)] = 1.0
        """`kto`: what a good answer weighs."""
        bad_weight: Annotated[Float, Key(gt=0)] = 1.0
        """`kto`: what a bad answer weighs."""

        @model_validator(mode="after")
        def _means_something(self) -> Self:
            for name, losses in {
                "margin": ("simpo",),
                "flipped": ("dpo", "simpo"),
                "good_weight": ("kto",),
                "bad_weight": ("kto",),
            }.items():
                if self.loss not in losses and getattr(self, name) != (name in WEIGHTS):
                    raise ValueError(
                        f"{name} = {getattr(self, name):g}: it is {' and '.join(losses)}'s, and "
                        f"the loss is {self.loss}; leave it out"
                    )
            return self

    name = "preference"
    generates = True
    smooths = False
    head = Head(
        "AutoModelForCausalLM", over="vocabulary", each="token", looks_ahead=False, sequences=2
    )

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        loss = self.settings.loss
        self.is_paired, has_reference = loss != "kto", loss in WITH_REFERENCE
        self.explores = loss == "kto"
        answers = ("chosen", "rejected") if self.is_paired else ("completion",)
        self.fields: Mapping[str, Field] = {
            name: Field("record", column=name) for name in ("prompt", *answers)
        } | ({} if self.is_paired else {"label": Field("label", column="label")})
        self.columns = (
            Column(PROMPT_TOKENS),
            Column(OTHER, varies=True),
            *(() if self.is_paired else (Column("good", "uint8"),)),
            *(
                Column(name, "float32", told=True)
                for name in ("reference", "reference_other")
                if has_reference
            ),
        )
        self.has_reference = has_reference
        self.metrics: Mapping[str, Direction] = {
            "loss": "lower",
            "accuracy": "higher",
            "margin": "higher",
            "chosen_reward": "higher",
            "rejected_reward": "lower",
            **({"kl": "lower"} if has_reference else {}),
        }

    @property
    def beta(self) -> float:
        given: float | None = self.settings.beta
        return given if given is not None else 2.0 if self.settings.loss == "simpo" else 0.1

    @property
    def weights(self) -> tuple[float, float]:
        return self.settings.good_weight, self.settings.bad_weight

    @property
    def row_settings(self) -> dict[str, Any]:
        """Losses of one kind have the same rows."""
        kind = {"paired": self.is_paired, "reference": self.has_reference}
        return {"packs_rows": self.packs, "task": self.name, "version": self.version, **kind}

    def encode(self, texts: pa.Array, targets: pa.Array | None, tools: Tools) -> Encoded:
        import numpy as np

        from dray.tasks.parts.answers import encode_answers

        found = encode_answers(texts, tools, 2 if self.is_paired else 1)
        if self.is_paired:
            return found.encoded(tools, [answers[1] for answers in found.answers])
        names = [] if targets is None else targets.to_pylist()
        odd = {
            place: "label is neither true nor false"
            for place in found.records
            if names[place] not in TRUTHS
        }
        found = found.without(odd)
        firsts = [answers[0] for answers in found.answers]
        others = [
            other[: found.room - len(prompt)]
            for other, prompt in zip([*firsts[1:], *firsts[:1]], found.prompts, strict=True)
        ]
        good = np.array([TRUTHS[names[record]] for record in found.records], np.uint8)
        return found.encoded(tools, others, good=good)

    def collate(self, table: pa.Table, draw: int = 0) -> Batch:
        """`input_ids`, `attention_mask`, `labels` [rows, 2, width] and `real` [rows] as
        `answers.answer_batch` makes them, `reference` fp32 [rows, 2], and of `kto` `good`, bool
        [rows]."""
        import torch

        from dray.tasks.parts.answers import answer_batch
        from dray.tasks.parts.columns import integer_column, number_column

        batch = answer_batch(table, self.pad_token_id)
        batch["reference"] = torch.zeros(table.num_rows, 2)
        if self.has_reference:
            told = [number_column(table, name) for name in ("reference", "reference_other")]
            batch["reference"] = torch.stack(told, dim=1)
        if not self.is_paired:
            batch["good"] = integer_column(table, "good") == 1
        return batch

    def num_targets(self, batch: Batch) -> int:
        return int(batch["real"].sum())

    def objective(self, model: Any, label_smoothing: float = 0.0) -> nn.Module:
        from dray.tasks.parts.answer_objectives import GoodOrBadLoss, PairLoss, PairRule

        settings = self.settings
        if not self.is_paired:
            return GoodOrBadLoss(model, self.beta, self.weights)
        return PairLoss(
            model, PairRule(settings.loss, self.beta, settings.margin, settings.flipped)
        )

    def explored(self, batch: Batch, output: Output, means: Mapping[str, Tensor]) -> Batch:
        return {**batch, "baseline": means["baseline"]}

    def tell(self, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        own, other = output["log_probs"].unbind(dim=1)
        return {"reference": own, "reference_other": other}

    def new_metrics(self) -> TaskMetrics:
        from dray.tasks.parts.answer_metrics import GoodOrBadMetrics, PairMetrics

        if not self.is_paired:
            return GoodOrBadMetrics(self.beta, self.weights)
        return PairMetrics(tuple(self.metrics), "rewards")
