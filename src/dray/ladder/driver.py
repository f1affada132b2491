"""A ladder from a spec: its rungs, trained as a sweep, and the record of what it is a ladder of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dray.cluster.connection import connect
from dray.cluster.needs import make_worker_needs
from dray.corpus.prepare import prepare
from dray.errors import SpecError, StoreError
from dray.ladder.rungs import (
    MOST_SHARE,
    Rung,
    check_ladder,
    make_point,
    make_rungs,
    make_target,
    transfers_width,
)
from dray.plan import Plan, with_numbers
from dray.rank.job import make_corpus_plan
from dray.redaction import take_in_all
from dray.runs import check_storage
from dray.show.sweeps import SweepDisplay
from dray.spec import Spec, make_spec
from dray.sweep.driver import cpus_here, tune
from dray.sweep.record import Sweep
from dray.sweep.room import fixed
from dray.sweep.space import make_space, with_values

UNITS = ("share", "flops", "hours", "money")


@dataclass(frozen=True)
class Amount:
    """So much compute, in one of the UNITS."""

    option: str
    """Where a person gave it, for messages."""
    unit: str
    """`share`: of the spec's own compute; `hours`: of all its workers; `money`: at a price."""
    number: float

    @property
    def text(self) -> str:
        """As a person would give it."""
        return f"{self.unit}={self.number:.10g}"

    def flops(self, target: Rung, flops_per_hour: float | None, price: float | None) -> float:
        """The same in FLOPs; `flops_per_hour` of all workers, `price` of an hour of them. Raises
        SpecError for what is not known."""
        if self.unit == "share":
            return self.number * target.flops
        if self.unit == "flops":
            return self.number
        if flops_per_hour is None:
            raise SpecError(
                self.option,
                f"{self.unit}: this hardware's speed is not known",
                "hours and money become FLOPs by the plan's speed",
                f"give {self.option} flops=… or share=…",
            )
        if self.unit == "hours":
            return self.number * flops_per_hour
        return self.number / self._require_price(price) * flops_per_hour

    def check(self, price: float | None) -> None:
        """Raise SpecError for money without a price."""
        if self.unit == "money":
            self._require_price(price)

    def _require_price(self, price: float | None) -> float:
        if price is None:
            raise SpecError(
                self.option,
                "money: an hour has no price",
                "money buys hours of workers",
                "give --price-per-hour, of one worker",
            )
        return price


def parse_amount(text: str, option: str) -> Amount:
    """`share=0.05` or `5%`, `flops=3e15`, `hours=2`, `money=500`. Raises SpecError."""
    unit, equals, number = text.partition("=")
    scale = 1.0
    if not equals and text.endswith("%"):
        unit, number, scale = "share", text[:-1], 0.01
    try:
        value = float(number) * scale
    except ValueError:
        value = math.nan
    if unit not in UNITS or not value > 0 or math.isinf(value):
        raise SpecError(
            f"{option} {text}",
            "is no amount",
            f"an amount is one of {', '.join(f'{name}=NUMBER' for name in UNITS)}, or 5%, above 0",
            f"e.g. {option} 5%",
        )
    return Amount(option, unit, value)


def climb(
    tree: Mapping[str, Any],
    *,
    budget: Amount,
    wanted: Amount | None = None,
    price_per_hour: float | None = None,
    storage: str = "./runs",
    name: str | None = None,
    address: str | None = None,
    verbose: bool = False,
    display: SweepDisplay | None = None,
) -> Sweep:
    """Train the ladder of a spec (as plain values), or go on with it.

    `budget`: what its rungs may take together. `wanted`: what the real run may take, for which the
    best model is looked for (none: what the spec takes). `price_per_hour`: of one worker. Raises
    UserError for what the caller can mend, and what `tune` raises.
    """
    tree = take_in_all(dict(tree))
    spec = make_spec(tree)
    spec = spec.model_copy(update={"resources": fixed(spec.resources)})
    name = name or f"{spec.name}-ladder"
    begun = _find_begun(storage, name, budget)
    _check(spec, budget, wanted, price_per_hour)
    if begun is None:
        _check_new(spec, budget)
    display = display or SweepDisplay()
    resources = spec.resources
    with connect(
        address,
        num_cpus=cpus_here(resources, address),
        worker=make_worker_needs(resources),
        num_workers=resources.max_workers,
        verbose=verbose,
    ) as connection:
        corpus = prepare(spec, storage, display.say)
        plan = make_corpus_plan(spec, connection.shape, corpus.manifest)
        if plan.law is not None:
            spec = with_numbers(spec, plan.law.learning_rate, plan.law.global_rows)
        manifest = corpus.manifest
        target = make_target(spec, manifest.train.num_rows, manifest.vocab_size)
        in_flops = _converter(plan, target, spec, price_per_hour)
        rungs = begun or make_rungs(spec, target, in_flops(budget), manifest.vocab_size)
        for line in _describe(spec, target, rungs, in_flops(budget)):
            display.say(line)
        points = [make_point(spec, target, rung) for rung in rungs]
        return tune(
            with_values(tree, _settle(spec)),
            make_space(
                {
                    "points": points,
                    "metric": "loss",
                    "scheduler": "none",
                    "budget": _make_limit(budget, price_per_hour),
                }
            ),
            storage=storage,
            name=name,
            space_name="the ladder",
            address=address,
            verbose=verbose,
            display=display,
            ladder={
                "target": target.to_json(),
                "rungs": [rung.to_json() for rung in rungs],
                "budget": budget.text,
                "flops": None if wanted is None else in_flops(wanted),
                "vocab_size": manifest.vocab_size,
                "corpus_tokens": manifest.train.num_rows * spec.data.sequence_tokens,
            },
        )


def _check(spec: Spec, budget: Amount, wanted: Amount | None, price_per_hour: float | None) -> None:
    """Raise UserError for what no corpus could change, before one is read."""
    if price_per_hour is not None and not price_per_hour > 0:
        raise SpecError(f"--price-per-hour {price_per_hour:g}", "is no price", "it is above 0")
    check_ladder(spec)
    for amount in (budget, wanted):
        if amount is not None:
            amount.check(price_per_hour)


def _check_new(spec: Spec, budget: Amount) -> None:
    """Raise PlanError for a budget that pays for no ladder, as far as that can be told without a
    corpus."""
    if spec.duration.epochs is None and not spec.is_auto and budget.unit in ("share", "flops"):
        target = make_target(spec, num_rows=0)
        make_rungs(spec, target, budget.flops(target, None, None))


def _settle(spec: Spec) -> dict[str, Any]:
    """What all rungs have besides what the spec says. A micro batch that divides the spec's batch
    need not divide theirs."""
    return {
        "optimizer.learning_rate": spec.optimizer.learning_rate,
        "batch.global_rows": spec.batch.global_rows,
        "batch.micro_rows": "auto",
        "validation.every_steps": None,
        "validation.metric": "loss",
    }


def _find_begun(storage: str, name: str, budget: Amount) -> list[Rung] | None:
    """The rungs of the ladder of that name, if it has begun: it goes on with them, though the plan
    of another machine would make others of an amount of hours. Raises StoreError for another budget
    or a name that something else has."""
    check_storage(storage)
    sweep = Sweep.check_name(storage, name)
    if sweep is None:
        return None
    kept = sweep.record().get("ladder")
    if kept is None:
        raise StoreError(
            f"sweep {name!r}",
            "is no ladder",
            "a ladder and another sweep do not share a folder",
            "choose another with --run",
        )
    if kept["budget"] != budget.text:
        raise StoreError(
            f"ladder {name!r}",
            f"was begun with --budget {kept['budget']}",
            "its rungs are those of its budget",
            f"give --budget {kept['budget']}, or begin another ladder with --run NEW_NAME",
        )
    return [Rung.from_json(rung) for rung in kept["rungs"]]


def _make_limit(budget: Amount, price_per_hour: float | None) -> dict[str, Any]:
    """The sweep's own limit: hours and money become FLOPs by the speed of the spec itself, which
    small rungs do not reach, and are held to the letter."""
    if budget.unit == "hours":
        return {"hours": budget.number}
    if budget.unit == "money":
        return {"money": budget.number, "price_per_hour": price_per_hour}
    return {}


def _converter(
    plan: Plan, target: Rung, spec: Spec, price_per_hour: float | None
) -> Callable[[Amount], float]:
    per_hour = None
    if plan.step_seconds and plan.num_steps:
        per_hour = target.flops / (plan.step_seconds * plan.num_steps / 3600)
    price = None if price_per_hour is None else price_per_hour * spec.resources.max_workers
    return lambda amount: amount.flops(target, per_hour, price)


def _describe(spec: Spec, target: Rung, rungs: list[Rung], budget: float) -> list[str]:
    sizes = {rung.size: None for rung in rungs}
    share = sum(rung.flops for rung in rungs) / target.flops
    rate = "the learning rate by width transfer"
    if not transfers_width(spec):
        rate = "one learning rate for every width"
        if "width_transfer" in type(spec.optimizer).model_fields:
            rate += ": model.tie_embeddings=false would let it be transferred"
    shapes = ", ".join(f"{size.num_layers} × {size.hidden_size}" for size in sizes)
    cut = (
        f" (of {budget / target.flops:.1%}: no rung sees more than {MOST_SHARE:.0%} of its tokens)"
        if share < 0.9 * budget / target.flops
        else ""
    )
    return [
        f"a ladder of {len(rungs)} rungs (layers × width: {shapes}; "
        f"{rungs[0].num_tokens:,} to {max(rung.num_tokens for rung in rungs):,} tokens) takes "
        f"{share:.1%} of the compute of the spec{cut}: {target.size.num_parameters:,} parameters "
        f"on {target.num_tokens:,} tokens, {target.flops:.3g} FLOPs",
        f"{rate}; with the square root of the batch, which falls with the tokens",
    ]
