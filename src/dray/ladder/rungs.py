"""The rungs of a ladder: smaller models of a spec, each trained for several lengths, that together
cost a share of the spec's own training.

A rung is the spec itself, narrower and shallower by about the same factor, its heads of attention
as wide. No rung is tuned by hand: the batch falls with the tokens (∝ D^0.571, the Step Law's
exponent, arXiv 2503.04715), the learning rate with the square root of the batch, and from the
spec's width to a rung's by width transfer (`dray.models.width`), with the spec as the base, which
it leaves as it is. Where there is no width transfer (a tied head, another optimiser than AdamW)
rungs keep the spec's rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dray.errors import PlanError, SpecError
from dray.plan.batch import num_steps_of
from dray.plan.flops import flops_per_token_strict
from dray.plan.laws import BATCH_TOKENS_EXPONENT, round_rows
from dray.plan.parameters import count_parameters, load_dimensions
from dray.spec import Model, Spec

MOST_SIZES, LEAST_SIZES = 4, 3
"""Sizes of a ladder: a law in two variables wants a spread of both."""
LEAST_STRIDE = 1.2
"""From one size to the next smaller one: about 2 where there is such a size, this at least."""
STRETCHES = (0.25, 0.5, 1.0)
"""Each size is trained for these shares of its longest length."""
MOST_SHARE = 0.5
"""No rung sees more of the target's tokens than that, however much could be paid for."""
LEAST_STEPS = 40
"""A rung of fewer steps says little but how its first steps went."""
MOST_TRIED = 16.0
"""No ladder takes more than so many times the target's own compute."""
MOST_ASPECT = 2.0
"""Width ÷ depth of a rung is that of the spec, up to this factor."""
MOST_WIDER = 64
"""Models of up to so many times the spec's width are looked at for the best one."""
LEAST_LAYERS = 2
"""Of a rung of a deeper spec: one layer alone cannot copy what it has seen (Olsson et al. 2022,
arXiv 2209.11895), and its losses lie on a law of their own."""
FEW_HEADS = 8
"""Of a model with fewer heads, rungs may have heads half as wide."""


@dataclass(frozen=True)
class Size:
    """A model's shape and what it costs."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_parameters: int
    """All of them: of a small model the vocabulary's are the larger part."""
    flops_per_token: float
    """Forward and backward."""


@dataclass(frozen=True)
class Rung:
    """A size that is trained on so many tokens."""

    size: Size
    num_tokens: int
    """Of its rows, the little padding of packed ones among them."""

    @property
    def flops(self) -> float:
        return self.size.flops_per_token * self.num_tokens

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self.size), "num_tokens": self.num_tokens, "flops": self.flops}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Rung:
        size = {key: kept[key] for key in Size.__dataclass_fields__}
        return cls(Size(**size), int(kept["num_tokens"]))


def check_ladder(spec: Spec) -> None:
    """Raise SpecError for a spec of which no smaller models can be made."""
    if spec.model.origin:
        raise SpecError(
            "model",
            f"starts from {spec.model.origin}, whose sizes are what they are",
            "a ladder is made of smaller models with drawn weights",
            "give model.architecture and sizes",
        )
    if spec.task.head.over != "vocabulary":
        raise SpecError(
            f"task = {spec.task.name}",
            "the law L(N, D) is of language models",
            "a ladder's losses are of tokens",
            "give task=causal_lm or masked_lm",
        )
    if spec.data.validation is None:
        raise SpecError(
            "the spec",
            "data.validation is missing",
            "rungs are compared on rows that they were not trained on",
            "e.g. data.validation={share: 0.02}",
        )


def make_target(spec: Spec, num_rows: int, vocab_size: int | None = None) -> Rung:
    """The spec itself as the rung that is to be foretold; `num_rows` of its corpus."""
    row_tokens = spec.data.sequence_tokens
    step_tokens = spec.batch.global_rows * row_tokens
    steps = num_steps_of(spec.duration, spec.batch.global_rows, step_tokens, num_rows) or 1
    return Rung(make_size(spec, spec.model, vocab_size), steps * step_tokens)


def make_size(spec: Spec, model: Model, vocab_size: int | None = None) -> Size:
    """What a model costs in the place of the spec's own."""
    sizes = load_dimensions(spec.model_copy(update={"model": model}), vocab_size)
    count = count_parameters(sizes)
    return Size(
        sizes.hidden,
        sizes.layers,
        sizes.heads,
        count.total,
        flops_per_token_strict(sizes, count, spec.data.sequence_tokens),
    )


def make_rungs(
    spec: Spec, target: Rung, budget: float, vocab_size: int | None = None
) -> list[Rung]:
    """The rungs that together take `budget` FLOPs. Of the ladders that it pays for, the one from
    which it is about as far to the target in parameters as in tokens. Raises PlanError where it
    pays for none."""
    ladders = _find_ladders(spec, target, vocab_size)
    paid = [ladder for ladder in ladders if ladder.is_long_enough(spec, budget)]
    if not paid:
        raise _pays_for_none(spec, target, budget, ladders)
    best = min(paid, key=lambda ladder: ladder.reach(budget))
    return [_whole_steps(spec, target, rung) for rung in best.rungs(budget)]


def _find_ladders(spec: Spec, target: Rung, vocab_size: int | None) -> list[_Ladder]:
    """A ladder below each size. Raises PlanError where the model leaves no room for one."""
    sizes = sorted(smaller_sizes(spec, vocab_size), key=lambda size: size.num_parameters)
    ladders = [_Ladder(target, tuple(_descend(sizes, largest))) for largest in sizes]
    ladders = [ladder for ladder in ladders if len(ladder.sizes) >= LEAST_SIZES]
    if not ladders:
        raise PlanError(
            "model",
            f"{target.size.num_layers} layers of width {target.size.hidden_size} leave fewer than "
            f"{LEAST_SIZES} smaller sizes",
            "a rung keeps the width of a head and about the width by depth of the spec",
            "give a model with more heads and layers",
        )
    return ladders


def _pays_for_none(
    spec: Spec, target: Rung, budget: float, ladders: Sequence[_Ladder]
) -> PlanError:
    """What is to be said of a budget, with the least that would do, to a tenth."""
    least = MOST_TRIED * target.flops
    if not any(ladder.is_long_enough(spec, least) for ladder in ladders):
        return PlanError(
            "--budget",
            f"no budget pays for a ladder of this spec: it has {target.num_tokens:,} tokens",
            f"a rung has {LEAST_STEPS} steps at least, and {MOST_SHARE:.0%} of the tokens at most",
            "give a longer duration, or a smaller batch.global_rows",
        )
    while any(ladder.is_long_enough(spec, least / 1.1) for ladder in ladders):
        least /= 1.1
    return PlanError(
        "--budget",
        f"{budget:.3g} FLOPs pay for no ladder of this spec",
        f"its smallest takes {least:.2g}, {least / target.flops:.1%} of the spec's own: a rung has "
        f"{LEAST_STEPS} steps at least",
        f"give --budget flops={least:.2g} or more",
    )


@dataclass(frozen=True)
class _Ladder:
    """Sizes whose longest trainings have tokens in proportion to their parameters, so that all are
    as far in their learning as the target is, in the main: with far fewer tokens a parameter the
    size hardly matters to a loss, and nothing would be told of it (as in Bhagia et al. 2024, arXiv
    2412.04403)."""

    target: Rung
    sizes: tuple[Size, ...]
    """The smallest first."""

    def rungs(self, budget: float) -> list[Rung]:
        """The rungs that together take so many FLOPs, or what MOST_SHARE leaves of them."""
        whole = sum(size.flops_per_token * size.num_parameters for size in self.sizes)
        per_parameter = budget / (whole * sum(STRETCHES))
        most = MOST_SHARE * self.target.num_tokens
        return [
            Rung(size, max(1, round(min(most, per_parameter * size.num_parameters) * stretch)))
            for size in self.sizes
            for stretch in STRETCHES
        ]

    def reach(self, budget: float) -> float:
        """How many times as large the target is, in what it is further away in."""
        rungs = self.rungs(budget)
        return max(
            self.target.size.num_parameters / self.sizes[-1].num_parameters,
            self.target.num_tokens / max(rung.num_tokens for rung in rungs),
        )

    def is_long_enough(self, spec: Spec, budget: float) -> bool:
        """Whether its shortest rung has steps enough to tell anything."""
        return all(
            _whole_steps(spec, self.target, rung).num_tokens
            >= LEAST_STEPS * num_rows_of(spec, self.target, rung) * spec.data.sequence_tokens
            for rung in self.rungs(budget)
        )


def smaller_sizes(spec: Spec, vocab_size: int | None = None) -> Iterator[Size]:
    """Every size below the spec's own, of about its width by depth."""
    width, layers = int(spec.model.hidden_size or 0), int(spec.model.num_layers or 1)
    unit = _width_unit(spec.model)
    for narrow in range(unit, width + 1, unit):
        for depth in range(min(LEAST_LAYERS, layers), layers + 1):
            aspect = (narrow / width) / (depth / layers)
            is_like = 1 / MOST_ASPECT <= aspect <= MOST_ASPECT
            if is_like and (narrow, depth) != (width, layers):
                yield make_size(spec, resize(spec.model, narrow, depth), vocab_size)


def scaled_sizes(spec: Spec, vocab_size: int | None = None) -> list[Size]:
    """Sizes of the spec's width by depth, from the narrowest to MOST_WIDER times as wide, an eighth
    of a doubling apart; the smallest first."""
    width, layers = int(spec.model.hidden_size or 0), int(spec.model.num_layers or 1)
    unit = _width_unit(spec.model)
    steps = math.ceil(8 * math.log2(MOST_WIDER * width / unit))
    widths = {unit * max(1, round(2 ** (step / 8))) for step in range(steps + 1)}
    least = min(LEAST_LAYERS, layers)
    depths = {narrow: max(least, round(layers * narrow / width)) for narrow in sorted(widths)}
    return [
        make_size(spec, resize(spec.model, narrow, depth), vocab_size)
        for narrow, depth in depths.items()
    ]


def _width_unit(model: Model) -> int:
    """Widths of rungs are multiples of it: a head's width, or half of that of a model with few."""
    heads = int(model.num_heads or 1)
    head = int(model.hidden_size or 0) // heads
    return head // 2 if heads < FEW_HEADS and head % 32 == 0 else head


def resize(model: Model, hidden_size: int, num_layers: int) -> Model:
    """A model of another width and depth, with heads as wide as far as they divide the width."""
    before = int(model.num_heads or 1)
    width = int(model.hidden_size or 0)
    head = width // before
    heads = hidden_size // (head if hidden_size % head == 0 else head // 2)
    changed: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_heads": heads,
        "num_layers": num_layers,
    }
    if model.num_kv_heads is not None:
        wanted = model.num_kv_heads * heads / before
        divisors = [count for count in range(1, heads + 1) if heads % count == 0]
        changed["num_kv_heads"] = min(divisors, key=lambda count: abs(count - wanted))
    if model.intermediate_size is not None:
        share = hidden_size / width
        changed["intermediate_size"] = max(8, round(model.intermediate_size * share / 8) * 8)
    return model.model_copy(update=changed)


def _descend(sizes: Sequence[Size], largest: Size) -> list[Size]:
    """Sizes below `largest`, each about half as large as the one before, the smallest first."""
    chosen = [largest]
    for step in range(1, MOST_SIZES):
        wanted = math.log(largest.num_parameters / 2**step)
        nearest = min(sizes, key=lambda size: abs(math.log(size.num_parameters) - wanted))
        if nearest.num_parameters < chosen[-1].num_parameters / LEAST_STRIDE:
            chosen.append(nearest)
    return chosen[::-1]


# ---- as trials ---------------------------------------------------------------------------------


def make_point(spec: Spec, target: Rung, rung: Rung) -> dict[str, Any]:
    """The values of the spec's keys that make it this rung."""
    rows = num_rows_of(spec, target, rung)
    steps = _num_steps(spec, rows, rung)
    whole = _num_steps(spec, spec.batch.global_rows, target)
    model = resize(spec.model, rung.size.hidden_size, rung.size.num_layers)
    given = spec.model.model_dump()
    point: dict[str, Any] = {
        f"model.{key}": value for key, value in model.model_dump().items() if value != given[key]
    }
    point["duration.tokens"] = rung.num_tokens
    if rows != spec.batch.global_rows:
        rate = spec.optimizer.learning_rate * math.sqrt(rows / spec.batch.global_rows)
        point["batch.global_rows"] = rows
        point["optimizer.learning_rate"] = float(f"{rate:.3g}")
    if transfers_width(spec) and spec.optimizer.base_hidden_size is None:
        point["optimizer.width_transfer.base_hidden_size"] = spec.model.hidden_size
    for key in ("warmup_steps", "decay_steps"):
        if value := getattr(spec.schedule, key):
            point[f"schedule.{key}"] = max(1, round(value * steps / whole))
    return point


def transfers_width(spec: Spec) -> bool:
    """Whether a rate can be carried from the spec's width to a rung's."""
    return "width_transfer" in type(spec.optimizer).model_fields and not spec.model.tie_embeddings


def num_rows_of(spec: Spec, target: Rung, rung: Rung) -> int:
    """The global batch of a rung: a multiple of the workers, and no more than the spec's."""
    share = (rung.num_tokens / target.num_tokens) ** BATCH_TOKENS_EXPONENT
    workers = spec.resources.min_workers
    rows = workers * round_rows(spec.batch.global_rows * share / workers)
    return min(spec.batch.global_rows, rows)


def _num_steps(spec: Spec, rows: int, rung: Rung) -> int:
    return max(1, math.ceil(rung.num_tokens / (rows * spec.data.sequence_tokens)))


def _whole_steps(spec: Spec, target: Rung, rung: Rung) -> Rung:
    """The rung without the tokens that do not fill its last step."""
    for _ in range(4):  # with fewer tokens its batch may be smaller, too
        step_tokens = num_rows_of(spec, target, rung) * spec.data.sequence_tokens
        if rung.num_tokens % step_tokens == 0:
            break
        rung = Rung(rung.size, max(1, rung.num_tokens // step_tokens) * step_tokens)
    return rung
